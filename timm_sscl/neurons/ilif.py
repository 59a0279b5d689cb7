"""I-LIF: a LIF with integer spikes, equivalent to several binary spikes in inference."""
from dataclasses import dataclass
from typing import Tuple

import torch

from timm_sscl.knobs import knob

from .base import SpikingNeuron
from .registry import register_neuron
from .settings import OwnGradient, check_decay

__all__ = ['ILIF']


@register_neuron('ilif')
class ILIF(SpikingNeuron):
    """Integer LIF (Luo et al. 2024): S = round(u) limited to 0 ... D; v = u - S.

    dS/du = 1 where 0 <= u <= D; the reset passes no gradient. 0.5 is rounded to 0 and 1.5 to 2, so that the effective
    threshold is 1/2. On hardware, S takes D binary timesteps.
    """
    output = 'integer'
    elementwise = True

    @dataclass(frozen=True)
    class Settings(OwnGradient):
        """Settings of an I-LIF; defaults are the authors'."""
        tau: float = knob(.25, 'decay factor of the membrane')
        max_spikes: int = knob(4, 'highest level D')

        def check(self) -> None:
            check_decay(self.tau)
            if not (isinstance(self.max_spikes, int) and self.max_spikes >= 1):
                raise ValueError(f'max_spikes={self.max_spikes!r}: must be a whole number, 1 or more.')

    @property
    def top(self) -> int:
        return self.settings.max_spikes

    def start(self, x: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        return (torch.zeros_like(x),)

    @staticmethod
    def step(x, state, constants, t, settings):
        u = settings.tau * state[0] + x
        passed = u.detach()
        fired = passed.clamp(0, settings.max_spikes).round()
        window = (passed >= 0) & (passed <= settings.max_spikes)
        return fired + window * (u - passed), (u - fired,)

    def threshold(self) -> float:
        return .5
