"""Elementwise: neurons whose step treats every element by itself."""
from typing import Any

import torch

__all__ = ['Elementwise']


class Elementwise:
    """Part of a neuron that says whether its step treats every element by itself.

    If it does, `start` returns the same for all elements. If the constants are scalars, too, compiled code sees the
    elements of a timestep as one row, saves only the input, and computes the gradient from it. A subclass with its own
    step, start or constants declares `elementwise` again.
    """
    elementwise = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if {'step', 'start', 'constants'} & vars(cls).keys() and 'elementwise' not in vars(cls):
            cls.elementwise = False

    def first_current(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return what `start` takes: the first timestep of a current (T, B, ...); one element if all start alike."""
        return x.new_zeros((), dtype=dtype) if self.elementwise else x[0].to(dtype)
