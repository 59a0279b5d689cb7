"""Pair the taps of student and teacher."""
from typing import List, Optional, Sequence, Tuple

import torch.nn as nn

from timm_sscl.features.features_only import find_output_taps
from timm_sscl.features.finding import find_taps, named_taps
from timm_sscl.features.stages import POOLED, match_by_depth
from timm_sscl.features.tap import Tap

__all__ = ['pair_taps']


def pair_taps(
        student: nn.Module,
        teacher: nn.Module,
        taps: Optional[Sequence[str]],
        teacher_taps: Optional[Sequence[str]],
        input_size: Optional[Sequence[int]],
        teacher_size: Optional[Sequence[int]],
) -> Tuple[List[Tap], ...]:
    """Return taps of both models in pairs: by name, or the stages at equal relative depth and the pooled feature, if
    both models have one.
    """
    if taps is None and teacher_taps is None:
        found = [find_output_taps(model, input_size=size) or find_taps(model, input_size=size)
                 for model, size in ((student, input_size), (teacher, teacher_size))]
        stages = [[tap for tap in of_model if tap.name != POOLED] for of_model in found]
        pooled = [[tap for tap in of_model if tap.name == POOLED] for of_model in found]
        kept = match_by_depth(*map(len, stages))
        return tuple([*(stages[k][i] for i in kept[k]), *(pooled[k] if all(pooled) else [])] for k in (0, 1))
    if taps is None:
        raise ValueError('teacher_taps without taps: name the student\'s modules as well.')
    taps = [taps] if isinstance(taps, str) else list(taps)
    if teacher_taps is None:
        teacher_taps = taps
    teacher_taps = [teacher_taps] if isinstance(teacher_taps, str) else list(teacher_taps)
    if len(taps) != len(teacher_taps) or not taps:
        raise ValueError(f'taps names {len(taps)} modules and teacher_taps {len(teacher_taps)}; '
                         f'they are compared in pairs.')
    return named_taps(student, taps, input_size), named_taps(teacher, teacher_taps, teacher_size)
