"""Reshape tensors for the kernels to (T, M) in storage order, for any memory format."""
from math import prod
from typing import NamedTuple, Optional, Sequence, Tuple

import torch

__all__ = ['Flat', 'on_same_memory']

_CHANNELS = 2  # channel axis in (T, B, C, ...)


class Flat(NamedTuple):
    """View of an input (T, ...) and its companions as rows of timesteps, and back.

    The shape is (T, M), or (T, outer, n, inner) if a factor varies along one axis of size n. Without a shape, tensors
    stay unchanged: in a graph that is being compiled, or if a gain varies along several axes.
    """
    size: Tuple[int, ...]
    # stride of the spikes: the input's, or contiguous if the input has gaps or time is not outermost
    stride: Tuple[int, ...]
    shape: Optional[Tuple[int, ...]]
    gain: Optional[torch.Tensor]  # broadcasts against one timestep in this shape
    axis: Optional[int]  # axis of the input along which the gain varies

    @classmethod
    def of(cls, x: torch.Tensor, gain: Optional[torch.Tensor]) -> 'Flat':
        """Return the view for an input and a gain."""
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
        """Return the view with an axis for the channels; None if a gain varies along another axis."""
        if self.shape is None or self.axis not in (None, _CHANNELS) or len(self.size) <= _CHANNELS:
            return None
        return self._replace(shape=_split(self.size, self.stride, _CHANNELS), axis=_CHANNELS)

    def view(self, x: torch.Tensor) -> torch.Tensor:
        """Return x, of the input's size, in the flat shape; (1, ...) if all timesteps are equal, a copy if its strides
        differ.
        """
        if self.shape is None:
            return x
        shape = self.shape
        if x.stride(0) == 0 and x.stride()[1:] == self.stride[1:]:
            shape = 1, *shape[1:]
        elif x.stride() != self.stride:
            x = torch.empty_strided(self.size, self.stride, dtype=x.dtype, device=x.device).copy_(x)
        return on_same_memory(x, shape)

    def restore(self, flat: torch.Tensor) -> torch.Tensor:
        """Give a fresh tensor of the flat shape the input's size and strides, in place. It must not be a view."""
        return flat if self.shape is None else flat.as_strided_(self.size, self.stride)


def on_same_memory(x: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Return a contiguous tensor on the memory of x that is no view for autograd: the compiler would guard on the sizes
    of its base.
    """
    same = torch.empty(0, dtype=x.dtype, device=x.device)
    return same.set_(x.untyped_storage(), x.storage_offset(), shape, _contiguous_stride(shape))


def _split(size: Sequence[int], stride: Sequence[int], axis: int) -> Tuple[int, ...]:
    """Return (T, outer, n, inner): the sizes outside and inside of an axis in memory."""
    others = [a for a in range(1, len(size)) if a != axis and size[a] > 1]
    outer = prod(size[a] for a in others if stride[a] > stride[axis])
    return size[0], outer, size[axis], prod(size[1:]) // max(outer * size[axis], 1)


def _contiguous_stride(shape: Sequence[int]) -> Tuple[int, ...]:
    return tuple(prod(shape[i + 1:]) for i in range(len(shape)))


def _dense_stride(x: torch.Tensor) -> Optional[Tuple[int, ...]]:
    """Return strides for spikes in x's memory format; None if x has gaps or another order.

    These are x's own if it fills its memory timestep by timestep or repeats one timestep.
    """
    step = 1
    for stride, size in sorted((x.stride(a), x.shape[a]) for a in range(1, x.ndim) if x.shape[a] != 1):
        if stride != step:
            return None
        step *= size
    if x.shape[0] > 1 and x.stride(0) not in (0, step):
        return None
    return step, *x.stride()[1:]
