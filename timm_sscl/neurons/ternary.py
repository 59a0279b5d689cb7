"""Ternary spikes: -1, 0 and 1, times an amplitude."""
from dataclasses import dataclass
from typing import Tuple

import torch
import torch.nn as nn

from timm_sscl.knobs import knob

from .base import SpikingNeuron
from .registry import register_neuron
from .settings import OwnGradient, check_decay, check_reset

__all__ = ['Ternary']


@register_neuron('ternary')
class Ternary(SpikingNeuron):
    """Ternary spike (Guo et al. 2024): S = sign(u) where |u| >= v_threshold, else 0; v = u (1 - |S|); output a S.

    dS/du = 1 where |u| <= 1. The reset uses |S|, whose gradient is sign(S). The amplitude a is learned per layer as in
    the paper; the released code fixes it at 1 (`learn_amplitude=False`).
    """
    output = 'ternary'
    elementwise = True
    built_from = ('learn_amplitude',)

    @dataclass(frozen=True)
    class Settings(OwnGradient):
        """Settings of a ternary neuron."""
        tau: float = knob(.25, 'decay factor of the membrane')
        v_threshold: float = knob(.5, 'firing threshold of either sign')
        learn_amplitude: bool = knob(True, 'the size of a spike is learnt, from 1; else it is 1')

        def check(self) -> None:
            check_decay(self.tau)
            check_reset(self.v_threshold, None)

    def build(self, shape: Tuple[int, ...]) -> None:
        if self.settings.learn_amplitude:
            self.amplitude = nn.Parameter(torch.ones(shape))

    def start(self, x: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        return (torch.zeros_like(x),)

    @staticmethod
    def step(x, state, constants, t, settings):
        u = settings.tau * state[0] + x
        passed = u.detach()
        fired = torch.sign(passed) * (passed.abs() >= settings.v_threshold)
        spikes = fired + (passed.abs() <= 1) * (u - passed)
        return spikes, (u * (1 - torch.sign(fired) * spikes),)
