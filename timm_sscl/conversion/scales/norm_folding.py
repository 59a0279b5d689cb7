"""fold_norms: fold norms in inference into the weights before them, per-step gains and thresholds."""
import copy
import logging
from dataclasses import replace
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch
import torch.nn as nn
from torch.nn.modules.batchnorm import _BatchNorm

from timm_sscl.features.channel_axis import layer_axis
from timm_sscl.untouched import all_or_nothing, untouched

from ..over_time.folded import FoldedNorm, make_stepwise, runs_own_map
from ..finding.forward_trace import LINEAR, Call, ForwardTrace
from .gain_folding import Folded
from ..model import SpikingModule
from ..from_ann.pool_first import commutes_with_pooling
from ..variants.batch_norms import BatchNormOverTime, batch_norms
from ..variants.mpbn import NormalisedNeuron, fold_threshold

__all__ = ['fold_norms']

_logger = logging.getLogger(__name__)


@all_or_nothing(parameters=True)
@torch.no_grad()
def fold_norms(model: SpikingModule, images: torch.Tensor) -> SpikingModule:
    """Fold batch norms and norm variants for inference, in place, where the result is the same.

    In evaluation mode a batch norm is one linear map per channel. If it takes the output of a convolution or linear
    layer that nothing else takes, it is folded into that layer's weight and bias:

    - The model's own batch norms and tdBN: one map for all timesteps.
    - TEBN: one map, and the factor of every timestep becomes a per-step gain of the neuron behind the norm. If
      something else is behind it, such as a residual sum, the layer gets one map per timestep.
    - BNTT, TAB and other norms that differ between timesteps: the layer gets one weight and bias per timestep, as many
      as the norm has. `set_timesteps` uses the first ones, and repeats the last for more.
    - MPBN: every neuron gets thresholds per channel. With a negative scale it fires below its threshold. The reset
      stays as it was. The model's own batch norms are folded as above.

    Other norms stay, and work as before. Outputs are equal up to rounding. Apply `fold_gains` before: it folds the
    gains into the norms. A folded model has other parameters, so that other checkpoints do not load; save the whole
    model (`torch.save(model, file)`). MPBN's neurons cannot be trained after it.

    Args:
        model: Spiking model, trained: running statistics are used.
        images: A batch in the model's input format; one image suffices. One forward on it determines the order of
            layers.

    Returns:
        The model itself. `model.spiking_report().folds` has one Folded per norm, with the reason if it stays.

    Raises:
        ValueError: The model is not spiking.
    """
    if not isinstance(model, SpikingModule):
        raise ValueError(f'{type(model).__name__} does not spike; call convert_to_spiking(model) first.')
    with untouched(model), ForwardTrace(model) as trace:
        model(images)
    fold = _Fold(model, trace)
    foldable = {id(norm) for _, norm in batch_norms(model)}
    result = []
    for name, norm in [(name, module) for name, module in model.named_modules() if isinstance(module, _BatchNorm)]:
        if id(norm) in foldable:
            into, why = fold(norm)
        elif name.rpartition('.')[0] in model.neurons():
            continue  # inside a neuron
        else:
            into, why = '', f'{type(norm).__name__} has no scale or a forward of its own'
        result.append(Folded(name, 'norm', into or f'stays: {why}', bool(into)))
    for name, neuron in model.neurons().items():
        if isinstance(neuron, NormalisedNeuron):
            fold_threshold(neuron)
            result.append(Folded(name, 'threshold', f'{name}.fold_sign, {name}.fold_threshold', True))
    _drop_setting(model)
    _logger.info(f'{type(model).__name__}: {sum(folded.done for folded in result)} of {len(result)} norms folded.')
    model._folds = result
    return model


def _drop_setting(model: SpikingModule) -> None:
    """Remove the norm variant from the settings if no norm is left that it would change."""
    normalised = any(isinstance(neuron, NormalisedNeuron) for neuron in model.neurons().values())
    if model.settings.norm is not None and not normalised and not any(
            isinstance(norm, BatchNormOverTime) for _, norm in batch_norms(model)):
        model.settings = replace(model.settings, norm=None, norm_kwargs=())
        model._explicit = frozenset(key for key in model._explicit if key.partition('_kwargs.')[0] != 'norm')


class _Maps(NamedTuple):
    """What a norm is in evaluation mode: scale * x + shift, in float64."""
    scale: torch.Tensor  # (steps, C), or (1, C) if it is the same at every timestep
    shift: torch.Tensor


