"""Knowledge distillation of standardised logits (Sun 2024): the student does not have to match the teacher's scale."""
import torch
import torch.nn as nn

from .inputs import TrainStep
from .kd import kd_loss
from .logits import as_float, check_positive
from .registry import register_loss

__all__ = ['StandardizedKDLoss', 'standardize']


def standardize(logits: torch.Tensor) -> torch.Tensor:
    """Subtract from logits their mean over the classes, and divide by their standard deviation (unbiased) plus 1e-7.

    A row of one class, or of equal logits, gives zeros.
    """
    logits = as_float(logits)
    centred = logits - logits.mean(-1, keepdim=True)
    variance = centred.square().sum(-1, keepdim=True) / max(logits.shape[-1] - 1, 1)
    constant = variance == 0
    deviation = torch.where(constant, torch.ones_like(variance), variance).sqrt()  # sqrt has no finite gradient at 0
    return centred / (deviation + 1e-7)


@register_loss('kd_standardized', needs_teacher=True, minimum='teacher')
class StandardizedKDLoss(nn.Module):
    """`kd_loss` of the student's mean logits and the teacher's, both standardised per sample.

    c * logits + d with c > 0 gives the same loss. The paper uses weights between 1 and 18 depending on the networks, 9
    with cross-entropy at 0.1.

    Args:
        temperature: Temperature that divides the standardised logits; 2 to 4 in the paper.

    Raises:
        ValueError: temperature is not positive.
    """

    def __init__(self, temperature: float = 2.):
        super().__init__()
        check_positive(temperature=temperature)
        self.temperature = temperature

    def forward(self, step: TrainStep) -> torch.Tensor:
        return kd_loss(standardize(step.logits), standardize(step.teacher_logits), self.temperature)
