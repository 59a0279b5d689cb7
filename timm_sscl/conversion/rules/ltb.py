"""LTB: thresholds that grow by twice the mean excess of the activations."""
from typing import Optional

import torch

from .base import ThresholdRule, as_threshold, by_channel, register_threshold_rule

__all__ = ['LocalThresholdBalancing']


@register_threshold_rule('ltb')
class LocalThresholdBalancing(ThresholdRule):
    """Local threshold balancing (Bu et al. 2024, arXiv:2409.03368).

    From 0, every batch of images adds to the threshold twice the mean excess of the activations:

        threshold += 2 * mean(relu(x - threshold))

    The layer passes on min(x, threshold), so that later layers are measured on what a neuron can transmit.
    """

    def __init__(self):
        self.value: Optional[torch.Tensor] = None

    def measure(self, x: torch.Tensor, axis: Optional[int]) -> None:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        excess = x if self.value is None else (x - self.value).relu()
        added = as_threshold(2 * by_channel(excess, axis).mean(1), x, axis)
        self.value = added if self.value is None else self.value + added

    def transmit(self, x: torch.Tensor) -> torch.Tensor:
        return torch.minimum(x, self.threshold().to(x.dtype))

    def threshold(self) -> torch.Tensor:
        assert self.value is not None, 'measure comes first'
        return self.value
