"""Spikes that layers keep for their backward are kept as bits."""
from contextlib import contextmanager
from typing import Any, Dict, Iterator, NamedTuple, Optional, Tuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from .backend import run
from .recursion import unpack_bits

__all__ = ['packed_spikes', 'active_packing', 'only_packing_hooks', 'SpikePacking']

_active: Optional['SpikePacking'] = None


class _Spikes(NamedTuple):
    """Spikes of one neuron call, as bits, and what tells their tensor again."""
    bits: torch.Tensor  # (ceil(T / 8), M), in the order of the storage
    timesteps: int
    storage: StorageWeakRef
    version: int


class _Packed(NamedTuple):
    """A tensor that a layer keeps: a view of a neuron's spikes."""
    spikes: _Spikes
    dtype: torch.dtype
    size: Tuple[int, ...]
    stride: Tuple[int, ...]
    offset: int


class SpikePacking:
    """Knows the spikes of one forward, and replaces them where autograd keeps them: one bit instead of a float each.

    A convolution or linear map keeps its input for its weight's gradient. Where that is a neuron's output, or any view
    of it, the bits are kept and the tensor is made again in the backward; what was written to since is kept as it is.
    """

    def __init__(self):
        self._spikes: Dict[int, _Spikes] = {}

    def add(self, spikes: torch.Tensor, bits: torch.Tensor, timesteps: int) -> None:
        """Remember a neuron's output, which is dense, and its bits."""
        storage = StorageWeakRef(spikes.untyped_storage())
        self._spikes[storage.cdata] = _Spikes(bits, timesteps, storage, spikes._version)

    def pack(self, x: torch.Tensor) -> Any:
        known = self._spikes.get(x.untyped_storage()._cdata)
        if known is None or known.version != x._version or known.storage.expired():
            return x, x._version
        return _Packed(known, x.dtype, x.size(), x.stride(), x.storage_offset())

    @staticmethod
    def unpack(packed: Any) -> torch.Tensor:
        if isinstance(packed, _Packed):
            flat = run(unpack_bits, (packed.spikes.bits,), packed.spikes.timesteps, packed.dtype).view(-1)
            return flat.as_strided(packed.size, packed.stride, packed.offset)
        x, version = packed
        if x._version != version:  # autograd's own check does not look behind hooks
            raise RuntimeError(f'a tensor of shape {tuple(x.shape)} that is needed for the gradient was modified by an '
                               f'inplace operation: it is at version {x._version}, version {version} was expected.')
        return x


def active_packing() -> Optional[SpikePacking]:
    """The packing that is on, if any."""
    return _active


def only_packing_hooks() -> bool:
    """Whether no hooks on saved tensors are active but those of a packing."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is None or (_active is not None and hooks[0] == _active.pack)


@contextmanager
def packed_spikes() -> Iterator[None]:
    """Run a spiking model's forward inside, and its layers keep spikes as bits for the backward.

    A convolution's or linear map's input then takes 1 / 32 of the memory (float32, T = 8; a byte is the least for up
    to 8 steps) and the backward has to make the floats again. Has no effect on a model that is compiled as a whole, and
    gives way to other hooks on saved tensors (checkpointing, offloading) that are active around it or inside.
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
