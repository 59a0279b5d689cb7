"""Small functions for a neuron's parameters."""
from typing import Optional

import torch

__all__ = ['held', 'binary_gate']


def held(x: torch.Tensor, low: Optional[float] = None, high: Optional[float] = None) -> torch.Tensor:
    """x within [low, high]; the gradient is that of x, so that a parameter beyond an end can come back."""
    return x.clamp(low, high).detach() + (x - x.detach())


def binary_gate(x: torch.Tensor) -> torch.Tensor:
    """1 where x >= 1/2, else 0, with the gradient of x (straight-through)."""
    return (x >= .5).to(x.dtype) + (x - x.detach())
