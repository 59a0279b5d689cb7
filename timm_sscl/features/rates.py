"""Measure firing rates in a training forward, with gradients."""
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch
import torch.nn as nn

from timm_sscl.neurons import SpikingNeuron

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


class _RateHook:
    """Forward hook of a neuron that passes its output to a recorder.

    A copy of the model holds a copy of the hook, which refers to the copy of the recorder.
    """

    def __init__(self, recorder: Optional['RateRecorder'] = None, name: str = ''):
        self.recorder = recorder
        self.name = name

    def __call__(self, lif: SpikingNeuron, args: Tuple[Any, ...], out: torch.Tensor) -> None:
        if self.recorder is not None and self.recorder.recording:
            self.recorder.record(self.name, lif, out)


class RateRecorder:
    """Measure the firing rate of every neuron layer between `begin` and `take`, differentiably.

    While it records, it computes one mean per layer. It works under gradient checkpointing (the recomputation runs
    after `take` and is ignored) and in a compiled model. Both at once fail: dynamo refuses the side effect.

    Args:
        model: Spiking model. Hooks are added to its neurons; add them before compiling it.

    Raises:
        ValueError: The model has no neurons, or one whose output is analog.
    """

    def __init__(self, model: nn.Module):
        neurons = {name: module for name, module in model.named_modules() if isinstance(module, SpikingNeuron)}
        if not neurons:
            raise ValueError(f'{type(model).__name__} has no spiking neurons, so no firing rates.')
        analog = [name for name, neuron in neurons.items() if neuron.output == 'analog']
        if analog:
            raise ValueError(f"'{analog[0]}' ({type(neurons[analog[0]]).__name__}) passes on analog values, which have "
                             f'no firing rate.')
        self.recording = False
        self._gradients = False
        self._seen: Dict[str, List[_Call]] = {}
        for name, lif in neurons.items():
            lif.register_forward_hook(_RateHook(self, name))

    def begin(self) -> None:
        """Start recording."""
        self._seen = {}
        self._gradients = torch.is_grad_enabled()
        self.recording = True

    def record(self, name: str, lif: SpikingNeuron, out: torch.Tensor) -> None:
        """Add the output of one neuron call.

        Raises:
            RuntimeError: The neuron ran without gradients although recording started with gradients on.
        """
        if self._gradients and not torch.is_grad_enabled():
            raise RuntimeError(f"'{name}' ran without gradients, as under reentrant checkpointing, so its firing rate "
                               f'cannot be trained; use timm.layers.set_reentrant_ckpt(False).')
        self._seen.setdefault(name, []).append(_Call.of(lif, out))

    def take(self) -> Dict[str, torch.Tensor]:
        """Stop recording and return the firing rate of every layer that ran, 0-d, by name in the order of the first
        calls.
        """
        seen, self._seen, self.recording = self._seen, {}, False
        return {name: _rate(calls) for name, calls in seen.items()}

    def __getstate__(self) -> Dict[str, Any]:
        return {'recording': False, '_gradients': False, '_seen': {}}  # a copy starts without records


def _detached() -> RateRecorder:
    """Return a recorder without a model. Pickles of version 0.1.0 refer to this function."""
    recorder = RateRecorder.__new__(RateRecorder)
    recorder.recording, recorder._gradients, recorder._seen = False, False, {}
    return recorder
