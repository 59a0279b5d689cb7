"""Common parts of losses on features: averages over time, and maps of two networks resized to one size."""
from typing import List, Sequence, Tuple

import torch
import torch.nn.functional as F

from timm_sscl.time_axis import mean_over_time

from .logits import as_float

__all__ = ['check_features', 'same_size', 'time_mean']


def time_mean(x: torch.Tensor) -> torch.Tensor:
    """Average a feature (T, B, C, ...) over time to (B, C, ...), at least float32."""
    return mean_over_time(as_float(x))


def same_size(student: torch.Tensor, teacher: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return two maps (B, C, H, W) at the smaller size of both. The larger one is pooled.

    Raises:
        ValueError: The features have different numbers of axes.
    """
    if student.ndim != teacher.ndim:
        raise ValueError(f'student feature {tuple(student.shape)} and teacher feature {tuple(teacher.shape)} differ in '
                         f'their axes: compare taps of one kind.')
    if student.ndim != 4 or student.shape[2:] == teacher.shape[2:]:
        return student, teacher
    height, width = map(min, student.shape[2:], teacher.shape[2:])
    size = height, width
    return F.adaptive_avg_pool2d(student, size), F.adaptive_avg_pool2d(teacher, size)


def check_features(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> List[Tuple]:
    """Return the pairs of student and teacher features.

    Raises:
        ValueError: The numbers of taps or of samples differ.
    """
    if len(student) != len(teacher) or any(s.shape[1] != a.shape[1] for s, a in zip(student, teacher)):
        raise ValueError(f'student features {[tuple(s.shape) for s in student]} and teacher features '
                         f'{[tuple(a.shape) for a in teacher]} must be pairs (T, B, C, ...) of the same samples.')
    return list(zip(student, teacher))
