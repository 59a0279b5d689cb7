"""Diet-SNN's neuron: a LIF with learned leak and threshold."""
from dataclasses import dataclass
from typing import Tuple

import torch
import torch.nn as nn

from timm_sscl.knobs import knob

from .base import SpikingNeuron
from .parameters import clamp_straight_through
from .registry import register_neuron
from .settings import NeuronSettings, check_decay, check_reset

__all__ = ['Diet']

_MIN_THRESHOLD = 1e-3  # a threshold of 0 or less would fire without input


@register_neuron('diet')
class Diet(SpikingNeuron):
    """Diet-SNN's LIF (Rathi and Roy 2020): leak l and threshold V learned per layer, soft reset.

        u_t = l v_{t-1} + x_t       S_t = u_t / V >= 1       v_t = u_t - V S_t

    The reset passes no gradient to the spike, but V in it has a gradient. The authors set V from the activations of a
    trained ANN. Here a calibration or `convert_ann` sets the input gain, which has the same effect.
    """
    built_from = ('tau', 'v_threshold')
    elementwise = True

    @dataclass(frozen=True)
    class Settings(NeuronSettings):
        """Settings of Diet-SNN's neuron."""
        tau: float = knob(1., 'leak at the start of training')
        v_threshold: float = knob(1., 'firing threshold at the start of training')
        surrogate: str = knob('damped_triangle', 'surrogate gradient of the spike, by name', kw_only=True)

        def check(self) -> None:
            check_decay(self.tau)
            check_reset(self.v_threshold, None)

    def build(self, shape: Tuple[int, ...]) -> None:
        self.leak = nn.Parameter(torch.full(shape, self.settings.tau))
        self.v_threshold = nn.Parameter(torch.full(shape, self.settings.v_threshold))

    def constants(self) -> Tuple[torch.Tensor, ...]:
        return clamp_straight_through(self.leak, 0., 1.), clamp_straight_through(self.v_threshold, low=_MIN_THRESHOLD)

    def start(self, x: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        return (torch.zeros_like(x),)

    @staticmethod
    def step(x, state, constants, t, settings):
        (v,), (leak, v_threshold) = state, constants
        u = leak * v + x
        spikes = settings.spike(u / v_threshold, 1.)
        return spikes, (u - v_threshold * spikes.detach(),)

    def threshold(self) -> float:
        return float(self.constants()[1].detach())
