"""fold_gains: fold the input gains and output scales of neurons into the weights around them, for inference."""
import logging
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from timm_sscl.features.channel_axis import layer_axis, moved_axis
from timm_sscl.neurons import SpikingNeuron
from .model import SpikingModule
from timm_sscl.untouched import all_or_nothing, untouched

__all__ = ['fold_gains', 'Folded']

_logger = logging.getLogger(__name__)

# function -> positions of weight and bias among its arguments; its output scales with both
_AFFINE = {'conv1d': (1, 2), 'conv2d': (1, 2), 'conv3d': (1, 2), 'linear': (1, 2), 'batch_norm': (3, 4),
           'layer_norm': (2, 3), 'group_norm': (2, 3)}
_LINEAR = {'conv1d', 'conv2d', 'conv3d', 'linear'}
_KEYWORDS = {'weight', 'bias'}
_RESHAPES = {'permute', 'transpose', 'reshape', 'view', 'flatten', 'unflatten', 'contiguous', 'movedim', 'squeeze',
             'unsqueeze'}
_POOLS = {'max_pool2d', 'avg_pool2d', 'adaptive_avg_pool2d', 'adaptive_max_pool2d'}  # commute with a positive scale


class Folded(NamedTuple):
    """Result of folding one factor of one neuron layer."""
    name: str  # name of the neuron layer
    factor: str  # 'gain' or 'scale'
    into: str  # parameters that took the factor, or the reason why it stays
    done: bool


class _Call(NamedTuple):
    func: Callable
    name: str  # name of the function
    args: Tuple[Any, ...]
    kwargs: Dict[str, Any]
    out: Any

    def parameter(self, what: str) -> Any:
        """Return the weight or bias argument of the call."""
        position = _AFFINE[self.name][what == 'bias']
        return self.kwargs.get(what, self.args[position] if len(self.args) > position else None)


class _Trace(TorchFunctionMode):
    """Function mode that records one forward as a graph: which call made each tensor and which calls used it."""

    def __init__(self, model: SpikingModule):
        super().__init__()
        self.made: Dict[int, _Call] = {}
        self.taken: Dict[int, List[Any]] = {}
        self.neurons: Dict[str, List[Tuple[torch.Tensor, torch.Tensor]]] = {}
        self.inside = 0  # depth of running neuron forwards
        for name, lif in model.neurons().items():
            lif.register_forward_pre_hook(self._enter)
            lif.register_forward_hook(self._leave(name))

    def _enter(self, lif: SpikingNeuron, args: Tuple[torch.Tensor]) -> None:
        self.inside += 1

    def _leave(self, name: str) -> Callable:
        def leave(lif, args, out):
            self.inside -= 1
            self.taken.setdefault(id(args[0]), []).append(name)
            self.neurons.setdefault(name, []).append((args[0], out))
        return leave

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.inside or not any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(out)):
            return out
        # keeps its tensors alive, so that ids stay unique
        call = _Call(func, getattr(func, '__name__', ''), args, kwargs, out)
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor):
                self.taken.setdefault(id(leaf), []).append(call)
        if isinstance(out, torch.Tensor):
            self.made[id(out)] = call
        return out

    def unscaled(self, weight: Any) -> Any:
        """Return the parameter behind a norm's scale if the scale is a constant multiple of it (tdBN), else the scale
        itself.
        """
        call = self.made.get(id(weight))
        return call.args[0] if call is not None and call.name == 'mul' and isinstance(call.args[1], float) else weight


@all_or_nothing(parameters=True)
@torch.no_grad()
def fold_gains(model: SpikingModule, images: torch.Tensor) -> SpikingModule:
    """Fold gains and scales of neuron layers into the parameters around them, in place, where the result is the same.

    A gain is folded into weight and bias of the norm, convolution or linear layer before the neuron, if nothing else
    uses its output. A scale is folded into the weights of the convolutions or linear layers after the neuron, if
    nothing else uses the spikes; pooling may lie between. A scale before a residual sum stays in the neuron. Outputs
    are equal up to rounding.

    Args:
        model: Spiking model, calibrated or converted from an ANN.
        images: A batch in the model's input format; one image suffices. One forward on it determines the order of
            layers.

    Returns:
        The model itself. `model.spiking_report().folds` has one Folded per factor.
    """
    with untouched(model), _Trace(model) as trace:
        model(images)
    parameters = {id(p): name for name, p in model.named_parameters()}
    result = []
    for name, lif in model.neurons().items():
        for factor, fold in (('gain', _fold_gain), ('scale', _fold_scale)):
            value = getattr(lif, factor)
            if value is None:
                continue
            calls = trace.neurons.get(name, [])
            into, why = fold(trace, parameters, calls[0], value) if len(calls) == 1 else (
                [], f'runs {len(calls)} times in a forward')
            if into:
                setattr(lif, factor, None)
            result.append(Folded(name, factor, ', '.join(into) or f'stays: {why}', bool(into)))
    done = sum(folded.done for folded in result)
    _logger.info(f'{type(model).__name__}: {done} of {len(result)} gains and scales folded into the weights.')
    model._folds = result
    return model


