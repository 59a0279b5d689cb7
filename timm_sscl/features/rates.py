"""Measure firing rates in a training forward, with gradients."""
from typing import Any, Dict, List, NamedTuple, Optional

import torch

from timm_sscl.neurons import SpikingNeuron

from .neuron_recorder import NeuronHook, NeuronRecorder

__all__ = ['RateRecorder']


class _Call(NamedTuple):
    """Mean output of one neuron call. It holds no activation that gradient checkpointing would have to keep."""
    mean: torch.Tensor  # mean of the output, one entry per unit
    unit: Optional[torch.Tensor]  # size of one level
    top: int  # highest level of the output
    elements: int

    @classmethod
    def of(cls, lif: SpikingNeuron, out: torch.Tensor) -> '_Call':
        first, sizes, unit = out.ndim, torch.Size(), lif.unit()
        if lif.output == 'ternary':
            out, unit = out.abs(), None if unit is None else unit.abs()
        if unit is not None:
            first, sizes = out.ndim - unit.ndim, unit.shape
        alike = [i for i in range(out.ndim) if i < first or sizes[i - first] == 1]  # the unit is constant along them
        mean = out.mean(alike, dtype=torch.promote_types(out.dtype, torch.float32))
        return cls(mean, unit, lif.top, out.numel())

    @property
    def rate(self) -> torch.Tensor:
        """Mean level relative to the highest, 0 to 1. The neuron returns levels times a unit, which is divided out."""
        levels = self.mean if self.unit is None else (self.mean / self.unit.to(self.mean.dtype).squeeze()).mean()
        return levels if self.top == 1 else levels / self.top


def _rate(calls: List[_Call]) -> torch.Tensor:
    """Return the mean rate over all calls of a neuron in a forward."""
    if len(calls) == 1:
        return calls[0].rate
    total: Any = sum(call.rate * call.elements for call in calls)
    return total / sum(call.elements for call in calls)


_RateHook = NeuronHook  # name in pickles of version 0.1.0


class RateRecorder(NeuronRecorder):
    """Measure the firing rate of every neuron layer between `begin` and `take`, differentiably.

    While it records, it computes one mean per layer.

    Args:
        model: Spiking model. Hooks are added to its neurons; add them before compiling it.

    Raises:
        ValueError: The model has no neurons, or one whose output is analog.
    """
    what = 'firing rates'

    def check(self, name: str, neuron: SpikingNeuron) -> None:
        if neuron.output == 'analog':
            raise ValueError(f"'{name}' ({type(neuron).__name__}) passes on analog values, which have no firing rate.")

    def of_call(self, neuron: SpikingNeuron, x: torch.Tensor, out: torch.Tensor) -> _Call:
        return _Call.of(neuron, out)

    def take(self) -> Dict[str, torch.Tensor]:
        """Stop recording and return the firing rate of every layer that ran, 0-d, by name in the order of the first
        calls.
        """
        return {name: _rate(calls) for name, calls in self._stop().items()}


def _detached() -> RateRecorder:
    """Return a recorder without a model. Pickles of version 0.1.0 refer to this function."""
    recorder = RateRecorder.__new__(RateRecorder)
    recorder.recording, recorder._gradients, recorder._seen = False, False, {}
    return recorder
