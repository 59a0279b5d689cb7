"""Firing rate of every neuron layer, measured while a model runs."""
from typing import Dict

import torch
import torch.nn as nn

from timm_sscl.neurons import LIF

__all__ = ['FiringRates']


class FiringRates:
    """Context manager that counts the spikes of every LIF layer during the forwards inside it.

    Args:
        model: Spiking model.

    Examples:
        ```python
        with FiringRates(model) as rates:
            model(images)
        rates.per_layer()  # {'act1': 0.21, ...}
        ```
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._spikes: Dict[str, torch.Tensor] = {}
        self._elements: Dict[str, int] = {}
        self._handles = []

    def __enter__(self) -> 'FiringRates':
        for name, module in self.model.named_modules():
            if isinstance(module, LIF):
                self._handles.append(module.register_forward_hook(self._count(name)))
        return self

    def __exit__(self, *exc) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _count(self, name: str):
        def hook(module, args, spikes):
            total = spikes.detach().sum(dtype=torch.float64 if spikes.device.type != 'mps' else torch.float32)
            self._spikes[name] = self._spikes.get(name, 0) + total
            self._elements[name] = self._elements.get(name, 0) + spikes.numel()
        return hook

    def per_layer(self) -> Dict[str, float]:
        """Spikes per neuron and time step of every layer that ran, in the order of their first call."""
        return {name: float(count) / self._elements[name] for name, count in self._spikes.items()}
