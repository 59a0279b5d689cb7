"""Decoupled knowledge distillation: separate weights for the target class and the other classes (Zhao 2022)."""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from .inputs import TrainStep
from .logits import as_float, check_logits, check_positive, check_share, hard_labels, kl
from .registry import register_loss
from .schedules import known_progress

__all__ = ['DKDLoss', 'dkd_loss']


def dkd_loss(
        logits: torch.Tensor,
        teacher_logits: torch.Tensor,
        target: torch.Tensor,
        alpha: float = 1.,
        beta: float = 8.,
        temperature: float = 4.,
) -> torch.Tensor:
    """Return temperature^2 * (alpha * TCKD + beta * NCKD), the mean over the batch.

    TCKD is the KL divergence of (target class, all others), NCKD that among the others, with the target class left out.
    With alpha = 1 and beta = 1 - p_target of the teacher, sample by sample, the sum is `kd_loss`.

    Args:
        logits: Student logits, (B, K).
        teacher_logits: Teacher logits, (B, K).
        target: Labels, (B,).
        alpha: Weight of TCKD.
        beta: Weight of NCKD.
        temperature: Divides both logits.

    Raises:
        ValueError: The shapes do not fit, target is soft, or temperature is not positive.
    """
    check_logits(logits, teacher_logits)
    check_positive(temperature=temperature)
    target = hard_labels(target, logits, 'dkd')
    student, teacher = (F.log_softmax(as_float(x) / temperature, -1) for x in (logits, teacher_logits))
    if logits.shape[1] < 2:
        return (student * 0).sum()
    mask = torch.arange(logits.shape[1], device=logits.device) == target.unsqueeze(-1)
    (student_two, student_rest), (teacher_two, teacher_rest) = (_decoupled(x, mask) for x in (student, teacher))
    nckd = (teacher_rest.exp() * (teacher_rest - student_rest)).masked_fill(mask, 0.).sum(-1)
    return temperature ** 2 * (alpha * kl(teacher_two, student_two) + beta * nckd).mean()


def _decoupled(log_p: torch.Tensor, target: torch.Tensor):
    """Return the log-probabilities of (target, others), (B, 2), and those among the others, (B, K).

    The target's entry of the second is 0.
    """
    of_target = log_p.masked_fill(~target, 0.).sum(-1)
    of_others = log_p.masked_fill(target, -math.inf).logsumexp(-1)
    rest = (log_p - of_others.unsqueeze(-1)).masked_fill(target, 0.)
    return torch.stack([of_target, of_others], -1), rest


@register_loss('dkd', needs_teacher=True, minimum='teacher', needs_labels=True)
class DKDLoss(nn.Module):
    """`dkd_loss` between the student's mean logits and the teacher's. It needs hard labels.

    Args:
        alpha: Weight of the term on the target class.
        beta: Weight of the term among the other classes; published values are 2, 6 or 8 by pair of networks.
        temperature: Temperature that divides both logits.
        warmup: Share of the training over which the loss grows linearly, epoch by epoch, from 0 to its weight. The
            authors' code uses 20 epochs of 240. 0 disables the warmup.

    Raises:
        ValueError: An option is out of its range.
    """

    def __init__(self, alpha: float = 1., beta: float = 8., temperature: float = 4., warmup: float = 0.):
        super().__init__()
        check_positive(temperature=temperature)
        check_share(warmup=warmup)
        self.warmup = warmup
        self.alpha, self.beta, self.temperature = alpha, beta, temperature

    def forward(self, step: TrainStep) -> torch.Tensor:
        loss = dkd_loss(step.logits, step.teacher_logits, step.target, self.alpha, self.beta, self.temperature)
        if not self.warmup:
            return loss
        return loss * (known_progress(step, warmup=self.warmup).to(loss.dtype) / self.warmup).clamp(max=1)
