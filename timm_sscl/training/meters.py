"""Means of an epoch's values."""
import math
from collections import OrderedDict
from typing import Any, Dict

import torch

__all__ = ['scalar_terms', 'layer_stats', 'Meters']


def scalar_terms(result: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Return the losses in a task's result: 0-d tensors by name."""
    return {k: v for k, v in result.items() if isinstance(v, torch.Tensor) and v.ndim == 0}


class Meters:
    """Weighted sums of a training epoch's values, kept on the device."""

    def __init__(self):
        self.sums: Dict[str, Any] = OrderedDict()
        self.counts: Dict[str, float] = {}

    def update(self, values: Dict[str, Any], n: int) -> None:
        """Add values, each weighted by n."""
        for name, value in values.items():
            value = value.detach().float() if isinstance(value, torch.Tensor) else value
            if isinstance(value, float) and math.isnan(value):
                continue  # an undefined CKA
            self.sums[name] = self.sums.get(name, 0.) + value * n
            self.counts[name] = self.counts.get(name, 0) + n

    def means(self) -> 'OrderedDict[str, float]':
        return OrderedDict((name, float(total) / self.counts[name]) for name, total in self.sums.items())

    def state_dict(self) -> Dict[str, Any]:
        return dict(sums={name: float(total) for name, total in self.sums.items()}, counts=dict(self.counts))

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self.sums, self.counts = OrderedDict(state['sums']), dict(state['counts'])


def layer_stats(task: Any) -> Dict[str, float]:
    """Return the per-layer values of the task's losses by column: 'cka_layer1', ...; empty if the task has none."""
    return {f'{key}_{layer}': value
            for layer, values in getattr(task, 'stats', {}).items() for key, value in values.items()}
