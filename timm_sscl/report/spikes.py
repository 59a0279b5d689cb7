"""Record all spikes of a forward, one bit each."""
from contextlib import ExitStack
from math import prod
from typing import Dict, List, NamedTuple, Tuple

import torch
import torch.nn as nn

from timm_sscl.neurons import SpikingNeuron

from .watching import neurons_to_watch

__all__ = ['record_spikes', 'SpikeRecord']


class _Call(NamedTuple):
    """Spikes of one call of a neuron layer."""
    bits: torch.Tensor  # (T, ceil(n / 8)) uint8; the first of eight spikes is the lowest bit
    shape: Tuple[int, ...]  # (T, B, ...)


class SpikeRecord:
    """Spikes of every neuron layer and timestep, eight per byte. `record_spikes` returns it.

    A layer has one call per time that it ran, in one forward or in several.
    """

    def __init__(self, model: nn.Module):
        self._neurons = neurons_to_watch(model)
        for name, neuron in self._neurons.items():
            if neuron.output != 'binary':
                raise ValueError(f'{name} ({type(neuron).__name__}): its output is not binary but {neuron.output}, and '
                                 f'a record has one bit per neuron and timestep.')
        self._calls: Dict[str, List[_Call]] = {}
        self._open = ExitStack()

    def __enter__(self) -> 'SpikeRecord':
        self._open.enter_context(torch.compiler.set_stance('force_eager'))
        for name, neuron in self._neurons.items():
            self._open.callback(neuron.register_forward_hook(
                lambda neuron, args, out, name=name: self._add(name, neuron, out.detach())).remove)
        return self

    def __exit__(self, *exc) -> None:
        self._open.close()

    @torch.no_grad()
    def _add(self, name: str, lif: SpikingNeuron, out: torch.Tensor) -> None:
        """Store the spikes of one call of a neuron layer.

        Raises:
            ValueError: The output is not binary.
        """
        if torch._C._current_graph_task_id() != -1:  # gradient checkpointing recomputes the forward in the backward
            return
        fired = out != 0
        unit = lif.unit()
        one = torch.ones((), dtype=out.dtype, device=out.device) if unit is None else unit.to(out.dtype)
        if not ((out == one) | ~fired).all() or not one.all():
            raise ValueError(f'{name}: its output is not binary (0 or 1, times its scale), so that a bit per neuron '
                             f'and step does not hold it; does a hook change it, or is a scale 0?')
        shape = lif.timesteps, len(out) // lif.timesteps, *out.shape[1:]
        self._calls.setdefault(name, []).append(_Call(_pack(fired.reshape(lif.timesteps, -1)), shape))

    @property
    def layers(self) -> List[str]:
        """Names of the layers that ran, in the order of their first calls."""
        return list(self._calls)

    @property
    def nbytes(self) -> int:
        """Memory of the record in bytes."""
        return sum(call.bits.nbytes for calls in self._calls.values() for call in calls)

    def num_calls(self, layer: str) -> int:
        """Return how often a layer ran."""
        return len(self._of(layer))

    def packed(self, layer: str, call: int = 0) -> torch.Tensor:
        """Return the bits of one call, (T, ceil(n / 8)) uint8, for n = B * C * ... neurons.

        Spike i of a timestep is bit i % 8 of byte i // 8.
        """
        return self._of(layer)[call].bits

    def spikes(self, layer: str, call: int = 0) -> torch.Tensor:
        """Return the spikes of one call, (T, B, ...) bool.

        Args:
            layer: Name of the neuron layer.
            call: Index of the call.

        Raises:
            KeyError: The layer did not run or does not exist.
        """
        bits, shape = self._of(layer)[call]
        return _unpack(bits, prod(shape[1:])).view(shape)

    def __getitem__(self, layer: str) -> torch.Tensor:
        """Return the spikes of a layer that ran once, (T, B, ...) bool."""
        if self.num_calls(layer) > 1:
            raise KeyError(f'{layer} ran {self.num_calls(layer)} times; spikes({layer!r}, call=i) says which.')
        return self.spikes(layer)

    def _of(self, layer: str) -> List[_Call]:
        if layer not in self._calls:
            raise KeyError(f'{layer} did not run; recorded are {", ".join(self._calls) or "no layers"}.')
        return self._calls[layer]


def _pack(fired: torch.Tensor) -> torch.Tensor:
    """Pack bits: (T, n) bool to (T, ceil(n / 8)) uint8."""
    rows = nn.functional.pad(fired.view(torch.uint8), (0, -fired.shape[1] % 8)).unflatten(1, (-1, 8))
    bits = rows[..., 0].clone()
    for i in range(1, 8):
        bits |= rows[..., i] << i
    return bits


def _unpack(bits: torch.Tensor, n: int) -> torch.Tensor:
    """Unpack bits: (T, ceil(n / 8)) uint8 to (T, n) bool."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits.unsqueeze(-1) >> places) & 1).flatten(1)[:, :n].bool()


def record_spikes(model: nn.Module) -> SpikeRecord:
    """Record every spike of the forwards inside a with block, one bit each.

    Args:
        model: Spiking model. A compiled one runs eagerly inside: torch.compile ignores hooks that are added after it.

    Returns:
        SpikeRecord, a context manager that can be read inside and after the block.

    Raises:
        ValueError: The model has no neurons; or, in the forward, a layer's output is not binary.

    Examples:
        ```python
        with record_spikes(model) as record, torch.no_grad():
            model(images)
        record['layer1.0.act1'][0]  # spikes of the first timestep, (B, C, H, W) bool
        ```
    """
    return SpikeRecord(model)
