"""Read the membrane potentials of a training forward, with gradients."""
from typing import Dict, NamedTuple

import torch

from timm_sscl.neurons import SpikingNeuron

from .neuron_recorder import NeuronRecorder

__all__ = ['MembraneRecorder']


class _Call(NamedTuple):
    """One neuron call: the neuron and its input current."""
    neuron: SpikingNeuron
    x: torch.Tensor


class MembraneRecorder(NeuronRecorder):
    """Return the potential of every neuron layer in a forward between `begin` and `take`.

    It stores the layers' input currents and runs the recursion over time on them again. The neurons themselves run as
    always, so that their outputs do not change. The currents stay in memory until the backward, under gradient
    checkpointing, too.

    Args:
        model: Spiking model. Hooks are added to its neurons; add them before compiling it.

    Raises:
        ValueError: The model has no neurons, or one whose potential is unknown, see `SpikingNeuron.potential`.
    """
    what = 'membrane potentials'

    def check(self, name: str, neuron: SpikingNeuron) -> None:
        like = next((t for t in (*neuron.parameters(), *neuron.buffers())), torch.empty(()))
        x = torch.zeros(1 if neuron.encodes else neuron.timesteps, *(neuron.channels or (1,)), device=like.device)
        try:
            with torch.no_grad():
                neuron.potential(x)
        except ValueError as error:
            raise ValueError(f"'{name}' ({type(neuron).__name__}) has no membrane potential that a loss could read: "
                             f'{error}') from error

    def of_call(self, neuron: SpikingNeuron, x: torch.Tensor, out: torch.Tensor) -> _Call:
        return _Call(neuron, x)

    def take(self) -> Dict[str, torch.Tensor]:
        """Stop recording and return the potentials before the reset, divided by the threshold, (T, B, ...), by layer.

        The name of a layer that ran again has a number: 'act', 'act (2)'.
        """
        return {name if not i else f'{name} ({i + 1})': call.neuron.potential(call.x)
                for name, calls in self._stop().items() for i, call in enumerate(calls)}
