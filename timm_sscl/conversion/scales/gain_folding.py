"""fold_gains: fold input gains, output scales and amplitudes of neurons into the weights around them, for inference."""
import copy
import logging
from typing import Dict, List, NamedTuple, Optional, Tuple

import torch

from timm_sscl.features.channel_axis import layer_axis, moved_axis
from timm_sscl.neurons import SpikingNeuron
from timm_sscl.untouched import all_or_nothing, untouched

from ..finding.forward_trace import AFFINE, LINEAR, NORM, POOLS, RESHAPES, Call, ForwardTrace
from ..model import SpikingModule
from ..from_ann.pool_first import commutes_with_pooling

__all__ = ['fold_gains', 'Folded']

_logger = logging.getLogger(__name__)


class Folded(NamedTuple):
    """Result of folding one factor of one neuron layer, or one norm."""
    name: str  # name of the neuron layer or norm
    factor: str  # 'gain', 'scale', 'amplitude', 'norm' or 'threshold'
    into: str  # parameters that took the factor, or the reason why it stays
    done: bool


@all_or_nothing(parameters=True)
@torch.no_grad()
def fold_gains(model: SpikingModule, images: torch.Tensor) -> SpikingModule:
    """Fold gains, scales and amplitudes of neuron layers into the parameters around them, in place, where the result is
    the same.

    A gain is folded into weight and bias of the norm, convolution or linear layer before the neuron, if nothing else
    uses its output. A scale, and the amplitude that a neuron such as 'ternary' or 'real_spike' learns, is folded into
    the weights of the convolutions or linear layers after the neuron, if nothing else uses the spikes; pooling may lie
    between, max pooling if the factor is positive. A folded amplitude is 1 afterwards. A factor before a residual sum
    stays in the neuron. Outputs are equal up to rounding.

    Args:
        model: Spiking model.
        images: A batch in the model's input format; one image suffices. One forward on it determines the order of
            layers.

    Returns:
        The model itself. `model.spiking_report().folds` has one Folded per factor.
    """
    with untouched(model), ForwardTrace(model) as trace:
        model(images)
    parameters = {id(p): name for name, p in model.named_parameters()}
    result = []
    for name, lif in model.neurons().items():
        for factor, fold in (('gain', _fold_gain), ('scale', _fold_scale), ('amplitude', _fold_scale)):
            value = _factor(lif, factor)
            if value is None:
                continue
            calls = trace.neurons.get(name, [])
            into: List[str] = []
            if factor == 'gain' and not commutes_with_pooling(lif, value):
                why = 'it pools its input, and the factor is not positive'
            elif len(calls) != 1:
                why = f'runs {len(calls)} times in a forward'
            else:
                into, why = fold(trace, parameters, calls[0], value)
            if into and factor == 'amplitude':
                value.fill_(1)  # the parameter stays, for the keys of the state dict
            elif into:
                setattr(lif, factor, None)
            result.append(Folded(name, factor, ', '.join(into) or f'stays: {why}', bool(into)))
    done = sum(folded.done for folded in result)
    _logger.info(f'{type(model).__name__}: {done} of {len(result)} gains, scales and amplitudes folded into the '
                 f'weights.')
    model._folds = result
    return model


def _factor(neuron: SpikingNeuron, factor: str) -> Optional[torch.Tensor]:
    """Return a factor of a neuron, or None if it is 1."""
    if factor != 'amplitude':
        return getattr(neuron, factor)
    amplitude = neuron._parameters.get('amplitude')
    return None if amplitude is None or bool((amplitude == 1).all()) else amplitude


_Fold = Tuple[List[str], str]  # (parameters that took the factor, '') or ([], reason)


def _fold_gain(trace: ForwardTrace, parameters: Dict[int, str], call: Tuple[torch.Tensor, torch.Tensor], gain) -> _Fold:
    """Fold a gain into the layer that computes the neuron's input."""
    x = call[0]
    while True:
        if len(trace.taken[id(x)]) != 1:
            return [], 'others take its input too'
        made = trace.made.get(id(x))
        if made is None or made.name not in RESHAPES or gain.numel() > 1:
            break
        x = made.args[0]
    if made is None or made.name not in AFFINE:
        return [], f'its input comes from {made.name if made else "outside"}'
    if made.name == NORM and not _scales_with_parameters(made):
        return [], f'the output of the {type(made.func.__self__).__name__} before it does not scale with its weight'
    weight, bias = made.parameter('weight'), made.parameter('bias')
    taken = [p for p in (weight, bias) if p is not None]
    if weight is None or not all(id(p) in parameters and len(trace.taken[id(p)]) == 1 for p in taken):
        return [], 'its input comes from parameters that are shared, computed or none'
    of_norm = made.name == NORM  # whose parameters are (C,), or (steps, C)
    axis = 1 if of_norm else layer_axis(made.name, made.args, x.ndim)
    channels = weight.shape[-1] if of_norm else len(weight)
    if gain.numel() not in (1, channels) or _axis(gain, x) not in (None, axis):
        return [], 'its channels are not those of the map before it'
    for p in taken:
        p.mul_(gain.to(p).view(-1) if of_norm else gain.to(p).view(-1, *(1,) * (p.ndim - 1)))
    return [parameters[id(p)] for p in taken], ''


