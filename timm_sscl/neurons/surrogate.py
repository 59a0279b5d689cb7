"""Surrogate gradients of the Heaviside step."""
import torch


def rectangle_window(u: torch.Tensor, v_threshold: float) -> torch.Tensor:
    """Closed rectangle, Eq. 21 of the SSCL paper: dO/dU = 1 if 0 <= U <= 2 * v_threshold, else 0.

    Both ends belong to the window. An input of exactly 0 is common (ReLU, padding, empty event frames) and gives U = 0,
    which an open window would leave without a gradient.

    Args:
        u: Membrane potential before the reset, any shape.
        v_threshold: Firing threshold; the window is centred on it.

    Returns:
        Boolean tensor of u's shape, True where the gradient passes.
    """
    return (u >= 0) & (u <= 2 * v_threshold)
