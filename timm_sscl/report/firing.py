"""Firing rate of every neuron layer, and entropy of its spikes, measured while a model runs."""
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
        per_neuron: Whether every neuron is counted by itself, which the entropy needs.

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
        self._spikes: Dict[str, torch.Tensor] = {}  # (T,), spikes of every step
        self._elements: Dict[str, torch.Tensor] = {}  # (T,), neurons times images of every step
        self._neurons: Dict[str, torch.Tensor] = {}  # spikes of every neuron
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
            # thresholds from an ANN scale them
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
        """Add up what all processes counted; called by all of them."""
        if world_size() > 1:
            for name, count in self._spikes.items():
                elements = self._elements[name].to(count)
                for total in (count, elements, *([self._neurons[name]] if self.per_neuron else [])):
                    dist.all_reduce(total)
                self._elements[name] = elements.round().long().cpu()
        return self

    def per_layer(self) -> Dict[str, float]:
        """Spikes per neuron and time step of every layer that ran, in the order of their first call."""
        return {name: float(count.sum()) / int(self._elements[name].sum()) for name, count in self._spikes.items()}

    def per_step(self) -> Dict[str, List[float]]:
        """Spikes per neuron at every time step, T of them for every layer that ran.

        Where T changed between the forwards, a step's rate is over those that had it.
        """
        return {name: (count.cpu() / self._elements[name]).tolist() for name, count in self._spikes.items()}

    def entropy(self) -> Dict[str, float]:
        """Mean entropy H(p) of every layer's neurons in bits per step, p each neuron's own firing rate; 1 at most.

        Raises:
            RuntimeError: The neurons were not counted one by one.
        """
        if not self.per_neuron:
            raise RuntimeError('the entropy needs FiringRates(model, per_neuron=True).')
        return {name: float(spike_entropy(count * count.numel() / int(self._elements[name].sum())).mean())
                for name, count in self._neurons.items()}


def mean_per_step(rates: Dict[str, List[float]]) -> List[float]:
    """Firing rate at every time step, the mean of the layers; rates are those of `FiringRates.per_step`."""
    return [sum(step) / len(step) for step in zip(*rates.values())]


def _add(total: Optional[torch.Tensor], counts: torch.Tensor) -> torch.Tensor:
    """Sum of two counts per step, the shorter one 0 at the steps that it lacks."""
    if total is None or len(total) == len(counts):
        return counts if total is None else total + counts
    steps = max(len(total), len(counts))
    return sum(torch.nn.functional.pad(x, (0, steps - len(x))) for x in (total, counts))