class _Fold:
    """Fold single norms of a model.

    Args:
        model: The model.
        trace: A forward of it.
    """

    def __init__(self, model: SpikingModule, trace: ForwardTrace):
        self.model = model
        self.trace = trace
        self.owners: Dict[int, nn.Module] = {}  # id of a weight -> its module
        for module in model.modules():
            weight = module._parameters.get('weight')
            if weight is not None:
                self.owners[id(weight)] = module
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.steps = dict(model.settings.norm_kwargs).get('steps') or model.timesteps

    def __call__(self, norm: Any) -> Tuple[str, str]:
        """Fold one norm.

        Returns:
            (names of what took it, '') or ('', reason).
        """
        calls = self.trace.norms.get(id(norm.weight), [])
        if len(calls) != 1:
            return '', f'runs {len(calls)} times in a forward'
        call, = calls
        made, why = self._layer_before(norm, call)
        if made is None:
            return '', why
        layer, neuron, factor = self.owners[id(made.parameter('weight'))], self._neuron_behind(norm, call), None
        twin = copy.deepcopy(norm).double().eval()
        name: str = getattr(norm, 'step_factor', '')
        if neuron is not None and name and commutes_with_pooling(
                self.model.get_submodule(neuron), getattr(norm, name)):
            factor = getattr(norm, name).detach().clone()
            getattr(twin, name).fill_(1)
        per_step = getattr(norm, 'per_step', False) and factor is None
        maps = _maps(twin, self.steps if per_step else 1, call.args[0].ndim)
        if maps is None:
            return '', f'{type(norm).__name__} is not linear in its input'
        if per_step and not runs_own_map(layer):
            return '', f'{type(layer).__name__} before it cannot have one map per timestep'
        into = [f'{self.names[id(layer.weight)]}', f'{self.names[id(layer.weight)].rpartition(".")[0]}.bias']
        _fold_into(layer, maps)
        if per_step:
            make_stepwise(layer, self.model.timesteps)
        if neuron is not None and factor is not None:
            self.model.get_submodule(neuron).set_step_gain(factor)
            into.append(f'{neuron}.step_gain')
        self._replace(norm)
        return ', '.join(into), ''

    def _layer_before(self, norm: Any, call: Call) -> Tuple[Optional[Call], str]:
        """Return the call of the layer that makes the norm's input; or None and why it cannot take the norm."""
        x = call.args[0]
        if norm.running_mean is None:
            return None, 'has no running statistics'
        if len(self.trace.taken[id(x)]) != 1:
            return None, 'others take its input too'
        made = self.trace.made.get(id(x))
        if made is None or made.name not in LINEAR:
            return None, f'its input comes from {made.name if made else "a neuron"}'
        taken = [p for p in (made.parameter('weight'), made.parameter('bias')) if p is not None]
        if not all(id(p) in self.names and len(self.trace.taken[id(p)]) == 1 for p in taken):
            return None, 'its input comes from parameters that are shared or computed'
        if id(taken[0]) not in self.owners or layer_axis(made.name, made.args, x.ndim) != 1:
            return None, 'its channels are not those of the layer before it'
        return made, ''

    def _neuron_behind(self, norm: nn.Module, call: Call) -> Optional[str]:
        """Return the name of the neuron that alone takes the norm's output, and nothing else; None if there is none."""
        takers = self.trace.taken.get(id(call.out), [])
        name = takers[0] if len(takers) == 1 and isinstance(takers[0], str) else None
        return name if name is not None and len(self.trace.neurons[name]) == 1 else None

    def _replace(self, norm: nn.Module) -> None:
        """Put a FoldedNorm in a norm's place, under all its names."""
        folded = FoldedNorm.of(norm)
        for module in list(self.model.modules()):
            for child, other in module._modules.items():
                if other is norm:
                    module._modules[child] = folded


def _maps(twin: Any, steps: int, ndim: int) -> Optional[_Maps]:
    """Find what a norm in float64 and evaluation mode is by trying it at every channel and timestep; None if it is not
    linear.

    Args:
        twin: A copy of the norm.
        steps: Number of timesteps.
        ndim: Number of axes of its input.
    """
    twin.timesteps = steps
    like = torch.zeros(steps, twin.num_features, *(1,) * (ndim - 2), dtype=torch.float64, device=twin.weight.device)

    def run(value: float) -> torch.Tensor:
        x = torch.full_like(like, value)
        if isinstance(twin, BatchNormOverTime):
            return twin.normalise(x).flatten(1)
        return BatchNormOverTime.batch_norm(twin, x, twin.weight, twin.bias).flatten(1)

    shift = run(0.)
    scale = run(1.) - shift
    linear = torch.allclose(run(-2.), shift - 2 * scale, rtol=1e-9, atol=1e-9)  # float64
    return _Maps(scale, shift) if linear and scale.isfinite().all() and shift.isfinite().all() else None


def _fold_into(layer: Any, maps: _Maps) -> None:
    """Multiply a layer's output by a scale and add a shift: (steps, ...) parameters if there are several."""
    weight, bias = layer.weight.double(), 0. if layer.bias is None else layer.bias.double()
    scaled = weight * maps.scale.view(*maps.scale.shape, *(1,) * (weight.ndim - 1))
    values: List[torch.Tensor] = [scaled, maps.scale * bias + maps.shift]
    for name, value in zip(('weight', 'bias'), values):
        value = value[0] if len(value) == 1 else value
        setattr(layer, name, nn.Parameter(value.to(layer.weight.dtype), layer.weight.requires_grad))
