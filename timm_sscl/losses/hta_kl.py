"""HTA-KL: forward and reverse KL divergence, weighted by the differences of student and teacher (arXiv 2504.20445)."""
import torch
import torch.nn as nn
import torch.nn.functional as F

from .inputs import TrainStep
from .logits import as_float, check_logits, check_positive, check_share, kl
from .registry import register_loss

__all__ = ['HTAKLLoss', 'hta_kl_loss']


def hta_kl_loss(
        logits: torch.Tensor,
        teacher_logits: torch.Tensor,
        temperature: float = 3.,
        head_mass: float = 0.5,
) -> torch.Tensor:
    """Return temperature^2 times the mean over the batch of (g_h KL(p || q) + g_t KL(q || p)) / (g_h + g_t).

    p are the teacher's softened probabilities, q the student's. The head consists of the teacher's most probable
    classes whose sum is at most head_mass; the other classes are the tail. g_h and g_t are the sums of |p - q| over
    head and tail, without a gradient. A sample with p = q gives 0. The paper does not state threshold and temperature;
    head_mass is taken from AKL (arXiv 2404.02657), on which it builds.

    Args:
        logits: Student logits, (B, K).
        teacher_logits: Teacher logits, (B, K).
        temperature: Divides both logits.
        head_mass: Largest total probability of the head, in [0, 1].

    Raises:
        ValueError: The logits are not both (B, K), or an option is out of range.
    """
    check_logits(logits, teacher_logits)
    check_positive(temperature=temperature)
    check_share(head_mass=head_mass)
    log_q, log_p = (F.log_softmax(as_float(x) / temperature, -1) for x in (logits, teacher_logits))
    with torch.no_grad():
        p = log_p.exp()
        sorted_p, order = p.sort(dim=-1, descending=True, stable=True)
        head = torch.zeros_like(p, dtype=torch.bool).scatter(-1, order, sorted_p.cumsum(-1) <= head_mass)
        gap = (p - log_q.exp()).abs()
        total = gap.sum(-1)
        share = (gap * head).sum(-1) / torch.where(total > 0, total, torch.ones_like(total))
    forward, reverse = kl(log_p, log_q), kl(log_q, log_p)
    return temperature ** 2 * (share * forward + (1 - share) * reverse).mean()


@register_loss('hta_kl', needs_teacher=True, minimum='teacher')
class HTAKLLoss(nn.Module):
    """`hta_kl_loss` between the student's mean logits and the teacher's.

    Args:
        temperature: Temperature that divides both logits.
        head_mass: Largest total probability of the head of the teacher's classes.

    Raises:
        ValueError: An option is out of range.
    """

    def __init__(self, temperature: float = 3., head_mass: float = 0.5):
        super().__init__()
        check_positive(temperature=temperature)
        check_share(head_mass=head_mass)
        self.temperature, self.head_mass = temperature, head_mass

    def forward(self, step: TrainStep) -> torch.Tensor:
        return hta_kl_loss(step.logits, step.teacher_logits, self.temperature, self.head_mass)
