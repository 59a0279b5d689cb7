"""PLIF: a LIF with a learned decay factor."""
import math
from dataclasses import dataclass
from typing import Tuple

import torch
import torch.nn as nn

from timm_sscl.knobs import knob

from .base import SpikingNeuron
from .registry import register_neuron
from .settings import ResetSettings

__all__ = ['PLIF']


@register_neuron('plif')
class PLIF(SpikingNeuron):
    """Parametric LIF (Fang et al. 2021): U_t,pre = U_{t-1} + sigmoid(w) * (X_t - U_{t-1}), with w learned per layer.

    The decay factor is 1 - sigmoid(w). The paper's tau_0 = 2 corresponds to tau = 1 - 1 / tau_0 = 0.5.
    """
    built_from = ('tau',)
    elementwise = True

    @dataclass(frozen=True)
    class Settings(ResetSettings):
        """Settings of a PLIF; defaults are the authors'."""
        tau: float = knob(.5, 'decay factor at the start of training, above 0 and below 1')
        detach_reset: bool = knob(True, 'no gradient through the reset')
        surrogate: str = knob('atan', 'surrogate gradient of the spike, by name', kw_only=True)

        def check(self) -> None:
            super().check()
            if not 0 < self.tau < 1:
                raise ValueError(f'tau={self.tau}: a decay factor that is learnt starts above 0 and below 1.')

    def build(self, shape: Tuple[int, ...]) -> None:
        self.w = nn.Parameter(torch.full(shape, -math.log(self.settings.tau / (1 - self.settings.tau))))

    def constants(self) -> Tuple[torch.Tensor, ...]:
        return (self.w.sigmoid(),)

    def start(self, x: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        return (torch.full_like(x, self.settings.v_start),)

    @staticmethod
    def step(x, state, constants, t, settings):
        (v,), (k,) = state, constants
        u = v + k * (x - v)
        spikes = settings.spike(u, settings.v_threshold)
        return spikes, (settings.reset(u, spikes),)

    def threshold(self) -> float:
        return self.settings.v_threshold / float(self.w.detach().sigmoid())
