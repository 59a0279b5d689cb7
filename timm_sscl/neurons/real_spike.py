"""Real Spike: an integrate-and-fire neuron whose spikes have a learned size per channel."""
from dataclasses import dataclass
from typing import Tuple

import torch
import torch.nn as nn

from timm_sscl.knobs import knob

from .base import SpikingNeuron
from .registry import register_neuron
from .settings import ResetSettings, check_decay

__all__ = ['RealSpike']


@register_neuron('real_spike')
class RealSpike(SpikingNeuron):
    """Real Spike (Guo et al. 2022): spikes of size a, learned per channel.

    If only convolutions or linear layers use the spikes, a can be folded into their weights, so that inference is
    binary: conv(a S) is a convolution of S with other weights. In a residual sum it remains a multiplication.
    """
    needs_channels = True
    elementwise = True

    @dataclass(frozen=True)
    class Settings(ResetSettings):
        """Settings of Real Spike. The paper's neuron does not leak."""
        tau: float = knob(1., 'decay factor of the membrane')
        detach_reset: bool = knob(True, 'no gradient through the reset')
        surrogate: str = knob('atan', 'surrogate gradient of the spike, by name', kw_only=True)

        def check(self) -> None:
            super().check()
            check_decay(self.tau)

    def build(self, shape: Tuple[int, ...]) -> None:
        self.amplitude = nn.Parameter(torch.ones(shape))

    def start(self, x: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        return (torch.full_like(x, self.settings.v_start),)

    @staticmethod
    def step(x, state, constants, t, settings):
        u = settings.tau * state[0] + x
        spikes = settings.spike(u, settings.v_threshold)
        return spikes, (settings.reset(u, spikes),)
