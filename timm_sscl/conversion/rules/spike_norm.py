"""SpikeNorm: the largest current over time, behind layers that spike."""
from typing import Optional

import torch

from .base import ThresholdRule, as_threshold, by_channel, register_threshold_rule

__all__ = ['SpikeNorm']


@register_threshold_rule('spike_norm')
class SpikeNorm(ThresholdRule):
    """Largest current over timesteps, images and neurons, behind layers that spike (Sengupta et al. 2019).

    With `factor=0.7` it is the initialisation of hybrid training (Rathi et al. 2020).
    """
    spiking = True

    def __init__(self):
        self.value: Optional[torch.Tensor] = None

    def measure(self, x: torch.Tensor, axis: Optional[int]) -> None:
        largest = as_threshold(by_channel(x, axis).amax(1), x, axis)
        self.value = largest if self.value is None else torch.maximum(self.value, largest)

    def threshold(self) -> torch.Tensor:
        assert self.value is not None, 'measure comes first'
        return self.value
