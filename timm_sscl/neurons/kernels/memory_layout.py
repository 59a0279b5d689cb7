"""Tensors as the neuron's code wants them: (T, M) in the order of the storage, whatever the memory format."""
from math import prod
from typing import NamedTuple, Optional, Sequence, Tuple

import torch

__all__ = ['Flat']

_CHANNELS = 2  # axis of the channels in (T, B, C, ...)


class Flat(NamedTuple):
    """How an input (T, ...) and all that goes with it is seen as rows of time steps, and back.

    The shape is (T, M), or (T, outer, n, inner) where a factor goes along one axis of n. Without a shape, tensors stay
    as they are: in a graph that is being compiled, and where a gain fits no one axis.
    """
    size: Tuple[int, ...]
    stride: Tuple[int, ...]  # of the spikes: the input's, or contiguous where it has gaps or time is not outermost
    shape: Optional[Tuple[int, ...]]
    gain: Optional[torch.Tensor]  # broadcasts against a step in this shape
    axis: Optional[int]  # of the input, along which the gain goes

    @classmethod
    def of(cls, x: torch.Tensor, gain: Optional[torch.Tensor]) -> 'Flat':
        as_it_is = cls(x.size(), x.stride(), None, gain, None)
        if torch.compiler.is_compiling() or type(x) is not torch.Tensor:
            return as_it_is
        stride = _dense_stride(x) or _contiguous_stride(x.shape)
        if gain is None or gain.numel() == 1:
            shape, gain = (x.shape[0], prod(x.shape[1:])), None if gain is None else gain.view(())
            return cls(x.size(), stride, shape, gain, None)
        axes = [x.ndim - gain.ndim + i for i, n in enumerate(gain.shape) if n > 1]
        if len(axes) != 1 or axes[0] < 1 or x.shape[axes[0]] != gain.numel():
            return as_it_is
        return cls(x.size(), stride, _split(x.shape, stride, axes[0]), gain.view(-1, 1), axes[0])

    def by_channel(self) -> Optional['Flat']:
        """The same with an axis for the channels; None where a gain goes along another."""
        if self.shape is None or self.axis not in (None, _CHANNELS) or len(self.size) <= _CHANNELS:
            return None
        return self._replace(shape=_split(self.size, self.stride, _CHANNELS), axis=_CHANNELS)

    def view(self, x: torch.Tensor) -> torch.Tensor:
        """x, of the input's size, in the flat shape, (1, ...) where all its steps are one; a copy where its strides are
        others."""
        if self.shape is None:
            return x
        shape = self.shape
        if x.stride(0) == 0 and x.stride()[1:] == self.stride[1:]:
            shape = 1, *shape[1:]
        elif x.stride() != self.stride:
            x = torch.empty_strided(self.size, self.stride, dtype=x.dtype, device=x.device).copy_(x)
        # on the same memory, but no view to autograd: the compiler would guard on the sizes of what it is a view of
        flat = torch.empty(0, dtype=x.dtype, device=x.device)
        return flat.set_(x.untyped_storage(), x.storage_offset(), shape, _contiguous_stride(shape))

    def restore(self, flat: torch.Tensor) -> torch.Tensor:
        """A fresh tensor of the flat shape, in place, with the input's size and strides; no view of another."""
        return flat if self.shape is None else flat.as_strided_(self.size, self.stride)


def _split(size: Sequence[int], stride: Sequence[int], axis: int) -> Tuple[int, ...]:
    """(T, outer, n, inner): what lies outside and inside of an axis in memory."""
    others = [a for a in range(1, len(size)) if a != axis and size[a] > 1]
    outer = prod(size[a] for a in others if stride[a] > stride[axis])
    return size[0], outer, size[axis], prod(size[1:]) // max(outer * size[axis], 1)


def _contiguous_stride(shape: Sequence[int]) -> Tuple[int, ...]:
    return tuple(prod(shape[i + 1:]) for i in range(len(shape)))


def _dense_stride(x: torch.Tensor) -> Optional[Tuple[int, ...]]:
    """Strides of spikes in x's memory format: x's own where it fills its memory, step after step, or repeats one step;
    None where it has gaps or another order."""
    step = 1
    for stride, size in sorted((x.stride(a), x.shape[a]) for a in range(1, x.ndim) if x.shape[a] != 1):
        if stride != step:
            return None
        step *= size
    if x.shape[0] > 1 and x.stride(0) not in (0, step):
        return None
    return step, *x.stride()[1:]