_Fold = Tuple[List[str], str]  # (parameters that took the factor, '') or ([], reason)


def _fold_gain(trace: _Trace, parameters: Dict[int, str], call: Tuple[torch.Tensor, torch.Tensor], gain) -> _Fold:
    """Fold a gain into the layer that computes the neuron's input."""
    x = call[0]
    while True:
        if len(trace.taken[id(x)]) != 1:
            return [], 'others take its input too'
        made = trace.made.get(id(x))
        if made is None or made.name not in _RESHAPES or gain.numel() > 1:
            break
        x = made.args[0]
    if made is None or made.name not in _AFFINE:
        return [], f'its input comes from {made.name if made else "outside"}'
    weight, bias = trace.unscaled(made.parameter('weight')), made.parameter('bias')
    taken = [p for p in (weight, bias) if p is not None]
    if weight is None or not all(id(p) in parameters and len(trace.taken[id(p)]) == 1 for p in taken):
        return [], 'its input comes from parameters that are shared, computed or none'
    if gain.numel() not in (1, len(weight)) or _axis(gain, x) not in (None, layer_axis(made.name, made.args, x.ndim)):
        return [], 'its channels are not those of the map before it'
    for p in taken:
        p.mul_(gain.to(p).view(-1, *(1,) * (p.ndim - 1)))
    return [parameters[id(p)] for p in taken], ''


def _fold_scale(trace: _Trace, parameters: Dict[int, str], call: Tuple[torch.Tensor, torch.Tensor], scale) -> _Fold:
    """Fold a scale into the layers that use the neuron's spikes."""
    weights, why = _takers(trace, call[1], _axis(scale, call[1]))
    if why:
        return [], why
    for taker in weights:
        weight = taker.parameter('weight')
        if id(weight) not in parameters or len(trace.taken[id(weight)]) != 1:
            return [], 'parameters after it are shared or computed'
        if scale.numel() > 1 and scale.numel() != weight.shape[1]:
            return [], 'its channels are not those of the map after it'
    for taker in weights:
        weight = taker.parameter('weight')
        weight.mul_(scale.to(weight).view(1, -1, *(1,) * (weight.ndim - 2)) if scale.numel() > 1 else scale.to(weight))
    return [parameters[id(taker.parameter('weight'))] for taker in weights], ''


def _axis(factor: torch.Tensor, x: torch.Tensor) -> Optional[int]:
    """Return the axis of x along which a factor varies; None if it is one number."""
    return next((x.ndim - factor.ndim + i for i, n in enumerate(factor.shape) if n > 1), None)


def _takers(
        trace: _Trace,
        spikes: torch.Tensor,
        axis: Optional[int],
) -> Tuple[List[_Call], Optional[str]]:
    """Return the linear layers that use spikes along their channels, directly or after pooling and reshaping; or a
    reason.

    Args:
        trace: The forward.
        spikes: Output of a neuron.
        axis: Axis of the spikes along which their scale varies; None if it is one number.

    Returns:
        (calls, None), or ([], reason) if something else uses the spikes.
    """
    found, pending = [], [(spikes, axis)]
    while pending:
        tensor, axis = pending.pop()
        takers = trace.taken.get(id(tensor), [])
        if not takers:
            return [], 'nothing takes its spikes'
        for call in takers:
            name = call.name if isinstance(call, _Call) else 'a neuron'
            if name in _LINEAR | _POOLS and axis not in (None, layer_axis(name, call.args, tensor.ndim)):
                return [], f'{name} takes its spikes along another axis than its channels'
            if name in _LINEAR and call.args[0] is tensor:
                found.append(call)
            elif name in _POOLS and isinstance(call.out, torch.Tensor):
                pending.append((call.out, axis))
            elif name in _RESHAPES and isinstance(call.out, torch.Tensor):
                moved = None if axis is None else moved_axis(call.func, tensor, axis, call.args, call.kwargs)
                if axis is not None and moved is None:
                    return [], f'{name} takes its spikes and parts their channels'
                pending.append((call.out, moved))
            else:
                return [], f'{name} takes its spikes'
    return found, None
