"""Threshold: the largest activation of the ANN, or a percentile."""
from typing import List, Optional

import torch

from .base import ThresholdRule, as_threshold, by_channel, register_threshold_rule

__all__ = ['Percentile']


@register_threshold_rule('percentile')
class Percentile(ThresholdRule):
    """Percentile of the activations that the ANN shows: 100 is their maximum.

    Percentiles are taken per batch of images, and their mean over batches is the threshold.

    Args:
        percentile: Above 0 to 100.

    Raises:
        ValueError: percentile is out of range.
    """

    def __init__(self, percentile: float = 100.):
        if not 0 < percentile <= 100:
            raise ValueError(f'percentile={percentile}: must be above 0 and at most 100 (the maximum).')
        self.q = percentile / 100
        self.values: List[torch.Tensor] = []

    def measure(self, x: torch.Tensor, axis: Optional[int]) -> None:
        rows = by_channel(x, axis)
        k = max(1, round(self.q * rows.shape[1]))
        values = rows.kthvalue(k, dim=1).values if k < rows.shape[1] else rows.amax(1)
        self.values.append(as_threshold(values, x, axis))

    def threshold(self) -> torch.Tensor:
        values = torch.stack(self.values)
        return values.amax(0) if self.q == 1 else values.mean(0)
