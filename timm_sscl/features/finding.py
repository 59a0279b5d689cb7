"""Find taps: run a model on one probe image and see which modules return the features of its stages."""
import logging
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

__all__ = ['run_probe', 'find_taps', 'named_taps', 'tap_shapes', 'module_calls', 'neuron_behind']

_logger = logging.getLogger(__name__)


# ---- finding taps by a probe

@contextmanager
def _probing(model: nn.Module) -> Iterator[None]:
    """Run a model inside in evaluation mode without gradients, with neurons that do not silence any feature.

    Each neuron returns nearly its input (see `_pass_on`) instead of spikes.
    """
    with untouched(model):
        for module in model.modules():
            if isinstance(module, SpikingNeuron):
                module.register_forward_hook(_pass_on)
        yield


def _pass_on(lif: SpikingNeuron, args: Tuple[torch.Tensor], spikes: torch.Tensor) -> torch.Tensor:
    """Return 1.01 * x + .01 instead of spikes. It is not the identity, so that a neuron's input and output differ."""
    x = args[0].repeat(lif.timesteps, *(1,) * (args[0].ndim - 1)) if lif.encodes else args[0]
    return 1.01 * x + .01


def _probe_input(model: nn.Module, size: Tuple[int, ...]) -> torch.Tensor:
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    generator = torch.Generator().manual_seed(0)  # leaves the global generator alone
    return torch.randn(1, *size, generator=generator).to(like)


def run_probe(model: nn.Module, input_size: Optional[Sequence[int]], run: Callable[[torch.Tensor], Any]) -> Any:
    """Call run(x) with a random image x of the first input size that the model accepts, and return its result.

    Raises:
        ValueError: The model runs on no size.
    """
    sizes = [tuple(input_size)] if input_size is not None else probe_sizes(model)
    for i, size in enumerate(sizes):
        try:
            with _probing(model):
                return run(_probe_input(model, size))
        except (RuntimeError, ValueError, AssertionError, IndexError, TypeError) as error:
            if i + 1 == len(sizes):
                raise ValueError(f'{type(model).__name__} does not run on a probe image of size {size}: {error}. '
                                 f'Say what it takes by input_size=(C, H, W).') from error


class _ModuleCall(NamedTuple):
    """One call of a module during a probe."""
    module: str
    nth: int
    args: Tuple[Any, ...]
    kwargs: Dict[str, Any]
    out: Any


def module_calls(model: nn.Module, run: Callable[[], Any]) -> Tuple[Any, List[_ModuleCall]]:
    """Return run() and the calls of the model's modules during it, in the order in which they finished."""
    calls: List[_ModuleCall] = []
    counts: Counter = Counter()

    def hook(name):
        def record(module, args, kwargs, out):
            calls.append(_ModuleCall(name, counts[name], args, kwargs, out))
            counts[name] += 1
        return record

    handles = [m.register_forward_hook(hook(n), with_kwargs=True) for n, m in model.named_modules() if n]
    try:
        return run(), calls
    finally:
        for handle in handles:
            handle.remove()


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape:
        return False
    row = (0,) * (a.ndim - 1)  # cheap: most candidates differ in their first row
    # tolerance: same arithmetic twice, and an untrained batch norm is the identity up to 5e-6
    return all(torch.allclose(u, v, rtol=1e-6, atol=1e-7, equal_nan=True) for u, v in ((a[row], b[row]), (a, b)))


def _layout(out: torch.Tensor, feature: torch.Tensor, prefixes: Sequence[int]) -> Optional[Tuple[int, int]]:
    """Return (channel_axis, prefix_tokens) with which a tensor equals this feature (T * B, C, ...), or None."""
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


