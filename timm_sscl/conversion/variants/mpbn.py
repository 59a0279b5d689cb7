"""MPBN (Guo et al. 2023): a batch norm between a neuron's potential and its threshold."""
from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, Tuple

import torch
import torch.nn as nn
from torch.nn.modules.batchnorm import _BatchNorm

from timm_sscl.class_swap import Mixin, mix_in, take_out
from timm_sscl.features.channel_axis import ChannelAxes
from timm_sscl.knobs import knob
from timm_sscl.neurons import spike
from timm_sscl.neurons.kernels.recursion import membrane_dtype
from timm_sscl.probing import Example, probe

from .base import Variant, VariantSettings
from .batch_norms import NormRecord
from .registry import register_variant

__all__ = ['NormalisedNeuron', 'MembraneBatchNorm', 'MPBN']

_CHILD = 'membrane_norm'


class MembraneBatchNorm(_BatchNorm):
    """Batch norm of a potential (B, ...) whose channels lie on any axis.

    Args:
        num_features: Number of channels.
        axis: Their axis.
        options: Further arguments of nn.BatchNorm2d.
    """

    def __init__(self, num_features: int, axis: int, **options: Any):
        super().__init__(num_features, **options)
        self.axis = axis

    def _check_input_dim(self, input: torch.Tensor) -> None:
        pass

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        return super().forward(u.movedim(self.axis, 1)).movedim(1, self.axis)


class _Normalised:
    """A neuron's settings whose `spike` normalises the potential before it compares it with the threshold."""

    def __init__(self, neuron: 'NormalisedNeuron'):
        self.settings = neuron.settings
        self.neuron = neuron

    def __getattr__(self, name: str) -> Any:
        return getattr(self.settings, name)

    def spike(self, u: torch.Tensor, v_threshold: Any) -> torch.Tensor:
        normalised = self.neuron.membrane_norm(u).to(u.dtype)
        return spike(normalised, v_threshold, self.neuron.surrogate_now())


class NormalisedNeuron(Mixin):
    """Mixin for a neuron that fires by its settings' `spike`, as all do that compare a potential with a threshold.

        spike = Theta(norm(u) - v_threshold)        the reset is that of u itself

    One norm serves all timesteps. In training every step is normalised by its own batch and moves the running
    statistics, T times a forward. A surrogate is evaluated at the normalised potential.
    """
    membrane_norm: MembraneBatchNorm

    def surrogate_now(self) -> Any:
        """The surrogate, at this moment of the training where it changes with it."""
        progress, surrogate = self._buffers.get('progress'), self.settings.surrogate_function
        return surrogate if progress is None else lambda u, v: surrogate(u, v, progress=progress)

    def run(self, x: torch.Tensor, folded: torch.Tensor) -> torch.Tensor:
        dtype, settings, gain = membrane_dtype(x.dtype), _Normalised(self), self.gain
        state = tuple(s.to(dtype) for s in self.start(x[0].to(dtype)))
        constants, outputs = tuple(c.to(dtype) for c in self.constants()), []
        for t, x_t in enumerate(x.to(dtype)):
            x_t = x_t if gain is None else x_t * gain.to(dtype)
            output, state = type(self).step(x_t, state, constants, t, settings)
            outputs.append(output.to(x.dtype))
        return torch.stack(outputs)


@register_variant('norm', 'mpbn')
class MPBN(Variant):
    """Every neuron has a batch norm of its own in front of its threshold; the model's own norms stay.

    A probe shows where each neuron has its channels. The authors train LIF neurons with a decay factor of 0.25, a hard
    reset, a threshold of 0.5 and the surrogate 'dspike'. The recursion runs without the neurons' own kernels.
    """
    changes_state = True

    @dataclass(frozen=True)
    class Settings(VariantSettings):
        eps: float = knob(1e-5, 'added to the variance')
        momentum: float = knob(.1, 'share of a step\'s batch in the running statistics')

    def apply(self, model: nn.Module, settings: Any) -> None:
        new = {name: neuron for name, neuron in model.neurons().items() if not isinstance(neuron, NormalisedNeuron)}
        places = self._places(model) if new else {}
        for name in new:
            if len(places.get(name, ())) != 1:
                what = ('did not run in a probe' if name not in places else
                        f'has its channels at several places {sorted(places[name])}, (number, axis)')
                raise ValueError(f'{self}: the neuron {name} {what}, so that no batch norm fits its potential.')
        like = next(model.parameters())
        for name, neuron in new.items():
            (channels, axis), = places[name]
            norm = MembraneBatchNorm(channels, axis, device=like.device, dtype=like.dtype)
            mix_in(neuron, NormalisedNeuron)
            neuron.add_module(_CHILD, norm.train(neuron.training))
        for _, neuron in self._changed(model):
            neuron.membrane_norm.eps, neuron.membrane_norm.momentum = self.settings.eps, self.settings.momentum

    def _places(self, model: nn.Module) -> Dict[str, set]:
        """Per neuron the numbers of channels and their axes in a forward."""
        places: Dict[str, set] = {}
        axes = ChannelAxes()

        def run(example: Example) -> Dict[str, set]:
            places.clear()
            for name, neuron in model.neurons().items():
                neuron.register_forward_pre_hook(lambda m, args, name=name: places.setdefault(name, set()).add(
                    (args[0].shape[axes.axis(args[0])], axes.axis(args[0]))))
            with axes:
                example(model)
            return places

        return probe(model, run)

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
