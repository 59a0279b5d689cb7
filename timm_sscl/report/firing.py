"""Measure the firing rate of every neuron layer and the entropy of its spikes while a model runs."""
from contextlib import ExitStack
from typing import Dict, List, Optional

import torch
import torch.distributed as dist
import torch.nn as nn

from timm_sscl.distributed import world_size
from timm_sscl.neurons import SpikingNeuron

from .layer_inputs import LayerInputs
from .representation import level_entropy
from .watching import neurons_to_watch

__all__ = ['FiringRates', 'mean_per_step']


class FiringRates:
    """Context manager that counts the spikes of every neuron layer during the forwards inside it.

    A compiled model runs eagerly inside: torch.compile ignores hooks that are added after it.

    Args:
        model: Spiking model.
        per_neuron: Whether to count every neuron separately, which `entropy` needs.
        inputs: Whether to sum the input of every layer with weights, too, which `estimate_energy(..., rates=)` needs.

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

    def __init__(self, model: nn.Module, per_neuron: bool = False, inputs: bool = False):
        self.model = model
        self.per_neuron = per_neuron
        self.inputs = LayerInputs(model) if inputs else None
        self._spikes: Dict[str, torch.Tensor] = {}  # (T,), spikes per timestep
        self._elements: Dict[str, torch.Tensor] = {}  # (T,), neurons times images per timestep
        self._neurons: Dict[str, torch.Tensor] = {}  # (L, ...), how often each neuron had each level other than 0
        self._watched = neurons_to_watch(model)
        self._open = ExitStack()

    def __enter__(self) -> 'FiringRates':
        self._open.enter_context(torch.compiler.set_stance('force_eager'))
        for name, neuron in self._watched.items():
            self._open.callback(neuron.register_forward_hook(self._count(name)).remove)
        if self.inputs is not None:
            self.inputs.attach(self._open)
        return self

    def __exit__(self, *exc) -> None:
        self._open.close()

    def _count(self, name: str):
        def hook(module, args, out):
            out = out.detach()
            dtype = torch.float64 if out.device.type != 'mps' else torch.float32
            if self.per_neuron and module.output != 'analog':
                self._neurons[name] = self._neurons.get(name, 0) + _count_levels(module, out, dtype)
            steps = module.activity(out).reshape(module.timesteps, -1)
            self._spikes[name] = _add(self._spikes.get(name), steps.sum(1, dtype=dtype))
            self._elements[name] = _add(self._elements.get(name), torch.full(
                (module.timesteps,), steps.shape[1], dtype=torch.int64))
        return hook

    def sum_over_processes(self) -> 'FiringRates':
        """Add up the counts of all processes. Every process must call this."""
        if world_size() > 1:
            for name, count in self._spikes.items():
                elements = self._elements[name].to(count)
                for total in (count, elements, *([self._neurons[name]] if name in self._neurons else [])):
                    dist.all_reduce(total)
                self._elements[name] = elements.round().long().cpu()
            if self.inputs is not None:
                self.inputs.sum_over_processes()
        return self

    def per_layer(self) -> Dict[str, float]:
        """Return the firing rate of every layer that ran, 0 to 1, in the order of the first calls.

        It is the mean of the spikes per neuron and timestep, of ternary ones whatever their sign, of integer ones as a
        share of the highest level. Of analog output it is the share that is not 0.
        """
        return {name: float(count.sum()) / int(self._elements[name].sum()) for name, count in self._spikes.items()}

    def per_step(self) -> Dict[str, List[float]]:
        """Return spikes per neuron at each of the T timesteps, for every layer that ran.

        If T differed between forwards, a timestep's rate is over the forwards that had this timestep.
        """
        return {name: (count.cpu() / self._elements[name]).tolist() for name, count in self._spikes.items()}

    def entropy(self) -> Dict[str, float]:
        """Return the mean entropy over each layer's neurons in bits per timestep, one symbol per level of the output.

        It is at most 1 for binary spikes, log2(3) for ternary and log2(top + 1) for integer ones. The probabilities are
        each neuron's own. Layers of analog output are left out.

        Raises:
            RuntimeError: The neurons were not counted separately (per_neuron=False).
        """
        if not self.per_neuron:
            raise RuntimeError('the entropy needs FiringRates(model, per_neuron=True).')
        return {name: float(level_entropy(count * count[0].numel() / int(self._elements[name].sum())).mean())
                for name, count in self._neurons.items()}


def _count_levels(neuron: SpikingNeuron, out: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return how often each neuron of a layer had each level other than 0, (L, ...)."""
    levels = neuron.levels(out)
    if neuron.output == 'binary':
        return levels.sum(0, dtype=dtype)[None]
    symbols = (-1, 1) if neuron.output == 'ternary' else range(1, neuron.top + 1)
    return torch.stack([(levels == symbol).sum(0, dtype=dtype) for symbol in symbols])


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
