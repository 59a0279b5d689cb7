"""Functions for a neuron's parameters."""
from typing import Optional

import torch

__all__ = ['clamp_straight_through', 'binary_gate']


def clamp_straight_through(x: torch.Tensor, low: Optional[float] = None, high: Optional[float] = None) -> torch.Tensor:
    """Return x clamped to [low, high] with the gradient of x, so that a parameter outside the range can return."""
    return x.clamp(low, high).detach() + (x - x.detach())


def binary_gate(x: torch.Tensor) -> torch.Tensor:
    """Return 1 where x >= 1/2, else 0, with the gradient of x (straight-through)."""
    return (x >= .5).to(x.dtype) + (x - x.detach())