def neuron_behind(model: nn.Module, stage: str, feature: torch.Tensor, calls: Sequence[_ModuleCall]) -> Optional[str]:
    """Return the name of the neuron that a stage's feature is read at, if the stage's output is not spikes and a neuron
    behind the stage takes it directly (residual='ms'); None if the feature is the output itself.

    Args:
        model: The model.
        stage: Name of the stage in feature_info.
        feature: Its feature (T * B, C, ...) in a probe.
        calls: Calls of the model's modules in that probe.
    """
    modules = dict(model.named_modules())
    neurons = [call for call in calls if isinstance(modules[call.module], SpikingNeuron)]
    if any(isinstance(call.out, torch.Tensor) and _same(call.out, feature) for call in neurons):
        return None
    found = next((call.module for call in neurons if not call.module.startswith(f'{stage}.')
                  and isinstance(call.args[0], torch.Tensor) and _same(call.args[0], feature)), None)
    if found is not None:
        _logger.info(f'{type(model).__name__}: the output of {stage} is not spikes; its feature is read at the neuron '
                     f'behind it, {found}.')
    return found


def find_taps(model: nn.Module, num_stages: int = 4, input_size: Optional[Sequence[int]] = None) -> List[Tap]:
    """Find taps on the last stages and on the pooled feature of a timm model by one probe.

    The probe computes the features by forward_intermediates and forward_head, runs the model's forward, and looks up
    which modules returned the same tensors. Per feature it takes the outermost module that is no nn.Sequential, since
    gradient checkpointing does not call those. If several modules return a feature (an untrained block may be the
    identity), the one named in feature_info wins. If a stage's output is not spikes and a neuron behind the stage takes
    it (residual='ms'), the tap is on that neuron. If no module returns the pooled feature, the tap computes it from the
    final feature map by forward_head.

    Args:
        model: timm model.
        num_stages: Number of stages, counted from the last.
        input_size: (C, H, W) of the probe image; by default the model's own.

    Returns:
        One Tap per stage, then the pooled one.

    Raises:
        ValueError: The model has no stages, or no module returns a feature.
    """
    return _find(model, stage_indices(model, num_stages), input_size)


def _find(model: nn.Module, indices: List[int], input_size: Optional[Sequence[int]]) -> List[Tap]:
    """Find taps on the stages with these indices, in this order, and on the pooled feature."""
    names = stage_names(model, indices) + [POOLED]

    def run(x: torch.Tensor) -> List[Optional[Tap]]:
        (final, stages, pooled), feature_calls = module_calls(model, lambda: reference_features(model, indices, x))
        _, forward_calls = module_calls(model, lambda: model(x))
        search = _Search(model, forward_calls, feature_calls)
        taps = [search.find(name, feature) for name, feature in zip(names, [*stages, pooled])]
        for i, (name, feature) in enumerate(zip(names, stages)):
            neuron = neuron_behind(model, name, feature, forward_calls)
            if neuron is not None:
                taps[i] = Tap(name, neuron, feature.shape[1], 1)
        taps[-1] = taps[-1] or search.through_head(final, pooled)
        return taps

    taps = run_probe(model, input_size, run)
    missing = [name for name, tap in zip(names, taps) if tap is None]
    if missing:
        raise ValueError(f'{type(model).__name__}: no module returns the feature of {", ".join(missing)}; '
                         f'name the modules to tap (taps=[...]).')
    return taps


