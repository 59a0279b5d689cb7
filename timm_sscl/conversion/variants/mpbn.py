"""MPBN (Guo et al. 2023): a batch norm between a neuron's potential and its threshold."""
from dataclasses import dataclass
from typing import Any, Iterator, List, Tuple, cast

import torch
import torch.nn as nn
from torch.nn.modules.batchnorm import _BatchNorm

from timm_sscl.class_swap import Mixin, mix_in, take_out
from timm_sscl.conversion.over_time.channels import find_channels
from timm_sscl.knobs import knob
from timm_sscl.neurons import LIF, neuron_class, spike
from timm_sscl.neurons.kernels.recursion import membrane_dtype
from timm_sscl.neurons.kernels.scan import outputs
from timm_sscl.neurons.kernels.settings_view import SettingsView

from .base import Variant, VariantSettings
from .batch_norms import NormRecord
from .registry import register_variant

__all__ = ['NormalisedNeuron', 'MembraneBatchNorm', 'MPBN', 'fold_threshold']

_CHILD = 'membrane_norm'


class MembraneBatchNorm(_BatchNorm):
    """Batch norm of a potential (B, ...) with channels on any axis.

    Args:
        num_features: Number of channels.
        axis: Channel axis, counted from the last.
        options: Further arguments of nn.BatchNorm2d.
    """

    def __init__(self, num_features: int, axis: int, **options: Any):
        super().__init__(num_features, **options)
        self.axis = axis

    def _check_input_dim(self, input: torch.Tensor) -> None:
        pass

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        return super().forward(u.movedim(self.axis, 1)).movedim(1, self.axis)


class _OwnSpike(SettingsView):
    """A neuron's settings whose `spike` is the neuron's `fire`."""

    def __init__(self, neuron: Any):
        super().__init__(neuron.settings)
        self.neuron = neuron

    def spike(self, u: torch.Tensor, v_threshold: Any) -> torch.Tensor:
        return self.neuron.fire(u, v_threshold)


class _OwnFire(Mixin):
    """Mixin for a neuron whose step calls its settings' `spike` once, such as the LIF, to compute it by `fire`."""

    def fire(self, u: torch.Tensor, v_threshold: Any) -> torch.Tensor:
        """Return the spikes of a potential (B, ...)."""
        raise NotImplementedError

    def run(self, x: torch.Tensor, folded: torch.Tensor) -> torch.Tensor:
        step = cast(Any, type(self)).step  # the neuron's
        state = self.start(x[0].to(membrane_dtype(x.dtype)))
        stepped = outputs(x, self.gain, state, self.constants(), step, _OwnSpike(self))
        return torch.stack([output.to(x.dtype) for output in stepped])


class NormalisedNeuron(_OwnFire):
    """Mixin for a neuron with a batch norm of its potential.

        spike = Theta(norm(u) - v_threshold)        the reset applies to u itself

    One norm serves all timesteps. In training, every timestep is normalised by its own batch and updates the running
    statistics, T times per forward. The surrogate is evaluated at the normalised potential.
    """
    membrane_norm: MembraneBatchNorm

    def fire(self, u: torch.Tensor, v_threshold: Any) -> torch.Tensor:
        norm = self.membrane_norm
        # potentials of a half precision model are float32, its norm's parameters are not
        return spike(norm(u.to(norm.weight.dtype)).to(u.dtype), v_threshold, self.surrogate_now())

    def surrogate_now(self) -> Any:
        """Return the surrogate at the current progress of the training."""
        progress, surrogate = self._buffers.get('progress'), self.settings.surrogate_function
        return surrogate if progress is None else lambda u, v: surrogate(u, v, progress=progress)