def _scales_with_parameters(call: Call) -> bool:
    """Return whether the output of a norm variant is proportional to its weight and bias, by trying it."""
    norm = copy.deepcopy(call.func.__self__).double()
    x = torch.randn(norm.timesteps, *call.args[0].shape[1:2], *(1,) * (call.args[0].ndim - 2),
                    generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(norm.weight.device)
    once = norm.normalise(x)
    for p in (norm.weight, norm.bias):
        if p is not None:
            p.mul_(2)
    return torch.allclose(norm.normalise(x), 2 * once, rtol=1e-9, atol=1e-12)  # float64


def _fold_scale(
        trace: ForwardTrace,
        parameters: Dict[int, str],
        call: Tuple[torch.Tensor, torch.Tensor],
        scale: torch.Tensor,
) -> _Fold:
    """Fold a scale into the layers that use the neuron's spikes."""
    takers, why = _takers(trace, call[1], _axis(scale, call[1]), bool((scale > 0).all()))
    if why:
        return [], why
    for taker in takers:
        weight = taker.parameter('weight')
        if id(weight) not in parameters or len(trace.taken[id(weight)]) != 1:
            return [], 'parameters after it are shared or computed'
        if scale.numel() > 1 and scale.numel() != weight.shape[1] * _groups(taker):
            return [], 'its channels are not those of the map after it'
    for taker in takers:
        weight = taker.parameter('weight')
        weight.mul_(_by_input(scale.to(weight), weight, _groups(taker)) if scale.numel() > 1 else scale.to(weight))
    return [parameters[id(taker.parameter('weight'))] for taker in takers], ''


def _groups(call: Call) -> int:
    """Return the number of groups of a convolution; 1 for a linear map."""
    return call.kwargs.get('groups', call.args[6] if len(call.args) > 6 else 1)


def _by_input(factor: torch.Tensor, weight: torch.Tensor, groups: int) -> torch.Tensor:
    """Return a factor per input channel in a shape that broadcasts against the weight of a layer with groups."""
    by_group = factor.reshape(groups, 1, weight.shape[1]).expand(groups, len(weight) // groups, weight.shape[1])
    return by_group.reshape(*weight.shape[:2], *(1,) * (weight.ndim - 2))


def _axis(factor: torch.Tensor, x: torch.Tensor) -> Optional[int]:
    """Return the axis of x along which a factor varies; None if it is one number."""
    return next((x.ndim - factor.ndim + i for i, n in enumerate(factor.shape) if n > 1), None)


def _takers(
        trace: ForwardTrace,
        spikes: torch.Tensor,
        axis: Optional[int],
        positive: bool,
) -> Tuple[List[Call], Optional[str]]:
    """Return the linear layers that use spikes along their channels, directly or after pooling and reshaping; or a
    reason.

    Args:
        trace: The forward.
        spikes: Output of a neuron.
        axis: Axis of the spikes along which their scale varies; None if it is one number.
        positive: Whether the scale is positive. Max pooling commutes only with such a scale.

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
            name = call.name if isinstance(call, Call) else 'a neuron'
            if name in LINEAR | POOLS and axis not in (None, layer_axis(name, call.args, tensor.ndim)):
                return [], f'{name} takes its spikes along another axis than its channels'
            if 'max_pool' in name and not positive:
                return [], f'{name} takes its spikes, and the factor is not positive'
            if name in LINEAR and call.args[0] is tensor:
                found.append(call)
            elif name in POOLS and isinstance(call.out, torch.Tensor):
                pending.append((call.out, axis))
            elif name in RESHAPES and isinstance(call.out, torch.Tensor):
                moved = None if axis is None else moved_axis(call.func, tensor, axis, call.args, call.kwargs)
                if axis is not None and moved is None:
                    return [], f'{name} takes its spikes and parts their channels'
                pending.append((call.out, moved))
            else:
                return [], f'{name} takes its spikes'
    return found, None
