"""DIST: match the correlation of predictions instead of their values (Huang 2022)."""
import torch
import torch.nn as nn

from timm_sscl.distributed import gather_rows

from .inputs import TrainStep
from .logits import as_float, check_logits, check_positive
from .registry import register_loss

__all__ = ['DISTLoss', 'dist_loss']


def dist_loss(
        logits: torch.Tensor,
        teacher_logits: torch.Tensor,
        temperature: float = 4.,
        inter: float = 2.,
        intra: float = 2.,
) -> torch.Tensor:
    """Return temperature^2 * (inter * (1 - mean row correlation) + intra * (1 - mean column correlation)).

    Rows are samples and columns classes of the softened probabilities; the correlation is Pearson's. A row or column
    that is constant on both sides counts as 1, one that is constant on one side as 0.

    Args:
        logits: Student logits, (B, K), of the whole batch: the columns depend on it.
        teacher_logits: Teacher logits, (B, K).
        temperature: Divides both logits.
        inter: Weight of the rows.
        intra: Weight of the columns.

    Raises:
        ValueError: The logits are not both (B, K), or temperature is not positive.
    """
    check_logits(logits, teacher_logits)
    check_positive(temperature=temperature)
    student, teacher = ((as_float(x) / temperature).softmax(-1) for x in (logits, teacher_logits))
    rows, columns = _correlation(student, teacher), _correlation(student.mT, teacher.mT)
    return temperature ** 2 * (inter * (1 - rows.mean()) + intra * (1 - columns.mean()))


def _correlation(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return Pearson's correlation of the rows, (rows,)."""
    x, y = (z - z.mean(-1, keepdim=True) for z in (x, y))
    norms = [torch.linalg.vector_norm(z, dim=-1) for z in (x, y)]
    # probabilities are at most 1, so their rounding error is at most a few eps
    constant = [norm <= 8 * torch.finfo(norm.dtype).eps for norm in norms]
    x, y = (z / torch.where(flat, torch.ones_like(norm), norm).unsqueeze(-1)
            for z, norm, flat in zip((x, y), norms, constant))
    product = (x * y).sum(-1)
    product = torch.where(constant[0] | constant[1], torch.zeros_like(product), product)
    return torch.where(constant[0] & constant[1], torch.ones_like(product), product)


@register_loss('dist', needs_teacher=True, global_batch=True, minimum='teacher')
class DISTLoss(nn.Module):
    """`dist_loss` between the student's mean logits and the teacher's, over the global batch.

    Args:
        temperature: Temperature that divides both logits; 1 for ImageNet and 4 for CIFAR in its source.
        inter: Weight of the correlation within a sample.
        intra: Weight of the correlation within a class, over the samples.

    Raises:
        ValueError: temperature is not positive.
    """

    def __init__(self, temperature: float = 4., inter: float = 2., intra: float = 2.):
        super().__init__()
        check_positive(temperature=temperature)
        self.temperature, self.inter, self.intra = temperature, inter, intra

    def forward(self, step: TrainStep) -> torch.Tensor:
        logits, teacher_logits = gather_rows(step.logits), gather_rows(step.teacher_logits)
        return dist_loss(logits, teacher_logits, self.temperature, self.inter, self.intra)
