"""SeAl-KD: per-timestep distillation that corrects wrong predictions, and agreement between timesteps (2026)."""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from .inputs import TrainStep
from .kd import kd_loss
from .logits import as_float, check_positive, hard_labels
from .registry import register_loss
from .tet import tet_loss

__all__ = ['SeAlKDLoss', 'error_aware_loss', 'step_agreement_loss']


def error_aware_loss(
        step_logits: torch.Tensor,
        teacher_logits: torch.Tensor,
        target: torch.Tensor,
        temperature: float = 3.,
) -> torch.Tensor:
    """Return mean_t KL(teacher || student at t), times temperature^2, with both logits corrected at wrong predictions.

    Where a timestep predicts j instead of the label y, the student's logit j is replaced by its logit y, which then
    gets the gradient of both. The teacher's logits j and y become the smaller of the two. Where all timesteps are
    right, this is `kd_step_loss`.

    Args:
        step_logits: Student logits of every timestep, (T, B, K).
        teacher_logits: Teacher logits, (B, K).
        target: Labels, (B,).
        temperature: Divides both logits.

    Raises:
        ValueError: target is soft, the sizes do not fit, or temperature is not positive.
    """
    o, label = as_float(step_logits), hard_labels(target, step_logits, 'seal_kd').expand(len(step_logits), -1)
    a = as_float(teacher_logits).expand_as(o)
    predicted, label = o.argmax(-1, keepdim=True), label.unsqueeze(-1)  # equal where the prediction is right
    corrected = o.scatter(-1, predicted, o.gather(-1, label))
    lower = torch.minimum(a.gather(-1, predicted), a.gather(-1, label))
    teacher = a.scatter(-1, predicted, lower).scatter(-1, label, lower)
    return kd_loss(corrected.flatten(0, 1), teacher.flatten(0, 1), temperature)


def step_agreement_loss(step_logits: torch.Tensor, temperature: float = 3.) -> torch.Tensor:
    """Return mean_t KL(s_t || o_t), times temperature^2, where s_t is a weighted mean of the other timesteps' logits.

    The weights are softmax_j(c_j * cos(o_t, o_j)) over the other timesteps j. The confidence c_j = 1 - H_j / ln K falls
    with the entropy of the prediction at j. s_t has no gradient. With one timestep, the loss is 0.

    Args:
        step_logits: Student logits of every timestep o, (T, B, K).
        temperature: Divides the logits of both.
    """
    o = as_float(step_logits)
    if len(o) == 1:
        return (o * 0).sum()
    with torch.no_grad():
        log_p = o.log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        confidence = 1 - entropy / (math.log(o.shape[-1]) if o.shape[-1] > 1 else 1.)
        direction = F.normalize(o, dim=-1)
        scores = torch.einsum('ibk,jbk->ijb', direction, direction) * confidence
        itself = torch.eye(len(o), dtype=torch.bool, device=o.device).unsqueeze(-1)
        weights = scores.masked_fill(itself, -math.inf).softmax(1)
        others = torch.einsum('ijb,jbk->ibk', weights, o)
    return kd_loss(o.flatten(0, 1), others.flatten(0, 1), temperature)


@register_loss('seal_kd', needs_teacher=True, needs_labels=True)
class SeAlKDLoss(nn.Module):
    """mean_t CE(o_t, y) + error_weight * `error_aware_loss` + agreement_weight * `step_agreement_loss`.

    It classifies by itself; use it with --task-loss-weight 0. It needs hard labels.

    Args:
        error_weight: Weight of the distillation with corrected logits.
        agreement_weight: Weight of the agreement between timesteps.
        temperature: Temperature of both.

    Raises:
        ValueError: temperature is not positive.
    """

    def __init__(self, error_weight: float = 0.6, agreement_weight: float = 0.15, temperature: float = 3.):
        super().__init__()
        check_positive(temperature=temperature)
        self.error_weight, self.agreement_weight, self.temperature = error_weight, agreement_weight, temperature

    def forward(self, step: TrainStep) -> torch.Tensor:
        error = error_aware_loss(step.step_logits, step.teacher_logits, step.target, self.temperature)
        agreement = step_agreement_loss(step.step_logits, self.temperature)
        cross_entropy = tet_loss(step.step_logits, step.target, 0.)
        return cross_entropy + self.error_weight * error + self.agreement_weight * agreement
