"""Projections g_S and g_A of a feature: from its mean over space and time, or from the whole feature."""
import math
from typing import List, Optional, Sequence, Tuple

import torch
import torch.nn as nn

__all__ = ['Projection', 'PooledProjection', 'FlattenedProjection']


class Projection:
    """Base of all projections: a linear map from a condensed feature to `dim` numbers.

    Args:
        dim: Common dimension of g_S and g_A.

    Attributes:
        needs_shapes: Whether the map depends on the whole shape of the feature.

    Raises:
        ValueError: dim is less than 1.
    """
    needs_shapes = False

    def __init__(self, dim: int = 128):
        if dim < 1:
            raise ValueError(f'dim={dim}: the projections need at least one dimension.')
        self.dim = dim

    def shapes(
            self,
            channels: Sequence[int],
            shapes: Optional[Sequence[Sequence[int]]],
            whose: str,
    ) -> List[Tuple[int, ...]]:
        """Return, per layer, the shape per sample for which the map is built.

        Args:
            channels: Channels of the feature per layer.
            shapes: (T, C, ...) of the feature per layer, if known.
            whose: 'student' or 'teacher', for messages.
        """
        raise NotImplementedError

    def condense(self, x: torch.Tensor) -> torch.Tensor:
        """Convert a feature (T, B, C, ...) to the map's input (B, numbers)."""
        raise NotImplementedError

    def check(self, name: str, x: torch.Tensor, shape: Tuple[int, ...]) -> None:
        """Raise ValueError if a feature does not have its layer's shape."""
        raise NotImplementedError

    def create(self, shape: Sequence[int]) -> nn.Linear:
        """Create the map of a layer."""
        return nn.Linear(math.prod(shape), self.dim)

    def __repr__(self) -> str:
        return f'{type(self).__name__}(dim={self.dim})'


class PooledProjection(Projection):
    """Project the feature averaged over space and time, C numbers."""

    def shapes(self, channels, shapes, whose):
        return [(c,) for c in channels]

    def condense(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim <= 3:
            return x.mean(0)
        over_space = x.flatten(3).mean(3, dtype=torch.promote_types(x.dtype, torch.float32))  # both at once are slow
        return over_space.mean(0).to(x.dtype)

    def check(self, name, x, shape):
        if x.ndim < 3 or x.shape[2] != shape[0]:
            raise ValueError(f'{name} has shape {tuple(x.shape)}, expected (T, B, {shape[0]}, ...).')


class FlattenedProjection(Projection):
    """Project the whole feature, T * C * H * W numbers: 25 M weights per layer at ImageNet size.

    T and the image size are then fixed.
    """

    needs_shapes = True

    def shapes(self, channels, shapes, whose):
        if shapes is None:
            raise ValueError(f"projection='flattened' needs {whose}_shapes, (T, C, ...) of every layer's feature.")
        shapes = [tuple(shape) for shape in shapes]
        if [shape[1] for shape in shapes] != list(channels):
            raise ValueError(f'{whose}_shapes={shapes}: must be (T, C, ...) per layer, with C = {list(channels)}.')
        return shapes

    def condense(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(0, 1).flatten(1)

    def check(self, name, x, shape):
        if (*x.shape[:1], *x.shape[2:]) != shape:
            raise ValueError(
                f'{name} has shape {tuple(x.shape)}, but its flattened projection was built for (T, C, ...) = {shape}: '
                f"the time steps and the input size must be the probe's (input_size=...); projection='pooled' takes "
                f'any.')
