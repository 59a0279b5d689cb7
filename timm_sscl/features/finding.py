"""Finding taps: one probe that tells which modules return the features of the stages."""
from collections import Counter
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch._dynamo
import torch.nn as nn

from timm_sscl.neurons import SpikingNeuron
from timm_sscl.probing import probe_sizes
from timm_sscl.untouched import untouched

from .channel_axis import ChannelAxes
from .recorder import Recorder
from .stages import POOLED, example_modules, known_stages, reference_features, stage_indices, stage_names
from .tap import Call, Tap, fold_feature, tensors_in

__all__ = ['run_probe', 'find_taps', 'named_taps', 'tap_shapes', 'module_calls']


# ---- finding taps by a probe

@contextmanager
def _probing(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradient, and neurons that all but pass their input on, so that no feature is silent."""
    with untouched(model):
        for module in model.modules():
            if isinstance(module, SpikingNeuron):
                module.register_forward_hook(_pass_on)
        yield


def _pass_on(lif: SpikingNeuron, args: Tuple[torch.Tensor], spikes: torch.Tensor) -> torch.Tensor:
    """Not the identity: what comes before and after a neuron must differ."""
    x = args[0].repeat(lif.timesteps, *(1,) * (args[0].ndim - 1)) if lif.encodes else args[0]
    return 1.01 * x + .01


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


def module_calls(model: nn.Module, run: Callable[[], Any]) -> Tuple[Any, List[_Seen]]:
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
        (final, stages, pooled), functional = module_calls(model, lambda: reference_features(model, indices, x))
        _, seen = module_calls(model, lambda: model(x))
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
            if any(True for _ in tensors_in([call.args[1:], call.kwargs])):
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
        for _, tensor in tensors_in(final):
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
            for path, tensor in tensors_in(call.out):
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
    """Taps by name: modules of any nn.Module, stages of a timm model as in its feature_info, 'pooled'.

    A stage is what forward_intermediates returns for it. A container (nn.Sequential) is tapped at its last block.
    Where a feature has its channels is followed from the layers
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
                             f"{', '.join([*stages, *example_modules(model)][:8])}.")
        path = name
        while isinstance(modules[path], nn.Sequential) and len(modules[path]):
            path = f'{path}.{list(modules[path]._modules)[-1]}'
        paths[name] = path

    def run(x: torch.Tensor) -> Dict[str, Tuple[Any, Optional[int]]]:
        seen = {}
        with ChannelAxes() as axes:
            for call in module_calls(model, lambda: model(x))[1]:
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
