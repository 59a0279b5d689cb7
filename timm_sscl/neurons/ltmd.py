"""LTMD: a LIF with a learned threshold."""
import math
from dataclasses import dataclass
from typing import Tuple

import torch
import torch.nn as nn

from timm_sscl.knobs import knob

from .base import SpikingNeuron
from .parameters import clamp_straight_through
from .registry import register_neuron
from .settings import ResetSettings, check_decay

__all__ = ['LTMD']

_MIN_THRESHOLD = 1e-3  # a threshold of 0 or less would fire without input


@register_neuron('ltmd')
class LTMD(SpikingNeuron):
    """LIF with a learnable threshold (Wang, Cheng and Lim 2022): V = tanh(w), with w learned per layer."""
    built_from = ('v_threshold',)
    elementwise = True

    @dataclass(frozen=True)
    class Settings(ResetSettings):
        """Settings of an LTMD; defaults are the authors'."""
        v_threshold: float = knob(math.tanh(.5), 'firing threshold at the start of training, above 0 and below 1')
        tau: float = knob(.25, 'decay factor of the membrane')
        surrogate: str = knob('rectangle', 'surrogate gradient of the spike, by name', kw_only=True)
        surrogate_kwargs: tuple = knob((('width', 1.),), 'options of the surrogate', kw_only=True)

        def check(self) -> None:
            super().check()
            check_decay(self.tau)
            if not self.v_threshold < 1:
                raise ValueError(f'v_threshold={self.v_threshold}: the threshold is tanh(w), which is below 1.')

    def build(self, shape: Tuple[int, ...]) -> None:
        self.w = nn.Parameter(torch.full(shape, math.atanh(self.settings.v_threshold)))

    def constants(self) -> Tuple[torch.Tensor, ...]:
        return (clamp_straight_through(self.w.tanh(), low=_MIN_THRESHOLD),)

    def start(self, x: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        return (torch.full_like(x, self.settings.v_start),)

    @staticmethod
    def step(x, state, constants, t, settings):
        (v,), (v_threshold,) = state, constants
        u = settings.tau * v + x
        spikes = settings.spike(u, v_threshold)
        return spikes, (settings.reset(u, spikes, v_threshold),)

    def threshold(self) -> float:
        return float(self.constants()[0].detach())
