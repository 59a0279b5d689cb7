"""TWSNN: every timestep classifies and learns from the teacher and from the mean of all timesteps (ICML 2025)."""
from typing import Literal

import torch
import torch.nn as nn

from .inputs import TrainStep
from .kd import kd_loss, kd_step_loss
from .logits import as_float, check_positive, hard_labels
from .registry import register_loss
from .tet import tet_loss

__all__ = ['TWSNNLoss', 'self_distillation_loss']


def self_distillation_loss(
        step_logits: torch.Tensor,
        target: torch.Tensor,
        steps: Literal['all', 'correct', 'correct_masked'] = 'all',
        temperature: float = 3.,
) -> torch.Tensor:
    """Return mean_t KL_tau(s || o_t), where s is the mean of a sample's logits over timesteps, without a gradient.

    Args:
        step_logits: Student logits at every timestep o, (T, B, K).
        target: Labels (B,); required if only correct timesteps are used.
        steps: Timesteps in the mean s: all, as in the paper, or those that predict the label. A sample without a
            correct timestep then has s = 0, a uniform teacher, as in the paper's code; if masked, it contributes 0.
        temperature: Divides both logits.

    Returns:
        0-d tensor, the mean over time and batch, times temperature^2.
    """
    o = as_float(step_logits)
    if steps == 'all':
        return kd_step_loss(o, o.mean(0).detach(), temperature)
    target = hard_labels(target, o, 'twsnn')
    correct = (o.argmax(-1) == target).to(o.dtype)
    count = correct.sum(0)
    s = (correct.unsqueeze(-1) * o).sum(0).detach() / count.clamp(min=1).unsqueeze(-1)
    if steps == 'correct':
        return kd_step_loss(o, s, temperature)
    known = (count > 0).to(o.dtype).unsqueeze(-1)
    # equal logits have no divergence and no gradient, so a masked sample contributes 0 to the mean
    return kd_loss((o * known).flatten(0, 1), (s * known).repeat(len(o), 1), temperature)


@register_loss('twsnn', needs_teacher=True, needs_labels=lambda options: options['steps'] != 'all')
class TWSNNLoss(nn.Module):
    """mean_t CE(o_t, y) + a * mean_t KL_tau(teacher || o_t) + b * mean_t KL_tau(s || o_t), with s the student's mean
    logits.

    It classifies by itself; use it with --task-loss-weight 0.

    Args:
        teacher_weight: Weight a of the teacher.
        self_weight: Weight b of the student's own mean.
        steps: Timesteps in the student's own mean: all of them, those that predict the label (uniform if there are
            none), or those with samples left out that have none. The last two need hard labels.
        temperature: Temperature tau of both; 3, and 1 in the code for ImageNet.

    Raises:
        ValueError: temperature is not positive, or steps is none of the three.
    """

    def __init__(
            self,
            teacher_weight: float = 0.2,
            self_weight: float = 0.5,
            steps: Literal['all', 'correct', 'correct_masked'] = 'all',
            temperature: float = 3.,
    ):
        super().__init__()
        check_positive(temperature=temperature)
        if steps not in ('all', 'correct', 'correct_masked'):
            raise ValueError(f"steps='{steps}': must be one of all, correct, correct_masked.")
        self.teacher_weight, self.self_weight = teacher_weight, self_weight
        self.steps, self.temperature = steps, temperature

    def forward(self, step: TrainStep) -> torch.Tensor:
        cross_entropy = tet_loss(step.step_logits, step.target, 0.)
        teacher = kd_step_loss(step.step_logits, step.teacher_logits, self.temperature)
        own = self_distillation_loss(step.step_logits, step.target, self.steps, self.temperature)
        return cross_entropy + self.teacher_weight * teacher + self.self_weight * own
