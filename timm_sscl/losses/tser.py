"""TSER: cross-entropy and distillation at every timestep with an entropy bonus (CVPR 2025)."""
import torch
import torch.nn as nn
import torch.nn.functional as F

from .inputs import TrainStep
from .kd import kd_step_loss
from .logits import as_float, check_positive, check_share
from .registry import register_loss
from .tet import tet_loss

__all__ = ['TSERLoss', 'step_entropy']


def step_entropy(step_logits: torch.Tensor, temperature: float = 1.) -> torch.Tensor:
    """Return the mean entropy, in nats, of the softened predictions (..., K)."""
    check_positive(temperature=temperature)
    log_p = F.log_softmax(as_float(step_logits) / temperature, -1)
    return -(log_p.exp() * log_p).sum(-1).mean()


@register_loss('tser', needs_teacher=True)
class TSERLoss(nn.Module):
    """(1 - a) * mean_t CE(o_t, y) + a * mean_t KL_tau(teacher || o_t) - g * mean_t H(softmax(o_t / tau)).

    It classifies by itself; use it with --task-loss-weight 0. The paper's constants a and g are unknown; it reports
    temperatures from 2 to 6 as stable.

    Args:
        kd_share: Share a of the distillation, in [0, 1].
        entropy_weight: Weight g of the entropy, which pushes predictions towards the uniform distribution.
        temperature: Temperature tau of the distillation and of the entropy.

    Raises:
        ValueError: An option is out of range.
    """

    def __init__(self, kd_share: float = 0.5, entropy_weight: float = 0.1, temperature: float = 3.):
        super().__init__()
        check_share(kd_share=kd_share)
        check_positive(temperature=temperature)
        self.kd_share, self.entropy_weight, self.temperature = kd_share, entropy_weight, temperature

    def forward(self, step: TrainStep) -> torch.Tensor:
        cross_entropy = tet_loss(step.step_logits, step.target, 0.)
        distillation = kd_step_loss(step.step_logits, step.teacher_logits, self.temperature)
        entropy = step_entropy(step.step_logits, self.temperature)
        return (1 - self.kd_share) * cross_entropy + self.kd_share * distillation - self.entropy_weight * entropy
