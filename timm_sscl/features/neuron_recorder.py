"""NeuronRecorder: base of what reads every neuron layer of a student in a training forward."""
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.nn as nn

from timm_sscl.neurons import SpikingNeuron

__all__ = ['NeuronRecorder', 'NeuronHook']


class NeuronHook:
    """Forward hook of a neuron that passes its input and output to a recorder.

    A copy of the model holds a copy of the hook, which refers to the copy of the recorder.
    """

    def __init__(self, recorder: Optional['NeuronRecorder'] = None, name: str = ''):
        self.recorder = recorder
        self.name = name

    def __call__(self, lif: SpikingNeuron, args: Tuple[Any, ...], out: torch.Tensor) -> None:
        if self.recorder is not None and self.recorder.recording and not lif.repeats:
            self.recorder.record(self.name, lif, args[0], out)


class NeuronRecorder:
    """Record something of every neuron call between `begin` and `_stop`, with gradients.

    It works under gradient checkpointing (the recomputation runs after the record and is ignored) and in a compiled
    model. Both at once fail: dynamo refuses the side effect. A subclass says what a call leaves (`of_call`).

    Args:
        model: Spiking model. Hooks are added to its neurons; add them before compiling it.

    Attributes:
        what: What is recorded, for messages.

    Raises:
        ValueError: The model has no neurons, or one that cannot be recorded.
    """
    what = ''

    def __init__(self, model: nn.Module):
        neurons = {name: module for name, module in model.named_modules() if isinstance(module, SpikingNeuron)}
        if not neurons:
            raise ValueError(f'{type(model).__name__} has no spiking neurons, so no {self.what}.')
        for name, neuron in neurons.items():
            self.check(name, neuron)
        self.recording = False
        self._gradients = False
        self._seen: Dict[str, List[Any]] = {}
        for name, neuron in neurons.items():
            neuron.register_forward_hook(NeuronHook(self, name))

    def check(self, name: str, neuron: SpikingNeuron) -> None:
        """Raise ValueError if a neuron cannot be recorded."""

    def of_call(self, neuron: SpikingNeuron, x: torch.Tensor, out: torch.Tensor) -> Any:
        """Return what to store of a neuron's call with input x and output out."""
        raise NotImplementedError

    def begin(self) -> None:
        """Start recording."""
        self._seen = {}
        self._gradients = torch.is_grad_enabled()
        self.recording = True

    def record(self, name: str, neuron: SpikingNeuron, x: torch.Tensor, out: torch.Tensor) -> None:
        """Add one neuron call.

        Raises:
            RuntimeError: The neuron ran without gradients although recording started with gradients on.
        """
        if self._gradients and not torch.is_grad_enabled():
            raise RuntimeError(f"'{name}' ran without gradients, as under reentrant checkpointing, so its {self.what} "
                               f'cannot be trained; use timm.layers.set_reentrant_ckpt(False).')
        self._seen.setdefault(name, []).append(self.of_call(neuron, x, out))

    def _stop(self) -> Dict[str, List[Any]]:
        """Stop recording and return the records of every layer that ran, by name in the order of the first calls."""
        seen, self._seen, self.recording = self._seen, {}, False
        return seen

    def __getstate__(self) -> Dict[str, Any]:
        return {'recording': False, '_gradients': False, '_seen': {}}  # a copy starts without records
