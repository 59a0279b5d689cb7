"""Means of an epoch's values."""
import math
from collections import OrderedDict
from typing import Any, Dict, List, Optional, Tuple

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
        self._names: Tuple[str, ...] = ()  # of the statistics of layers
        self._totals: Optional[torch.Tensor] = None  # their sums and counts, (2, n)

    def update(self, values: Dict[str, Any], n: int) -> None:
        """Add values, each weighted by n. A float that is nan is left out."""
        for name, value in values.items():
            value = value.detach().float() if isinstance(value, torch.Tensor) else value
            if isinstance(value, float) and math.isnan(value):
                continue  # an undefined CKA
            self.sums[name] = self.sums.get(name, 0.) + value * n
            self.counts[name] = self.counts.get(name, 0) + n

    def update_stats(self, values: Dict[str, torch.Tensor], n: int) -> None:
        """Add statistics of layers, each weighted by n. One that is nan, such as an undefined CKA, is left out.

        Args:
            values: 0-d tensors on one device.
            n: Number of samples.
        """
        if not values:
            return
        stacked = torch.stack([value.detach() for value in values.values()])
        if stacked.device.type != 'mps':  # which has no float64
            stacked = stacked.double()
        before = self._totals
        if before is None or tuple(values) != self._names:
            before = self._start_stats(tuple(values), stacked)
        known = ~stacked.isnan()
        self._totals = before + torch.stack([torch.where(known, stacked, 0.), known.to(stacked.dtype)]) * n

    def _start_stats(self, names: Tuple[str, ...], like: torch.Tensor) -> torch.Tensor:
        """Return what is known of these statistics as sums and counts on the device."""
        self.sums, self.counts = self._known()
        known = [[source.pop(name, 0) for name in names] for source in (self.sums, self.counts)]
        self._names = names
        return torch.tensor(known, dtype=like.dtype, device=like.device)

    def _known(self) -> Tuple[Dict[str, Any], Dict[str, float]]:
        """Return sums and counts of all values. This waits for the device if there are statistics of layers."""
        sums, counts = OrderedDict(self.sums), dict(self.counts)
        totals: List[List[float]] = self._totals.tolist() if self._totals is not None else [[], []]
        for name, total, count in zip(self._names, *totals):
            if count:
                sums[name], counts[name] = total, int(count)
        return sums, counts

    def means(self) -> 'OrderedDict[str, float]':
        sums, counts = self._known()
        return OrderedDict((name, float(total) / counts[name]) for name, total in sums.items())

    def state_dict(self) -> Dict[str, Any]:
        sums, counts = self._known()
        return dict(sums={name: float(total) for name, total in sums.items()}, counts=counts)

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self.sums, self.counts = OrderedDict(state['sums']), dict(state['counts'])
        self._names, self._totals = (), None


def layer_stats(task: Any) -> Dict[str, torch.Tensor]:
    """Return the per-layer values of the task's losses by column, 0-d tensors: 'cka_layer1', ...; empty if the task has
    none.
    """
    return {f'{key}_{layer}': value
            for layer, values in getattr(task, 'device_stats', {}).items() for key, value in values.items()}
