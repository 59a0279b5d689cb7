"""Where to read features in a model, and the two ways to read them: functionally, and by hooks in anybody's loop."""
import math
from collections import Counter
from contextlib import contextmanager, nullcontext
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple, Union

import torch
import torch._dynamo
import torch.nn as nn
from torch.utils.hooks import RemovableHandle

from .channel_axis import ChannelAxes
from .neurons import LIF
from .probing import probe_sizes
from .untouched import untouched

__all__ = ['Tap', 'POOLED', 'stage_indices', 'find_taps', 'named_taps', 'fold_feature', 'FeatureReader', 'Recorder']

POOLED = 'pooled'  # name of the tap on the pooled feature in front of the classifier


class Call(NamedTuple):
    """A module's call that makes the feature of a tapped tensor: module(tensor, *args, **kwargs)."""
    module: str
    args: Tuple[Any, ...]
    kwargs: Dict[str, Any]


class Tap(NamedTuple):
    """A place in a model where a feature is read."""
    name: str  # as reported: the stage, or the module that the user named
    module: str  # module to hook
    channels: int
    channel_axis: int  # of the tensor: 1 for NCHW, NCL and NC, -1 for NHWC and NLC
    prefix_tokens: int = 0  # leading tokens (class, register) that are no image patches
    nth: int = 0  # of the module's calls in a forward
    path: Tuple[Any, ...] = ()  # where in the module's output the tensor is: indices of tuples and lists, keys of dicts
    at_input: bool = False  # the tensor is the module's first argument, as no module returns it
    call: Optional[Call] = None  # what forward_intermediates applies to the tensor (a norm, a reordering of tokens)
    through_head: bool = False  # the feature is forward_head(tensor, pre_logits=True): no module returns it itself
    parts: Tuple['Tap', ...] = ()  # what forward_head takes, where that is no module's output as it is
    part_ndim: int = 0
    head_takes_list: bool = False

    @property
    def place(self) -> Tuple[str, bool]:
        """What to hook: the module, and whether its input."""
        return self.module, self.at_input


def stage_indices(model: nn.Module, num_stages: int = 4) -> List[int]:
    """Indices for forward_intermediates: the end of each of the last stages, from the model's feature_info.

    A stage is a reduction (stride); isotropic models, with one reduction, are cut into equal runs of blocks.

    Args:
        model: timm model with feature_info.
        num_stages: How many of the last stages; a model with fewer gives what it has.

    Raises:
        ValueError: The model has no feature_info.
    """
    info = getattr(model, 'feature_info', None)
    info = getattr(info, 'info', info)
    if not info or not hasattr(model, 'forward_intermediates'):
        raise ValueError(f'{type(model).__name__} has no feature_info and forward_intermediates to find its stages by; '
                         f'name the modules to tap (taps=[...], --sscl-taps), for example {", ".join(_examples(model))}.')
    reductions = [entry['reduction'] for entry in info]
    if len(set(reductions)) == 1:
        n = len(reductions)
        return sorted({math.ceil(n * k / num_stages) - 1 for k in range(1, num_stages + 1)})
    last_of = {reduction: index for index, reduction in enumerate(reductions)}
    return sorted(last_of.values())[-num_stages:]


def match_by_depth(n: int, k: int) -> Tuple[List[int], List[int]]:
    """Positions of the stages to compare in two networks with n and k stages: those at the same relative depth."""
    few = min(n, k)
    student, teacher = ([math.ceil(m * j / few) - 1 for j in range(1, few + 1)] for m in (n, k))
    return student, teacher


def known_stages(model: nn.Module) -> Dict[str, int]:
    """Names of a timm model's stages, as in its feature_info, and their indices for forward_intermediates."""
    try:
        indices = range(stage_indices(model)[-1] + 1)
    except ValueError:
        return {}
    return {name: i for i, name in zip(indices, stage_names(model, indices))}


