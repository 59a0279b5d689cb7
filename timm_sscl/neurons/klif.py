"""KLIF: a LIF with a learned slope of its potential."""
from dataclasses import dataclass
from typing import Tuple

import torch
import torch.nn as nn

from timm_sscl.knobs import knob

from .base import SpikingNeuron
from .parameters import clamp_straight_through
from .registry import register_neuron
from .settings import ResetSettings, check_decay

__all__ = ['KLIF']

_MIN_K = 1e-3  # k <= 0 would silence the layer


@register_neuron('klif')
class KLIF(SpikingNeuron):
    """KLIF (Jiang and Zhang 2023): the potential passes relu(k u) before the spike, with k learned per layer.

        U_t = tau V_{t-1} + (1 - tau) X_t       F_t = relu(k U_t)       S_t = F_t >= v_threshold

    F_t is reset and carried to the next timestep, or F_t / k with `scale_reset`. Without it the carried potential grows
    by k.
    """
    elementwise = True

    @dataclass(frozen=True)
    class Settings(ResetSettings):
        """Settings of a KLIF. Defaults are SpikingJelly's, since the authors released no code."""
        tau: float = knob(.5, 'decay factor of the membrane')
        scale_reset: bool = knob(False, 'divide the carried potential by k')
        surrogate: str = knob('sigmoid', 'surrogate gradient of the spike, by name', kw_only=True)

        def check(self) -> None:
            super().check()
            check_decay(self.tau)
            if self.tau == 1:
                raise ValueError('tau=1: the current enters times 1 - tau, so that nothing would fire.')

    def build(self, shape: Tuple[int, ...]) -> None:
        self.k = nn.Parameter(torch.ones(shape))

    def constants(self) -> Tuple[torch.Tensor, ...]:
        return (clamp_straight_through(self.k, low=_MIN_K),)

    def start(self, x: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        return (torch.full_like(x, self.settings.v_start),)

    @staticmethod
    def step(x, state, constants, t, settings):
        (v,), (k,) = state, constants
        f = torch.relu(k * (settings.tau * v + (1 - settings.tau) * x))
        spikes = settings.spike(f, settings.v_threshold)
        if not settings.scale_reset:
            return spikes, (settings.reset(f, spikes),)
        reset = spikes.detach() if settings.detach_reset else spikes
        if settings.v_reset is None:
            return spikes, ((f - settings.v_threshold * reset) / k,)
        return spikes, (f / k * (1 - reset) + settings.v_reset * reset,)

    def threshold(self) -> float:
        return self.settings.v_threshold / (1 - self.settings.tau) / float(self.constants()[0].detach())
