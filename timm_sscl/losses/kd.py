"""Hinton's knowledge distillation on logits: on their mean over time, or at every timestep."""
import torch
import torch.nn as nn
import torch.nn.functional as F

from .registry import register_loss
from .inputs import TrainStep

__all__ = ['KDLoss', 'StepKDLoss', 'kd_loss', 'kd_step_loss']


def kd_loss(logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 4.) -> torch.Tensor:
    """Return KL(teacher || student) of the softened predictions, times temperature^2 (Hinton 2015).

    Args:
        logits: Student logits, (B, K).
        teacher_logits: Teacher logits, (B, K).
        temperature: Divides the logits of both.

    Returns:
        0-d tensor, the mean over the batch.

    Raises:
        ValueError: The logits are not both (B, K) with equal sizes, or temperature is not positive.
    """
    if logits.ndim != 2 or logits.shape != teacher_logits.shape:
        raise ValueError(f'student logits {tuple(logits.shape)} and teacher logits {tuple(teacher_logits.shape)} must '
                         f'be (B, K), of the same samples and classes.')
    if not temperature > 0:
        raise ValueError(f'temperature={temperature}: must be positive.')
    dtype = torch.promote_types(logits.dtype, torch.float32)
    student, teacher = (F.log_softmax(x.to(dtype) / temperature, dim=-1) for x in (logits, teacher_logits))
    return F.kl_div(student, teacher, reduction='batchmean', log_target=True) * temperature ** 2


@register_loss('kd', needs_teacher=True, minimum='teacher')
class KDLoss(nn.Module):
    """`kd_loss` between the student's mean logits and the teacher's. SNNThroughKD (Takuya 2021) is this loss.

    Args:
        temperature: Divides the logits of both.

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


def kd_step_loss(step_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 3.) -> torch.Tensor:
    """Return the mean over the timesteps of KL(teacher || student at that timestep), times temperature^2 as in
    `kd_loss`.

    Args:
        step_logits: Student logits of every timestep, (T, B, K).
        teacher_logits: Teacher logits, the same for every timestep, (B, K).
        temperature: Divides the logits of both.

    Returns:
        0-d tensor, the mean over time and batch; never below `kd_loss` of the mean logits, since KL is convex in them.

    Raises:
        ValueError: The logits do not have equal numbers of samples and classes.
    """
    if step_logits.ndim != 3 or step_logits.shape[1:] != teacher_logits.shape:
        raise ValueError(f'student logits {tuple(step_logits.shape)} must be (T, B, K), and (B, K) that of the teacher '
                         f'logits {tuple(teacher_logits.shape)}.')
    return kd_loss(step_logits.flatten(0, 1), teacher_logits.repeat(step_logits.shape[0], 1), temperature)


@register_loss('kd_step', needs_teacher=True, minimum='teacher')
class StepKDLoss(nn.Module):
    """`kd_step_loss` between the student's logits at every timestep and the teacher's.

    Together with cross-entropy at every timestep, these are the first two terms of TWSNN: {'tet': 1., 'kd_step': 0.2}
    with tet's mse_share=0 and task_loss_weight=0.

    Args:
        temperature: Divides the logits of both.

    Raises:
        ValueError: temperature is not positive.
    """

    def __init__(self, temperature: float = 3.):
        super().__init__()
        if not temperature > 0:
            raise ValueError(f'temperature={temperature}: must be positive.')
        self.temperature = temperature

    def forward(self, step: TrainStep) -> torch.Tensor:
        return kd_step_loss(step.step_logits, step.teacher_logits, self.temperature)
