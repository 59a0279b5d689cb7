"""Integrate-and-fire neuron: a LIF without leak."""
from dataclasses import dataclass
from typing import Any, ClassVar, Optional, Tuple

from timm_sscl.knobs import knob

from .base import SpikingNeuron
from .lif import LIF, check_neuron
from .registry import register_neuron
from .settings import ResetSettings

__all__ = ['IF']


@register_neuron('if')
class IF(LIF):
    """Integrate-and-fire neuron, U_t,pre = U_{t-1} + X_t, run by the LIF's kernel.

    With a soft reset, a constant current x in [0, v_threshold) fires floor((v_init + T x) / v_threshold) times.
    """

    @dataclass(frozen=True)
    class Settings(ResetSettings):
        """Settings of an IF."""
        tau: ClassVar[float] = 1.
        v_init: Optional[float] = knob(None, 'initial potential (the reset potential; 0 for the soft reset)')

        def check(self) -> None:
            check_neuron(1., self.v_threshold, self.v_reset, self.v_init)

    def __init__(self, timesteps: int, channels: Optional[Tuple[int, ...]] = None, **settings: Any):
        SpikingNeuron.__init__(self, timesteps, channels, **settings)