class _Search:
    """Search for a feature among the module calls of one forward.

    Args:
        model: The model.
        forward_calls: Calls during the model's forward, which hooks will see.
        feature_calls: Calls during forward_intermediates and forward_head, which computed the features.
    """

    def __init__(
            self,
            model: nn.Module,
            forward_calls: Sequence[_ModuleCall],
            feature_calls: Sequence[_ModuleCall],
    ):
        # gradient checkpointing does not call an nn.Sequential
        containers = {name for name, module in model.named_modules() if isinstance(module, nn.Sequential)}
        self.forward_calls = [call for call in forward_calls if call.module not in containers]
        self.feature_calls = [call for call in feature_calls if call.module not in containers]
        self.prefixes = sorted({0, 1, getattr(model, 'num_prefix_tokens', 0) or 0})

    def find(self, name: str, feature: torch.Tensor) -> Optional[Tap]:
        """Return a tap on the feature, or None.

        The tapped tensor is the feature itself, or the input of a last call that forward_intermediates applies to it,
        or the first argument of a module.
        """
        found = self._outputs(feature)
        if found:
            return _best(found, name)
        for call in self.feature_calls:
            if any(True for _ in tensors_in([call.args[1:], call.kwargs])):
                continue  # the call depends on another tensor of the probe
            source = next((arg for arg in call.args[:1] if isinstance(arg, torch.Tensor)), None)
            layout = _layout(call.out, feature, self.prefixes) if isinstance(call.out, torch.Tensor) else None
            sources = self._outputs(source, exact=True) if source is not None and layout is not None else []
            if sources and layout is not None:
                return _best(sources, name)._replace(
                    channels=feature.shape[1], channel_axis=layout[0], prefix_tokens=layout[1],
                    call=Call(call.module, call.args[1:], call.kwargs))
        inputs = self._inputs(feature)
        return inputs[0]._replace(name=name) if inputs else None

    def through_head(self, final: Any, pooled: torch.Tensor) -> Optional[Tap]:
        """Return a tap that computes the pooled feature by forward_head from the final feature map or maps; None if not
        found.
        """
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
        for call in self.forward_calls:
            for path, tensor in tensors_in(call.out):
                layout = _layout(tensor, feature, prefixes)
                if layout is not None and (not exact or tensor.shape == feature.shape):
                    found.append(Tap('', call.module, feature.shape[1], *layout, nth=call.nth, path=path))
        return found

    def _inputs(self, feature: torch.Tensor) -> List[Tap]:
        found = []
        for call in self.forward_calls:
            if call.args and isinstance(call.args[0], torch.Tensor):
                layout = _layout(call.args[0], feature, self.prefixes)
                if layout is not None:
                    found.append(Tap('', call.module, feature.shape[1], *layout, nth=call.nth, at_input=True))
        return found


def _best(found: List[Tap], name: str) -> Tap:
    """Choose among taps on the same feature.

    Modules that feature_info names, or their children, come first; among them the outermost. Of several such modules
    the last one is taken for a stage (its activation), the first one for the pooled feature (before dropout).
    """
    named = [tap for tap in found if tap.module == name or tap.module.startswith(f'{name}.')] or found
    depth = min(tap.module.count('.') for tap in named)
    outermost = [tap for tap in named if tap.module.count('.') == depth]
    return outermost[0 if name == POOLED else -1]._replace(name=name)


def named_taps(model: nn.Module, names: Sequence[str], input_size: Optional[Sequence[int]] = None) -> List[Tap]:
    """Find taps by name: any module of an nn.Module, a stage of a timm model named as in its feature_info, or 'pooled'.

    The feature of a stage is what forward_intermediates returns. The feature of an nn.Sequential is the output of its
    last block. The channel axis follows from the layers that made the tensor: (B, C, L) after Conv1d, (B, N, C) or (B,
    H, W, C) after Linear. Without such layers, (B, N, C) is taken for tokens and any other tensor for (B, C, ...).

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
        outputs: Dict[Any, Tuple[Any, Optional[int]]] = {}
        with ChannelAxes() as axes:
            for call in module_calls(model, lambda: model(x))[1]:
                axis = axes.axis(call.out) if isinstance(call.out, torch.Tensor) else None
                outputs.setdefault(call.module, (call.out, axis))
        return outputs

    outputs = run_probe(model, input_size, run) if paths else {}
    found = {}
    if any(name not in paths for name in names):
        indices = sorted({stages[name] for name in names if name in stages})
        found = {tap.name: tap for tap in _find(model, indices or stage_indices(model, 1), input_size)}
    taps = []
    for name in names:
        if name not in paths:
            taps.append(found[name])
            continue
        out, axis = outputs.get(paths[name], (None, None))
        if not isinstance(out, torch.Tensor) or out.ndim < 2:
            raise ValueError(f"tap '{name}' of {type(model).__name__} did not return a tensor (B, ...) in a forward.")
        taps.append(Tap(name, paths[name], out.shape[axis], -1 if axis == out.ndim - 1 and axis > 1 else axis, 0))
    return taps


def tap_shapes(
        model: nn.Module,
        taps: Sequence[Tap],
        input_size: Optional[Sequence[int]] = None,
) -> List[Tuple[int, ...]]:
    """Return (T, C, ...) of every tap's feature for one image, by a probe."""
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
