"""Save the spikes that layers need for their backward as bits."""
from contextlib import contextmanager
from typing import Any, Dict, Iterator, NamedTuple, Optional, Tuple, Union

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from .chunks import run_unpack

__all__ = ['packed_spikes', 'active_packing', 'only_packing_hooks', 'SpikePacking']

_active: Optional['SpikePacking'] = None


class _Spikes(NamedTuple):
    """Spikes of one neuron call as bits, with the storage and version that identify their tensor."""
    bits: torch.Tensor  # (ceil(T / 8), M), in storage order
    timesteps: int
    storage: StorageWeakRef
    version: int


class _Packed(NamedTuple):
    """A saved tensor that is a view of a neuron's spikes."""
    spikes: _Spikes
    dtype: torch.dtype
    size: Tuple[int, ...]
    stride: Tuple[int, ...]
    offset: Union[int, torch.SymInt]


class SpikePacking:
    """Replace the spikes of one forward by bits where autograd saves them, instead of a float each.

    A convolution or linear layer saves its input for the gradient of its weight. If that is a neuron's output or a view
    of it, only the bits are kept, and the tensor is recomputed in the backward. A tensor that was modified is saved
    unchanged.
    """

    def __init__(self):
        self._spikes: Dict[int, _Spikes] = {}

    def add(self, spikes: torch.Tensor, bits: torch.Tensor, timesteps: int) -> None:
        """Register a neuron's output, which is dense, and its bits."""
        storage = StorageWeakRef(spikes.untyped_storage())
        self._spikes[storage.cdata] = _Spikes(bits, timesteps, storage, spikes._version)

    def pack(self, x: torch.Tensor) -> Any:
        """Return what autograd saves instead of a tensor."""
        known = self._spikes.get(x.untyped_storage()._cdata)
        if known is None or known.version != x._version or known.storage.expired():
            return x, x._version
        return _Packed(known, x.dtype, x.size(), x.stride(), x.storage_offset())

    @staticmethod
    def unpack(packed: Any) -> torch.Tensor:
        """Return the tensor for what `pack` returned."""
        if isinstance(packed, _Packed):
            flat = run_unpack(packed.spikes.bits, packed.spikes.timesteps, packed.dtype).view(-1)
            return flat.as_strided(packed.size, packed.stride, packed.offset)
        x, version = packed
        if x._version != version:  # autograd's own check does not apply to hooks
            raise RuntimeError(f'a tensor of shape {tuple(x.shape)} that is needed for the gradient was modified by an '
                               f'inplace operation: it is at version {x._version}, version {version} was expected.')
        return x


def active_packing() -> Optional[SpikePacking]:
    """Return the active packing, or None."""
    return _active


def only_packing_hooks() -> bool:
    """Return whether no hooks on saved tensors are active except those of a packing."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is None or (_active is not None and hooks[0] == _active.pack)


@contextmanager
def packed_spikes() -> Iterator[None]:
    """Run a spiking model's forward inside, so that its layers save spikes as bits for the backward.

    The input of a convolution or linear layer then takes 1 / 32 of the memory (float32, T = 8; one byte per 8 timesteps
    or less), and the backward recomputes the floats. It has no effect on a model that is compiled as a whole, nor
    together with other hooks on saved tensors (checkpointing, offloading).
    """
    global _active
    if not only_packing_hooks():
        yield
        return
    before, _active = _active, SpikePacking()
    try:
        with torch.autograd.graph.saved_tensors_hooks(_active.pack, _active.unpack):
            yield
    finally:
        _active = before
