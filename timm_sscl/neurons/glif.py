"""GLIF: a LIF with gates that choose between kinds of leak, integration and reset."""
from dataclasses import dataclass
from typing import Tuple

import torch
import torch.nn as nn

from timm_sscl.knobs import knob

from .base import SpikingNeuron
from .parameters import binary_gate
from .registry import register_neuron
from .settings import NeuronSettings

__all__ = ['GLIF']

_START = dict(gate_leak=.55, gate_input=.65, gate_reset=.55, decay=.25, v_threshold=.5, leak=.0625, v_reset=.5)


@register_neuron('glif')
class GLIF(SpikingNeuron):
    """Gated LIF (Yao et al. 2022), with parameters learned per channel or per layer:

        u_t = (1 - a (1 - d)) u_{t-1} (1 - c S_{t-1}) - (1 - a) l + x_t (1 - b (1 - g_t)) - (1 - c) r S_{t-1}
        S_t = u_t >= V

    The gates a (leak: exponential or linear), b (input) and c (reset: hard or by subtraction), the decay d, the
    threshold V, the linear leak l, the reset r and the weight g_t of every timestep are sigmoids of the parameters. In
    the forward, gates are 0 or 1 unless soft_gates is set. Their learning rate is a tenth of the others' (`lr_scales`).
    As in the authors' code, the reset takes effect one timestep
    later.
    """
    per_step = ('input_weight',)
    built_from = ('per_channel',)
    lr_scales = dict(gate_leak=.1, gate_input=.1, gate_reset=.1)

    @dataclass(frozen=True)
    class Settings(NeuronSettings):
        """Settings of a GLIF. The parameters start at the authors' values."""
        per_channel: bool = knob(True, 'parameters per channel; else per layer')
        soft_gates: bool = knob(False, 'gates between 0 and 1; else they are 0 or 1, with a straight-through gradient')
        detach_reset: bool = knob(False, 'no gradient through the reset')
        surrogate: str = knob('rectangle', 'surrogate gradient of the spike, by name', kw_only=True)
        surrogate_kwargs: tuple = knob((('width', 1.),), 'options of the surrogate', kw_only=True)

    @property
    def needs_channels(self) -> bool:
        return self.settings.per_channel

    def build(self, shape: Tuple[int, ...]) -> None:
        for name, value in _START.items():
            self.register_parameter(name, nn.Parameter(torch.full(shape, value).logit()))
        self.input_weight = nn.Parameter(torch.zeros(self.timesteps, *shape))

    def constants(self) -> Tuple[torch.Tensor, ...]:
        values = {name: getattr(self, name).sigmoid() for name in _START}
        gates = (values.pop(name) for name in ('gate_leak', 'gate_input', 'gate_reset'))
        a, b, c = gates if self.settings.soft_gates else map(binary_gate, gates)
        keep, weight = 1 - a * (1 - values['decay']), 1 - b * (1 - self.over_time(self.input_weight).sigmoid())
        return keep, weight, c, values['v_threshold'], (1 - a) * values['leak'], (1 - c) * values['v_reset']

    def start(self, x: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        return torch.zeros_like(x), torch.zeros_like(x)

    @staticmethod
    def step(x, state, constants, t, settings):
        (u, s), (keep, weight, c, v_threshold, leak, subtracted) = state, constants
        u = keep * u * (1 - c * s) - leak + x * weight[t] - subtracted * s
        spikes = settings.spike(u, v_threshold)
        return spikes, (u, spikes.detach() if settings.detach_reset else spikes)

    def threshold(self) -> float:
        with torch.no_grad():
            _, weight, _, v_threshold, leak, _ = self.constants()
            return float(((v_threshold + leak) / weight[0]).mean())
