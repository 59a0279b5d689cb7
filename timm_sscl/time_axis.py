"""Mean and repetition over the time axis, fast in every memory format.

torch reduces the first axis of a (T, B, C, H, W) tensor in channels_last many times slower than that of a contiguous
one, and the result is contiguous. Here the axes of a timestep are first put into the order of its memory.
"""
from typing import List

import torch

__all__ = ['mean_over_time', 'repeat_over_time']


def mean_over_time(x: torch.Tensor) -> torch.Tensor:
    """Return the mean (B, ...) of a tensor (T, B, ...), in the memory format of its timesteps."""
    order = _storage_order(x, first=1)
    return x.permute(0, *order).mean(0).permute([order.index(axis) for axis in range(1, x.ndim)])


def repeat_over_time(x: torch.Tensor, timesteps: int) -> torch.Tensor:
    """Return a view (T, B, ...) that repeats a tensor (B, ...). Its gradient has the memory format of x."""
    order = _storage_order(x)
    repeated = x.permute(order).expand(timesteps, *(x.shape[axis] for axis in order))
    return repeated.permute(0, *(1 + order.index(axis) for axis in range(x.ndim)))


def _storage_order(x: torch.Tensor, first: int = 0) -> List[int]:
    """Return the axes from a first one on, from the largest stride to the smallest."""
    axes = list(range(first, x.ndim))
    if torch.compiler.is_compiling():  # the compiler chooses the order itself
        return axes
    strides = x.stride()
    return sorted(axes, key=lambda axis: -strides[axis])