def _named_indices(model: nn.Module, names: Sequence[str]) -> List[int]:
    """Indices for forward_intermediates of stages by their names in feature_info, in the order of the names."""
    known = known_stages(model)
    for name in names:
        if name != POOLED and name not in known:
            raise ValueError(f"tap '{name}' is no stage of {type(model).__name__}; it has {', '.join(known)} "
                             f'and {POOLED}.')
    return [known[name] for name in names if name != POOLED]


def stage_names(model: nn.Module, indices: Sequence[int]) -> List[str]:
    info = getattr(model.feature_info, 'info', model.feature_info)
    return [info[i].get('module') or f'stage{i}' for i in indices]


def fold_feature(x: torch.Tensor, timesteps: int, channel_axis: int = 1, prefix_tokens: int = 0) -> torch.Tensor:
    """A module's output (T * B, ...) as (T, B, C, ...), without a copy."""
    if prefix_tokens:
        x = x[:, prefix_tokens:]
    if channel_axis != 1 and x.ndim > 2:
        x = x.movedim(channel_axis, 1)
    return x.unflatten(0, (timesteps, x.shape[0] // timesteps))


# ---- finding taps by a probe

@contextmanager
def _probing(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradient, and neurons that all but pass their input on, so that no feature is silent."""
    with untouched(model):
        for module in model.modules():
            if isinstance(module, LIF):
                module.register_forward_hook(_pass_on)
        yield


def _pass_on(lif: LIF, args: Tuple[torch.Tensor], spikes: torch.Tensor) -> torch.Tensor:
    """Not the identity: what comes before and after a neuron must differ."""
    x = args[0].repeat(lif.timesteps, *(1,) * (args[0].ndim - 1)) if lif.encodes else args[0]
    return 1.01 * x + .01


def _is_spiking(model: nn.Module) -> bool:
    return hasattr(model, 'set_timesteps')


def _per_step(model: nn.Module) -> Dict[str, bool]:
    """Keyword by which a spiking model returns every step; an ANN has none."""
    return dict(per_step=True) if _is_spiking(model) else {}


def _probe_input(model: nn.Module, size: Tuple[int, ...]) -> torch.Tensor:
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    generator = torch.Generator().manual_seed(0)  # the global generator stays where it is
    return torch.randn(1, *size, generator=generator).to(like)


def run_probe(model: nn.Module, input_size: Optional[Sequence[int]], run: Callable[[torch.Tensor], Any]) -> Any:
    """run(x) on the first input size that the model takes."""
    sizes = [tuple(input_size)] if input_size is not None else probe_sizes(model)
    for i, size in enumerate(sizes):
        try:
            with _probing(model):
                return run(_probe_input(model, size))
        except (RuntimeError, ValueError, AssertionError, IndexError, TypeError) as error:
            if i + 1 == len(sizes):
                raise ValueError(f'{type(model).__name__} does not run on a probe image of size {size}: {error}. '
                                 f'Say what it takes by input_size=(C, H, W).') from error


class _Seen(NamedTuple):
    """A module's call in a probe."""
    module: str
    nth: int
    args: Tuple[Any, ...]
    kwargs: Dict[str, Any]
    out: Any


def _calls(model: nn.Module, run: Callable[[], Any]) -> Tuple[Any, List[_Seen]]:
    """run(), and the calls of the model's modules in it, in the order of their ends."""
    seen: List[_Seen] = []
    counts: Counter = Counter()

    def hook(name):
        def saw(module, args, kwargs, out):
            seen.append(_Seen(name, counts[name], args, kwargs, out))
            counts[name] += 1
        return saw

    handles = [m.register_forward_hook(hook(n), with_kwargs=True) for n, m in model.named_modules() if n]
    try:
        return run(), seen
    finally:
        for handle in handles:
            handle.remove()


def _tensors(out: Any, path: Tuple[Any, ...] = ()) -> Iterator[Tuple[Tuple[Any, ...], torch.Tensor]]:
    """The tensors in a structure of tuples, lists and dicts, with their paths."""
    if isinstance(out, torch.Tensor):
        yield path, out
    elif isinstance(out, (tuple, list)):
        for i, item in enumerate(out):
            yield from _tensors(item, (*path, i))
    elif isinstance(out, dict):
        for key, item in out.items():
            yield from _tensors(item, (*path, key))


def _at(out: Any, path: Tuple[Any, ...]) -> torch.Tensor:
    for key in path:
        out = out[key]
    return out


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape:
        return False
    row = (0,) * (a.ndim - 1)  # most candidates differ in their first row already
    # the same arithmetic twice; a batch norm before its training is the identity to 5e-6
    return all(torch.allclose(u, v, rtol=1e-6, atol=1e-7, equal_nan=True) for u, v in ((a[row], b[row]), (a, b)))


def _layout(out: torch.Tensor, feature: torch.Tensor, prefixes: Sequence[int]) -> Optional[Tuple[int, int]]:
    """(channel_axis, prefix_tokens) under which a tensor is this feature (T * B, C, ...), or None."""
    if out.ndim < 2 or out.numel() < feature.numel():
        return None
    if _same(out, feature) or (feature.ndim > 2 and out.ndim > 2 and _same(out.flatten(2), feature.flatten(2))):
        return 1, 0
    if out.ndim in (3, 4) and feature.ndim > 2:
        flat = out if out.ndim == 3 else out.flatten(1, 2)
        for prefix in prefixes if out.ndim == 3 else (0,):
            if _same(flat[:, prefix:].movedim(-1, 1), feature.flatten(2)):
                return -1, prefix
    return None


def _stages(model: nn.Module, indices: List[int], x: torch.Tensor) -> Tuple[torch.Tensor, List[torch.Tensor]]:
    """Final feature map and stage features; without indices there is no stage to stop at."""
    if not indices:
        return model.forward_features(x), []
    final, stages = model.forward_intermediates(x, indices=indices, **_per_step(model))
    return final, list(stages)


def _references(
        model: nn.Module,
        indices: List[int],
        x: torch.Tensor,
) -> Tuple[torch.Tensor, List[torch.Tensor], torch.Tensor]:
    """Final feature map, stage features and pooled feature, (T * B, ...), as the model's own methods give them."""
    per_step = _per_step(model)
    final, stages = _stages(model, indices, x)
    pooled = model.forward_head(final, pre_logits=True, **per_step)
    return (final, [s.flatten(0, 1) for s in stages], pooled.flatten(0, 1)) if per_step else (final, stages, pooled)


def find_taps(model: nn.Module, num_stages: int = 4, input_size: Optional[Sequence[int]] = None) -> List[Tap]:
    """Taps on the last stages and the pooled feature of a timm model, found by one probe.

    The probe runs the model once by forward_intermediates and forward_head and once as a whole, and takes for each
    feature the outermost module that returns it and is no container: gradient checkpointing never calls a container.
    Where several return it (a block that is still an identity), the one that feature_info names. A pooled feature that
    no module returns is taken from the final feature map by forward_head.

    Args:
        model: timm model.
        num_stages: How many of the last stages.
        input_size: (C, H, W) of the probe image; the model's own by default.

    Returns:
        One Tap per stage, then the pooled one.

    Raises:
        ValueError: The model has no stages to find, or no module returns a feature.
    """
    return _find(model, stage_indices(model, num_stages), input_size)


def _find(model: nn.Module, indices: Sequence[int], input_size: Optional[Sequence[int]]) -> List[Tap]:
    """Taps on stages, in their order, and the pooled feature."""
    names = stage_names(model, indices) + [POOLED]

    def run(x: torch.Tensor) -> List[Optional[Tap]]:
        (final, stages, pooled), functional = _calls(model, lambda: _references(model, indices, x))
        _, seen = _calls(model, lambda: model(x))
        search = _Search(model, seen, functional)
        taps = [search.find(name, feature) for name, feature in zip(names, [*stages, pooled])]
        taps[-1] = taps[-1] or search.through_head(final, pooled)
        return taps

    taps = run_probe(model, input_size, run)
    missing = [name for name, tap in zip(names, taps) if tap is None]
    if missing:
        raise ValueError(f'{type(model).__name__}: no module returns the feature of {", ".join(missing)}; '
                         f'name the modules to tap (taps=[...]).')
    return taps


class _Search:
    """Looks for a feature among the calls of one forward.

    Args:
        model: The model.
        seen: Calls in the model's own forward, which is what hooks will see.
        functional: Calls in forward_intermediates and forward_head, which made the features.
    """

    def __init__(self, model: nn.Module, seen: Sequence[_Seen], functional: Sequence[_Seen]):
        # gradient checkpointing never calls a container
        containers = {name for name, module in model.named_modules() if isinstance(module, nn.Sequential)}
        self.seen = [call for call in seen if call.module not in containers]
        self.functional = [call for call in functional if call.module not in containers]
        self.prefixes = sorted({0, 1, getattr(model, 'num_prefix_tokens', 0) or 0})

    def find(self, name: str, feature: torch.Tensor) -> Optional[Tap]:
        """A tap whose tensor is the feature, as it is, or after a call that forward_intermediates makes of it."""
        found = self._outputs(feature)
        if found:
            return _best(found, name)
        for call in self.functional:
            if any(True for _ in _tensors([call.args[1:], call.kwargs])):
                continue  # a tensor of the probe's
            source = next((arg for arg in call.args[:1] if isinstance(arg, torch.Tensor)), None)
            layout = _layout(call.out, feature, self.prefixes) if isinstance(call.out, torch.Tensor) else None
            sources = self._outputs(source, exact=True) if source is not None and layout is not None else []
            if sources:
                return _best(sources, name)._replace(
                    channels=feature.shape[1], channel_axis=layout[0], prefix_tokens=layout[1],
                    call=Call(call.module, call.args[1:], call.kwargs))
        inputs = self._inputs(feature)
        return inputs[0]._replace(name=name) if inputs else None

    def through_head(self, final: Any, pooled: torch.Tensor) -> Optional[Tap]:
        """A tap on the final feature map, or on each of several, from which forward_head makes the pooled feature."""
        parts = []
        for _, tensor in _tensors(final):
            found = self._outputs(tensor)
            if not found:
                return None
            parts.append(_best(found, '')._replace(part_ndim=tensor.ndim))
        if not parts:
            return None
        return parts[0]._replace(
            name=POOLED, channels=pooled.shape[1], channel_axis=1, prefix_tokens=0, part_ndim=0,
            through_head=True, parts=tuple(parts), head_takes_list=not isinstance(final, torch.Tensor))

    def _outputs(self, feature: torch.Tensor, exact: bool = False) -> List[Tap]:
        prefixes = (0,) if exact else self.prefixes
        found = []
        for call in self.seen:
            for path, tensor in _tensors(call.out):
                layout = _layout(tensor, feature, prefixes)
                if layout is not None and (not exact or tensor.shape == feature.shape):
                    found.append(Tap('', call.module, feature.shape[1], *layout, nth=call.nth, path=path))
        return found

    def _inputs(self, feature: torch.Tensor) -> List[Tap]:
        found = []
        for call in self.seen:
            if call.args and isinstance(call.args[0], torch.Tensor):
                layout = _layout(call.args[0], feature, self.prefixes)
                if layout is not None:
                    found.append(Tap('', call.module, feature.shape[1], *layout, nth=call.nth, at_input=True))
        return found


def _best(found: List[Tap], name: str) -> Tap:
    """Of the modules that return a feature: the one that feature_info names or its parts, the outermost, and of those
    the last to return a stage (its activation), the first to return the pooled feature (before dropout)."""
    named = [tap for tap in found if tap.module == name or tap.module.startswith(f'{name}.')] or found
    depth = min(tap.module.count('.') for tap in named)
    outermost = [tap for tap in named if tap.module.count('.') == depth]
    return outermost[0 if name == POOLED else -1]._replace(name=name)


def named_taps(model: nn.Module, names: Sequence[str], input_size: Optional[Sequence[int]] = None) -> List[Tap]:
    """Taps by name: modules of any nn.Module, stages of a timm model as in its feature_info, 'pooled' its pooled feature.

    A stage is what forward_intermediates returns for it. A container (nn.Sequential) is tapped at its last block. Where a feature has its channels is followed from the layers
    that made it: (B, C, L) behind a Conv1d, (B, N, C) or (B, H, W, C) behind a linear map. Where they made nothing,
    (B, N, C) are tokens and (B, C, ...) all else.

    Raises:
        ValueError: A module does not exist, does not run, or returns no tensor.
    """
    modules = dict(model.named_modules())
    stages = known_stages(model)
    paths = {}
    for name in names:
        if name in stages or name == POOLED and name not in modules:
            continue
        if not name or name not in modules:
            raise ValueError(f"tap '{name}' is no module of {type(model).__name__}; it has for example "
                             f"{', '.join([*stages, *_examples(model)][:8])}.")
        path = name
        while isinstance(modules[path], nn.Sequential) and len(modules[path]):
            path = f'{path}.{list(modules[path]._modules)[-1]}'
        paths[name] = path

    def run(x: torch.Tensor) -> Dict[str, Tuple[Any, Optional[int]]]:
        seen = {}
        with ChannelAxes() as axes:
            for call in _calls(model, lambda: model(x))[1]:
                axis = axes.axis(call.out) if isinstance(call.out, torch.Tensor) else None
                seen.setdefault(call.module, (call.out, axis))
        return seen

    seen = run_probe(model, input_size, run) if paths else {}
    found = {}
    if any(name not in paths for name in names):
        indices = sorted({stages[name] for name in names if name in stages})
        found = {tap.name: tap for tap in _find(model, indices or stage_indices(model, 1), input_size)}
    taps = []
    for name in names:
        if name not in paths:
            taps.append(found[name])
            continue
        out, axis = seen.get(paths[name], (None, None))
        if not isinstance(out, torch.Tensor) or out.ndim < 2:
            raise ValueError(f"tap '{name}' of {type(model).__name__} did not return a tensor (B, ...) in a forward.")
        taps.append(Tap(name, paths[name], out.shape[axis], -1 if axis == out.ndim - 1 and axis > 1 else axis, 0))
    return taps


def tap_shapes(
        model: nn.Module,
        taps: Sequence[Tap],
        input_size: Optional[Sequence[int]] = None,
) -> List[Tuple[int, ...]]:
    """(T, C, ...) of every tap's feature of one image, by a probe."""
    recorder = Recorder(model, taps, training_only=False, compiled=False)

    def run(x: torch.Tensor) -> List[Tuple[int, ...]]:
        model(x)
        folded = [fold_feature(feature, feature.shape[0], tap.channel_axis, tap.prefix_tokens)
                  for tap, feature in zip(taps, recorder.take(x))]
        return [(f.shape[0], *f.shape[2:]) for f in folded]

    try:
        return run_probe(model, input_size, run)
    finally:
        recorder.close()


def _examples(model: nn.Module) -> List[str]:
    return [name for name, module in model.named_modules() if name.count('.') < 2 and name][:8]


# ---- reading functionally, where the caller owns the model

class FeatureReader:
    """Reads logits, stage features and the pooled feature of a timm model in one functional pass, no hooks.

    Safe under torch.compile and gradient checkpointing together.

    Args:
        model: timm model, spiking or not.
        taps: How many of the last stages, the pooled feature besides; or the names of stages as in model.feature_info,
            and 'pooled'.
        input_size: (C, H, W) of the probe image that tells the channels.

    Raises:
        ValueError: A stage does not exist, or the model has none to find.
    """

    def __init__(
            self,
            model: nn.Module,
            taps: Union[int, Sequence[str]] = 4,
            input_size: Optional[Sequence[int]] = None,
    ):
        if isinstance(taps, int):
            if taps < 1:
                raise ValueError(f'taps={taps}: at least one stage must be tapped.')
            self.indices = stage_indices(model, taps)
            self.pooled = True
            self.names = stage_names(model, self.indices) + [POOLED]
        else:
            self.names = [taps] if isinstance(taps, str) else list(taps)
            self.indices = sorted(set(_named_indices(model, self.names)))
            self.pooled = POOLED in self.names
        read = stage_names(model, self.indices) + [POOLED] * self.pooled
        self.order = [read.index(name) for name in self.names]  # of what is read: names may come in any, or twice

        def run(x: torch.Tensor) -> List[Tuple[int, ...]]:
            _, stages, pooled = _references(model, self.indices, x)
            shapes = [tuple(f.shape) for f in stages] + [tuple(pooled.shape)] * self.pooled
            return [shapes[i] for i in self.order]

        self.shapes = run_probe(model, input_size, run)  # (T, C, ...) of the one image's features

    @property
    def channels(self) -> List[int]:
        """Channels of every feature."""
        return [shape[1] for shape in self.shapes]

    def keep(self, stages: Sequence[int]) -> None:
        """Read only these of the stages, by their positions; the pooled feature stays."""
        kept = [*stages, *range(len(self.indices), len(self.names))]
        self.indices = [self.indices[i] for i in stages]
        self.names, self.shapes = [self.names[i] for i in kept], [self.shapes[i] for i in kept]
        self.order = list(range(len(kept)))

    def __call__(self, model: nn.Module, x: torch.Tensor) -> Tuple[torch.Tensor, List[torch.Tensor]]:
        """One forward.

        Returns:
            Logits per step (T, B, K) and features, each (T, B, C, ...); T = 1 for a network without time.
        """
        per_step = _per_step(model)
        final, stages = _stages(model, self.indices, x)
        features = stages + [model.forward_head(final, pre_logits=True, **per_step)] * self.pooled
        features = [features[i] for i in self.order]
        logits = model.forward_head(final, **per_step)
        return (logits, features) if per_step else (logits.unsqueeze(0), [f.unsqueeze(0) for f in features])


# ---- reading by hooks, in somebody else's loop

def guard_on_hooks() -> None:
    """Let torch.compile tell a model with hooks from its twin without.

    By default it takes a graph that it made of one for the other, whose taps then never fire (or fire in its place).
    """
    if torch._dynamo.config.skip_nnmodule_hook_guards:
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        torch._dynamo.reset()  # graphs from before do not check


class _Hook:
    """Forward hook that tells a recorder.

    A copy of the model, by deepcopy or pickle, has a copy of the hook, which tells the recorder's copy. That one
    records only if whoever owns the recorder was copied along with the model.
    """

    def __init__(self, recorder: Optional['Recorder'] = None, key: Any = None):
        self.recorder = recorder
        self.key = key
        self.handle: Optional[RemovableHandle] = None

    def __call__(self, module: nn.Module, args: Tuple, kwargs: Dict, out: Any) -> None:
        if self.recorder is not None:
            self.recorder.saw(self.key, out)

    def added(self, handle: RemovableHandle) -> None:
        """Keep the handle here as well: its copy removes the hook's copy."""
        self.handle = handle
        self.recorder.handles.append(handle)

    def __setstate__(self, state: Dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.recorder is not None:
            self.recorder.handles.append(self.handle)


class _PreHook(_Hook):
    """Forward pre-hook on the whole model: a call begins."""

    def __getstate__(self) -> Dict[str, Any]:
        return {**self.__dict__, 'model': getattr(self.recorder, 'model', None)}  # the one that is being copied

    def __setstate__(self, state: Dict[str, Any]) -> None:
        model = state.pop('model')
        super().__setstate__(state)
        if self.recorder is not None:
            self.recorder.model = model

    def __call__(self, module: nn.Module, args: Tuple, kwargs: Dict) -> None:
        if self.recorder is not None:
            self.recorder.begin(args, kwargs)


class _InputHook(_Hook):
    """Forward pre-hook on a tapped module: its first argument."""

    def __call__(self, module: nn.Module, args: Tuple, kwargs: Dict) -> None:
        if self.recorder is not None:
            self.recorder.saw(self.key, args[0])


class _Record:
    """What one forward showed: the input it was called with, and what went out of, or into, the tapped modules."""

    def __init__(self, inputs: Any, training: bool):
        self.training = training
        self.without_gradients: Set[Tuple[str, bool]] = set()  # places that ran so inside a call with gradients
        self.inputs = [(x, _version(x)) for x in inputs if isinstance(x, torch.Tensor)]
        self.seen: Dict[Tuple[str, bool], List[Any]] = {}  # by place, call by call

    def has(self, tap: Tap) -> bool:
        return all(len(self.seen.get(part.place, ())) > part.nth for part in tap.parts or (tap,))

    def tensor(self, tap: Tap) -> torch.Tensor:
        return _at(self.seen[tap.place][tap.nth], tap.path)

    def is_of(self, x: torch.Tensor) -> bool:
        """Whether this was the call on x, or on an equal tensor; not if x was changed in place since."""
        for seen, version in self.inputs:
            if version != _version(seen):
                continue
            if seen is x:
                return True
            if (seen.shape, seen.dtype, seen.device) == (x.shape, x.dtype, x.device) and torch.equal(seen, x):
                return True
        return False


def _version(x: torch.Tensor) -> int:
    return 0 if x.is_inference() else x._version


class Recorder:
    """Records the taps of a model's forward calls, from hooks on the taps and on the model as a whole.

    Only what runs inside a call of the model is recorded, so that a recomputation in the backward of a checkpointed
    block is not. With `training_only`, calls in evaluation mode or without gradients are not either. `take(x)` returns
    the features of the call on x and forgets all records. At most two calls are held, the first since the last take
    and the newest, so that a forgotten take keeps no more than that alive. Nothing is recorded while `enabled` is off.

    A copy made together with the model is attached to the model's copy, and off until it is enabled; a copy alone has
    no model.

    Args:
        model: Model to hook.
        taps: Where.
        training_only: Whether to record calls in training mode with gradients on only.
        compiled: Whether the model may be compiled while it is hooked, for which dynamo's guards on hooks are turned
            on, for the whole process.
    """

    def __init__(
            self,
            model: nn.Module,
            taps: Sequence[Tap],
            training_only: bool = True,
            compiled: bool = True,
    ):
        self.model = model
        self.taps = list(taps)
        self.training_only = training_only
        self.enabled = True
        if compiled:
            guard_on_hooks()
        self.records: List[_Record] = []
        self.open: Optional[_Record] = None
        self.took_training = False  # whether what was taken last was a training step
        self.handles: List[RemovableHandle] = []
        modules = dict(model.named_modules())
        hook: _Hook = _PreHook(self)
        hook.added(model.register_forward_pre_hook(hook, with_kwargs=True))
        for place in dict.fromkeys(part.place for tap in self.taps for part in tap.parts or (tap,)):
            module, of_input = modules[place[0]], place[1]
            hook = _InputHook(self, place) if of_input else _Hook(self, place)
            register = module.register_forward_pre_hook if of_input else module.register_forward_hook
            hook.added(register(hook, with_kwargs=True))
        hook = _Hook(self)
        hook.added(model.register_forward_hook(hook, with_kwargs=True, always_call=True))

    @property
    def timesteps(self) -> int:
        """T of the model, or of the one that this copy's original is on."""
        return self._timesteps if self.model is None else getattr(self.model, 'timesteps', 1)

    def begin(self, args: Tuple, kwargs: Dict) -> None:
        if not self.enabled:
            self.open = None
            return
        training = self.model.training and torch.is_grad_enabled()
        self.open = None if self.training_only and not training else _Record((*args, *kwargs.values()), training)

    def saw(self, place: Optional[Tuple[str, bool]], out: Any) -> None:
        record = self.open
        if record is None:
            return
        if place is not None:
            record.seen.setdefault(place, []).append(out)
            if record.training and not torch.is_grad_enabled():
                record.without_gradients.add(place)
            return
        self.open = None  # the model's own hook: the call has ended
        if out is not None:
            self.records = self.records[:1] + [record]

    def take(self, x: torch.Tensor) -> List[torch.Tensor]:
        """Features of the call on x, one (T * B, ...) tensor per tap.

        Raises:
            RuntimeError: The hooks were removed, no call on x was recorded, or a tap did not run in it, or ran without
                gradients inside a call with gradients.
        """
        self.check_attached()
        records, self.records = self.records, []
        if not records:
            raise RuntimeError(
                f'no forward of {type(self.model).__name__} was recorded since the last call: run student(x) in '
                f'training mode with gradients on (and call the model itself, not its methods) before the loss.')
        for record in reversed(records):  # of two calls on the same images the newest
            if record.is_of(x):
                missing = [tap.name for tap in self.taps if not record.has(tap)]
                if missing:
                    raise RuntimeError(f'taps did not run in the forward of {type(self.model).__name__}: '
                                       f'{", ".join(missing)}.')
                self.took_training = record.training
                features = [self._feature(tap, record) for tap in self.taps]
                self._check_gradients(record, features)
                return features
        raise RuntimeError(
            f'the recorded forward of {type(self.model).__name__} was not on this input: call the loss on the tensor '
            f'that the student saw (student(x), then sscl(x)), unchanged; teacher_input=... is for a teacher that sees '
            f'another.')

    def check_attached(self) -> None:
        """Raise where there is no model to record.

        Raises:
            RuntimeError: The hooks were removed, or this is a copy made without its model.
        """
        if self.model is None or not self.handles:
            raise RuntimeError('the taps were removed (close()) or belong to a copy that was made without its model; '
                               'build a new SSCLLoss to attach again.')

    def _check_gradients(self, record: _Record, features: Sequence[torch.Tensor]) -> None:
        """A tap inside a reentrantly checkpointed region is a tensor that nothing can be learned from."""
        lost = [tap.name for tap, feature in zip(self.taps, features) if not feature.requires_grad
                and any(part.place in record.without_gradients for part in tap.parts or (tap,))]
        if lost:
            raise RuntimeError(
                f'{", ".join(lost)} of {type(self.model).__name__} ran without gradients, as under reentrant '
                f'checkpointing or no_grad, so the loss could not train it: use checkpoint(..., use_reentrant=False), '
                f'in timm timm.layers.set_reentrant_ckpt(False), or tap other modules.')

    def _feature(self, tap: Tap, record: _Record) -> torch.Tensor:
        if tap.call is not None:
            with self.model.time_folded() if _is_spiking(self.model) else nullcontext():
                return self.model.get_submodule(tap.call.module)(record.tensor(tap), *tap.call.args, **tap.call.kwargs)
        if not tap.through_head:
            return record.tensor(tap)
        parts = [_part(part, record.tensor(part)) for part in tap.parts]
        pooled = self.model.forward_head(
            parts if tap.head_takes_list else parts[0], pre_logits=True, **_per_step(self.model))
        return pooled.flatten(0, 1) if _is_spiking(self.model) else pooled

    def close(self) -> None:
        """Remove the hooks and drop what they recorded."""
        for handle in self.handles:
            handle.remove()
        self.handles, self.records, self.open = [], [], None

    def __getstate__(self) -> Dict[str, Any]:
        return dict(taps=self.taps, training_only=self.training_only, timesteps=self.timesteps)

    def __setstate__(self, state: Dict[str, Any]) -> None:
        # the model's hooks, where they are copied too, say which the copy's is
        self.model, self.enabled, self.handles = None, False, []
        self.records, self.open, self.took_training = [], None, False
        self.taps, self.training_only, self._timesteps = state['taps'], state['training_only'], state['timesteps']


def _part(part: Tap, out: torch.Tensor) -> torch.Tensor:
    """A module's output in the shape in which forward_head takes it."""
    if part.channel_axis == -1:
        out = out[:, part.prefix_tokens:].movedim(-1, 1) if part.prefix_tokens else out.movedim(-1, 1)
    return out.flatten(2) if part.part_ndim == 3 and out.ndim > 3 else out


def _detached(taps: Sequence[Tap], training_only: bool) -> Recorder:
    """A recorder without a model: what pickles of version 0.1.0 hold."""
    recorder = Recorder.__new__(Recorder)
    recorder.__setstate__(dict(taps=list(taps), training_only=training_only, timesteps=1))
    return recorder
