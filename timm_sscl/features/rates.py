"""Firing rates of a training forward, with gradients."""
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch
import torch.nn as nn

from timm_sscl.neurons import SpikingNeuron

__all__ = ['RateRecorder']


class _Call(NamedTuple):
    """What is kept of a neuron's call: nothing that a checkpointed region would have to save."""
    mean: torch.Tensor  # of what it returned, per scale
    scale: Optional[torch.Tensor]
    elements: int

    @classmethod
    def of(cls, lif: SpikingNeuron, out: torch.Tensor) -> '_Call':
        first, sizes = out.ndim, ()
        if lif.scale is not None:
            first, sizes = out.ndim - lif.scale.ndim, lif.scale.shape
        alike = [i for i in range(out.ndim) if i < first or sizes[i - first] == 1]  # axes that share a scale
        return cls(out.mean(alike, dtype=torch.promote_types(out.dtype, torch.float32)), lif.scale, out.numel())

    @property
    def rate(self) -> torch.Tensor:
        """Mean of the spikes, 0 or 1, which a neuron returns times its scale."""
        return self.mean if self.scale is None else (self.mean / self.scale.to(self.mean.dtype).squeeze()).mean()


def _rate(calls: List[_Call]) -> torch.Tensor:
    """Rate over all calls of a neuron in a forward."""
    if len(calls) == 1:
        return calls[0].rate
    return sum(call.rate * call.elements for call in calls) / sum(call.elements for call in calls)


class _RateHook:
    """Forward hook of a neuron that tells a recorder; a copy of the model has a copy of it, which tells the recorder's
    copy."""

    def __init__(self, recorder: Optional['RateRecorder'] = None, name: str = ''):
        self.recorder = recorder
        self.name = name

    def __call__(self, lif: SpikingNeuron, args: Tuple[Any, ...], out: torch.Tensor) -> None:
        if self.recorder is not None and self.recorder.recording:
            self.recorder.saw(self.name, lif, out)


class RateRecorder:
    """Mean spikes per neuron and step of every neuron layer between `begin` and `take`, differentiable.

    It costs a mean per layer while it records and a call per layer otherwise. It records under gradient checkpointing,
    whose recomputation runs after `take` and is not seen, and in a compiled model; not in both at once, where dynamo
    refuses the side effect.

    Args:
        model: Spiking model; hooks are added to its neurons, before any compilation.

    Raises:
        ValueError: The model has no neurons.
    """

    def __init__(self, model: nn.Module):
        neurons = {name: module for name, module in model.named_modules() if isinstance(module, SpikingNeuron)}
        if not neurons:
            raise ValueError(f'{type(model).__name__} has no spiking neurons, so no firing rates.')
        self.recording = False
        self._gradients = False
        self._seen: Dict[str, List[_Call]] = {}
        for name, lif in neurons.items():
            lif.register_forward_hook(_RateHook(self, name))

    def begin(self) -> None:
        """Record from here on."""
        self._seen = {}
        self._gradients = torch.is_grad_enabled()
        self.recording = True

    def saw(self, name: str, lif: SpikingNeuron, out: torch.Tensor) -> None:
        if self._gradients and not torch.is_grad_enabled():
            raise RuntimeError(f"'{name}' ran without gradients, as under reentrant checkpointing, so its firing rate "
                               f'cannot be trained; use timm.layers.set_reentrant_ckpt(False).')
        self._seen.setdefault(name, []).append(_Call.of(lif, out))

    def take(self) -> Dict[str, torch.Tensor]:
        """Stop, and return the rate of every layer that ran, 0-d, by its name and in the order of the first calls."""
        seen, self._seen, self.recording = self._seen, {}, False
        return {name: _rate(calls) for name, calls in seen.items()}

    def __getstate__(self) -> Dict[str, Any]:
        return {'recording': False, '_gradients': False, '_seen': {}}  # a copy starts afresh


def _detached() -> RateRecorder:
    """A recorder without a model: what pickles of version 0.1.0 hold."""
    recorder = RateRecorder.__new__(RateRecorder)
    recorder.recording, recorder._gradients, recorder._seen = False, False, {}
    return recorder
