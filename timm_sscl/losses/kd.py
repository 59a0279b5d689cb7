"""Hinton's knowledge distillation on the logits."""
import torch
import torch.nn as nn
import torch.nn.functional as F

from .factory import register_loss
from .step import TrainStep

__all__ = ['KDLoss', 'kd_loss']


def kd_loss(logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 4.) -> torch.Tensor:
    """KL(teacher || student) of the softened predictions, times temperature^2 (Hinton 2015).

    Args:
        logits: Student logits, (B, K).
        teacher_logits: Teacher logits, (B, K).
        temperature: Softening of both.

    Returns:
        0-d tensor, the mean over the batch.

    Raises:
        ValueError: The logits are not both (B, K), of the same samples and classes, or temperature is not positive.
    """
    if logits.ndim != 2 or logits.shape != teacher_logits.shape:
        raise ValueError(f'student logits {tuple(logits.shape)} and teacher logits {tuple(teacher_logits.shape)} must '
                         f'be (B, K), of the same samples and classes.')
    if not temperature > 0:
        raise ValueError(f'temperature={temperature}: must be positive.')
    dtype = torch.promote_types(logits.dtype, torch.float32)
    student, teacher = (F.log_softmax(x.to(dtype) / temperature, dim=-1) for x in (logits, teacher_logits))
    return F.kl_div(student, teacher, reduction='batchmean', log_target=True) * temperature ** 2


@register_loss('kd', needs_teacher=True)
class KDLoss(nn.Module):
    """`kd_loss` between the student's mean logits and the teacher's.

    Args:
        temperature: Softening of both.

    Raises:
        ValueError: temperature is not positive.
    """

    def __init__(self, temperature: float = 4.):
        super().__init__()
        if not temperature > 0:
            raise ValueError(f'temperature={temperature}: must be positive.')
        self.temperature = temperature

    def forward(self, step: TrainStep) -> torch.Tensor:
        return kd_loss(step.logits, step.teacher_logits, self.temperature)
