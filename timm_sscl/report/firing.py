"""Measure the firing rate of every neuron layer and the entropy of its spikes while a model runs."""
from contextlib import ExitStack
from typing import Dict, List, Optional

import torch
import torch.distributed as dist
import torch.nn as nn

from timm_sscl.distributed import world_size

from .representation import spike_entropy
from .watching import neurons_to_watch

__all__ = ['FiringRates', 'mean_per_step']


class FiringRates:
    """Context manager that counts the spikes of every neuron layer during the forwards inside it.

    A compiled model runs eagerly inside: torch.compile ignores hooks that are added after it.

    Args:
        model: Spiking model.
        per_neuron: Whether to count every neuron separately, which `entropy` needs.

    Raises:
        ValueError: The model has no spiking neurons.

    Examples:
        ```python
        with FiringRates(model) as rates:
            model(images)
        rates.per_layer()  # {'act1': 0.21, ...}
        rates.per_step()  # {'act1': [0.10, 0.24, 0.25, 0.25], ...}
        ```
    """

    def __init__(self, model: nn.Module, per_neuron: bool = False):
        self.model = model
        self.per_neuron = per_neuron
        self._spikes: Dict[str, torch.Tensor] = {}  # (T,), spikes per timestep
        self._elements: Dict[str, torch.Tensor] = {}  # (T,), neurons times images per timestep
        self._neurons: Dict[str, torch.Tensor] = {}  # spikes per neuron
        self._watched = neurons_to_watch(model)
        self._open = ExitStack()

    def __enter__(self) -> 'FiringRates':
        self._open.enter_context(torch.compiler.set_stance('force_eager'))
        for name, neuron in self._watched.items():
            self._open.callback(neuron.register_forward_hook(self._count(name)).remove)
        return self

    def __exit__(self, *exc) -> None:
        self._open.close()

    def _count(self, name: str):
        def hook(module, args, spikes):
            # with thresholds from an ANN, spikes are multiplied by a scale
            spikes = spikes.detach() if module.scale is None else spikes.detach() != 0
            dtype = torch.float64 if spikes.device.type != 'mps' else torch.float32
            if self.per_neuron:
                self._neurons[name] = self._neurons.get(name, 0) + spikes.sum(0, dtype=dtype)
            steps = spikes.reshape(module.timesteps, -1)
            self._spikes[name] = _add(self._spikes.get(name), steps.sum(1, dtype=dtype))
            self._elements[name] = _add(self._elements.get(name), torch.full(
                (module.timesteps,), steps.shape[1], dtype=torch.int64))
        return hook

    def sum_over_processes(self) -> 'FiringRates':
        """Add up the counts of all processes. Every process must call this."""
        if world_size() > 1:
            for name, count in self._spikes.items():
                elements = self._elements[name].to(count)
                for total in (count, elements, *([self._neurons[name]] if self.per_neuron else [])):
                    dist.all_reduce(total)
                self._elements[name] = elements.round().long().cpu()
        return self

    def per_layer(self) -> Dict[str, float]:
        """Return spikes per neuron and timestep of every layer that ran, in the order of the first calls."""
        return {name: float(count.sum()) / int(self._elements[name].sum()) for name, count in self._spikes.items()}

    def per_step(self) -> Dict[str, List[float]]:
        """Return spikes per neuron at each of the T timesteps, for every layer that ran.

        If T differed between forwards, a timestep's rate is over the forwards that had this timestep.
        """
        return {name: (count.cpu() / self._elements[name]).tolist() for name, count in self._spikes.items()}

    def entropy(self) -> Dict[str, float]:
        """Return the mean entropy H(p) over each layer's neurons in bits per timestep, at most 1. p is a neuron's
        firing rate.

        Raises:
            RuntimeError: per_neuron is False.
        """
        if not self.per_neuron:
            raise RuntimeError('the entropy needs FiringRates(model, per_neuron=True).')
        return {name: float(spike_entropy(count * count.numel() / int(self._elements[name].sum())).mean())
                for name, count in self._neurons.items()}


def mean_per_step(rates: Dict[str, List[float]]) -> List[float]:
    """Return the mean firing rate over the layers at every timestep.

    Args:
        rates: Result of `FiringRates.per_step`.
    """
    return [sum(step) / len(step) for step in zip(*rates.values())]


def _add(total: Optional[torch.Tensor], counts: torch.Tensor) -> torch.Tensor:
    """Add two counts per timestep; the shorter one is padded with 0."""
    if total is None or len(total) == len(counts):
        return counts if total is None else total + counts
    steps = max(len(total), len(counts))
    one, other = (torch.nn.functional.pad(x, (0, steps - len(x))) for x in (total, counts))
    return one + other