class FoldedThreshold(_OwnFire):
    """Mixin for a neuron whose norm was folded: it fires where fold_sign * u >= fold_threshold, both per channel.

    The reset is the neuron's own. It has no gradient.
    """
    fold_sign: torch.Tensor
    fold_threshold: torch.Tensor

    def fire(self, u: torch.Tensor, v_threshold: Any) -> torch.Tensor:
        if self.training:
            raise RuntimeError(f'{type(self).__name__}: its norm was folded into thresholds (fold_norms), which cannot '
                               f'be trained; use model.eval(), or the model before the fold.')
        return (self.fold_sign.to(u.dtype) * u >= self.fold_threshold.to(u.dtype)).to(u.dtype)


def fold_threshold(neuron: Any) -> None:
    """Replace the norm of a NormalisedNeuron by thresholds per channel, in place, for inference.

    BN(u) >= theta is u >= mean + (theta - bias) * sqrt(var + eps) / weight for a positive weight, u <= it for a
    negative one, and constant for 0.
    """
    norm = neuron.membrane_norm
    shape = norm.num_features, *(1,) * (-norm.axis - 1)
    weight, bias, mean, var = (t.detach().double() for t in (
        norm.weight, norm.bias, norm.running_mean, norm.running_var))
    missing = neuron.threshold() - bias
    threshold = weight.sign() * (mean + missing * (var + norm.eps).sqrt() / weight)
    constant = torch.where(missing <= 0, -torch.inf, torch.inf).to(threshold)
    threshold = torch.where(weight == 0, constant, threshold)
    del neuron._modules[_CHILD]
    take_out(neuron, NormalisedNeuron)
    mix_in(neuron, FoldedThreshold)
    for name, value in (('fold_sign', weight.sign()), ('fold_threshold', threshold)):
        neuron.register_buffer(name, value.view(shape).to(norm.weight.dtype))


@register_variant('norm', 'mpbn')
class MPBN(Variant):
    """Add a batch norm before the threshold of every neuron. The model's own norms stay.

    A probe finds the channel axis of each neuron. The authors train LIF neurons with a decay factor of 0.25, a hard
    reset, a threshold of 0.5 and the surrogate 'dspike'. The recursion runs without the neurons' fast kernels.
    """
    changes_state = True

    @dataclass(frozen=True)
    class Settings(VariantSettings):
        eps: float = knob(1e-5, 'added to the variance')
        momentum: float = knob(.1, 'share of a step\'s batch in the running statistics')

    def check(self, model: nn.Module, settings: Any) -> None:
        if not issubclass(neuron_class(settings.neuron), LIF):
            raise ValueError(f"{self}: normalises the potential of a LIF; neuron='{settings.neuron}' is none.")

    def apply(self, model: nn.Module, settings: Any) -> None:
        new = {name: neuron for name, neuron in model.neurons().items() if not isinstance(neuron, NormalisedNeuron)}
        like = next(model.parameters())
        for name, shape in (find_channels(model, new, str(self)) if new else {}).items():
            norm = MembraneBatchNorm(shape[0], -len(shape), device=like.device, dtype=like.dtype)
            mix_in(new[name], NormalisedNeuron)
            new[name].add_module(_CHILD, norm.train(new[name].training))
        for _, neuron in self._changed(model):
            neuron.membrane_norm.eps, neuron.membrane_norm.momentum = self.settings.eps, self.settings.momentum

    def _changed(self, model: nn.Module) -> Iterator[Tuple[str, nn.Module]]:
        return ((name, neuron) for name, neuron in model.neurons().items() if isinstance(neuron, NormalisedNeuron))

    def remove(self, model: nn.Module) -> None:
        for _, neuron in list(self._changed(model)):
            del neuron._modules[_CHILD]
            take_out(neuron, NormalisedNeuron)

    def own_state(self, model: nn.Module) -> List[str]:
        return [f'{name}.{_CHILD}.{key}' for name, neuron in self._changed(model)
                for key in neuron.membrane_norm.state_dict()]

    def records(self, model: nn.Module) -> List[NormRecord]:
        return [NormRecord(f'{name}.{_CHILD}', 'nothing', 'MPBN', 1.) for name, _ in self._changed(model)]

    def summary(self, model: nn.Module) -> str:
        return f'{len(self.records(model))} MPBN in front of the thresholds'
