"""MLF: several membranes whose thresholds differ by one; their spikes are added."""
from dataclasses import dataclass
from typing import Tuple

import torch

from timm_sscl.knobs import knob

from .base import SpikingNeuron
from .registry import register_neuron
from .settings import ResetSettings, check_decay

__all__ = ['MLF']


@register_neuron('mlf')
class MLF(SpikingNeuron):
    """Multi-level firing (Feng et al. 2022): K membranes get the same current; the output is the number that fire, 0 to
    K.

    Membrane k has the threshold v_threshold + k, k = 0 ... K - 1.
    """
    output = 'integer'
    elementwise = True

    @dataclass(frozen=True)
    class Settings(ResetSettings):
        """Settings of an MLF; defaults are the authors'."""
        v_threshold: float = knob(.6, 'lowest firing threshold')
        tau: float = knob(.25, 'decay factor of the membranes')
        num_levels: int = knob(3, 'number of membranes, K')
        surrogate: str = knob('rectangle', 'surrogate gradient of the spike, by name', kw_only=True)
        surrogate_kwargs: tuple = knob((('width', 1.),), 'options of the surrogate', kw_only=True)

        def check(self) -> None:
            super().check()
            check_decay(self.tau)
            if not (isinstance(self.num_levels, int) and self.num_levels >= 1):
                raise ValueError(f'num_levels={self.num_levels!r}: must be a whole number of membranes, 1 or more.')

    @property
    def top(self) -> int:
        return self.settings.num_levels

    def start(self, x: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        return tuple(torch.full_like(x, self.settings.v_start) for _ in range(self.settings.num_levels))

    @staticmethod
    def step(x, state, constants, t, settings):
        out, after = 0., []
        for k, v in enumerate(state):
            u, v_threshold = settings.tau * v + x, settings.v_threshold + k
            spikes = settings.spike(u, v_threshold)
            out = out + spikes
            after.append(settings.reset(u, spikes, v_threshold))
        return out, tuple(after)
