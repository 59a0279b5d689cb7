"""Tensors as the neuron's code wants them: (T, M) in the order of the storage, whatever the memory format."""
from math import prod
from typing import NamedTuple, Optional, Sequence, Tuple

import torch

__all__ = ['Flat']


class Flat(NamedTuple):
    """How an input (T, ...) and all that goes with it is seen as rows of time steps, and back.

    Without a shape, tensors stay as they are: in a graph that is being compiled, and where a gain fits no one axis.
    """
    size: Tuple[int, ...]
    stride: Tuple[int, ...]  # of the spikes: the input's, or contiguous where it has gaps or time is not outermost
    shape: Optional[Tuple[int, ...]]
    gain: Optional[torch.Tensor]  # broadcasts against a step in the new shape

    @classmethod
    def of(cls, x: torch.Tensor, gain: Optional[torch.Tensor]) -> 'Flat':
        as_it_is = cls(x.size(), x.stride(), None, gain)
        if torch.compiler.is_compiling() or type(x) is not torch.Tensor:
            return as_it_is
        stride = _dense_stride(x) or _contiguous_stride(x.shape)
        if gain is None or gain.numel() == 1:
            shape, gain = (x.shape[0], prod(x.shape[1:])), None if gain is None else gain.view(())
            return cls(x.size(), stride, shape, gain)
        axes = [x.ndim - gain.ndim + i for i, n in enumerate(gain.shape) if n > 1]
        if len(axes) != 1 or axes[0] < 1 or x.shape[axes[0]] != gain.numel():
            return as_it_is
        axis, inside = axes[0], [a for a in range(1, x.ndim) if x.shape[a] > 1]
        outer = prod(x.shape[a] for a in inside if stride[a] > stride[axis])
        inner = prod(x.shape[a] for a in inside if stride[a] < stride[axis])
        return cls(x.size(), stride, (x.shape[0], outer, x.shape[axis], inner), gain.view(-1, 1))

    def view(self, x: torch.Tensor) -> torch.Tensor:
        """x, of the input's size, in the flat shape; a copy where its strides are others."""
        if self.shape is None:
            return x
        stride = _contiguous_stride(self.shape)
        if x.stride(0) == 0 and x.stride()[1:] == self.stride[1:]:  # a current that is the same at every step
            return x.as_strided(self.shape, (0, *stride[1:]))
        if x.stride() != self.stride:
            x = torch.empty_strided(self.size, self.stride, dtype=x.dtype, device=x.device).copy_(x)
        return x.as_strided(self.shape, stride)

    def restore(self, flat: torch.Tensor) -> torch.Tensor:
        """A fresh tensor of the flat shape, in place, with the input's size and strides; no view of another."""
        return flat if self.shape is None else flat.as_strided_(self.size, self.stride)


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
