"""LIAF: a LIF whose output is an activation of its potential instead of its spike."""
from dataclasses import dataclass
from typing import Tuple

import torch
import torch.nn.functional as F

from timm_sscl.knobs import knob

from .base import SpikingNeuron
from .registry import register_neuron
from .settings import ResetSettings, check_decay

__all__ = ['LIAF']

_ACTIVATIONS = dict(relu=F.relu, leaky_relu=F.leaky_relu, selu=F.selu, gelu=F.gelu, tanh=torch.tanh)


@register_neuron('liaf')
class LIAF(SpikingNeuron):
    """Leaky integrate and analog fire (Wu et al. 2021): the output is f(u_t - v_threshold), or f(u_t).

    The spike only resets the potential. The output is analog, so the next layer multiplies. The surrogate only affects
    the reset.
    """
    output = 'analog'
    elementwise = True

    @dataclass(frozen=True)
    class Settings(ResetSettings):
        """Settings of a LIAF."""
        tau: float = knob(.5, 'decay factor of the membrane')
        activation: str = knob('relu', f'f: {", ".join(_ACTIVATIONS)}')
        threshold_related: bool = knob(True, 'f of the potential above the threshold; else of the potential')

        def check(self) -> None:
            super().check()
            check_decay(self.tau)
            if self.activation not in _ACTIVATIONS:
                raise ValueError(f'activation={self.activation!r}: must be one of {", ".join(_ACTIVATIONS)}.')

    def start(self, x: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        return (torch.full_like(x, self.settings.v_start),)

    @staticmethod
    def step(x, state, constants, t, settings):
        u = settings.tau * state[0] + x
        spikes = settings.spike(u, settings.v_threshold)
        out = _ACTIVATIONS[settings.activation](u - settings.v_threshold if settings.threshold_related else u)
        return out, (settings.reset(u, spikes),)
