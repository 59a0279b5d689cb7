"""Check that student and teacher have the same classes if a loss compares logits class by class."""
from typing import Iterable, Optional, Sequence

import torch
import torch.nn as nn
from timm.utils import unwrap_model

from timm_sscl.losses import loss_spec
from timm_sscl.features.finding import run_probe

__all__ = ['check_classes']


def check_classes(
        student: nn.Module,
        teacher: nn.Module,
        losses: Iterable[str],
        input_size: Optional[Sequence[int]] = None,
        teacher_size: Optional[Sequence[int]] = None,
) -> None:
    """Check that student and teacher have equal numbers of classes if a loss compares their logits.

    Args:
        student: Student.
        teacher: Teacher.
        losses: Registered names.
        input_size: (C, H, W) of the student's images.
        teacher_size: (C, H, W) of the teacher's images.

    Raises:
        ValueError: The numbers differ.
    """
    losses = [name for name in losses if loss_spec(name).compares_classes]
    if not losses:
        return
    ours, theirs = _num_classes(student, input_size), _num_classes(teacher, teacher_size)
    if None not in (ours, theirs) and ours != theirs:
        raise ValueError(
            f'loss {", ".join(losses)} compares the logits class by class, but the student ({type(student).__name__}) '
            f'has {ours} classes and the teacher ({type(teacher).__name__}) {theirs}. Give both num_classes={ours}, or '
            f'compare features only (sscl, contrastive).')


def _num_classes(model: nn.Module, input_size: Optional[Sequence[int]]) -> Optional[int]:
    """Return the size of a timm model's last layer, or of the logits of one image; None if neither is known."""
    model = unwrap_model(model)
    classifier = model.get_classifier() if hasattr(model, 'get_classifier') else None
    if isinstance(classifier, nn.Linear):
        return classifier.out_features
    try:
        out = run_probe(model, input_size, model)
    except ValueError:
        return getattr(model, 'num_classes', None)
    return out.shape[1] if isinstance(out, torch.Tensor) and out.ndim > 1 else None
