"""EnOF: distil through the teacher's classifier, applied to the features of both networks (NeurIPS 2024)."""
from typing import Sequence

import torch
import torch.nn as nn

from .inputs import TrainStep
from .kd import kd_loss
from .logits import check_positive
from .maps import check_features, time_mean
from .registry import register_loss

__all__ = ['EnOFLoss']


@register_loss('enof', needs_features=True, needs_teacher_head=True, minimum='teacher')
class EnOFLoss(nn.Module):
    """KL(head(teacher feature) || head(student feature)) of the last tap, the head being the teacher's classifier.

    Both features are averaged over time and space. If the numbers of channels differ, a linear map, trained with the
    student, takes the student's feature to the teacher's channels. The head is frozen. The paper's weight and
    temperature could not be checked, so the defaults are not from the paper. The paper also changes the last
    activation, which changes inference; this loss does not.

    Args:
        temperature: Temperature that divides both logits; the loss is multiplied by its square.

    Raises:
        ValueError: temperature is not positive.
    """

    def __init__(
            self,
            names: Sequence[str],
            student_channels: Sequence[int],
            teacher_channels: Sequence[int],
            temperature: float = 1.,
    ):
        super().__init__()
        check_positive(temperature=temperature)
        self.temperature = temperature
        student, teacher = student_channels[-1], teacher_channels[-1]
        with torch.random.fork_rng(devices=[]):  # does not change other random numbers of the run
            self.map = nn.Identity() if student == teacher else nn.Linear(student, teacher)

    def forward(self, step: TrainStep) -> torch.Tensor:
        student, teacher = (time_mean(x) for x in check_features(step.student_features, step.teacher_features)[-1])
        student, teacher = (x.flatten(2).mean(2) if x.ndim > 2 else x for x in (student, teacher))
        weight = next(step.teacher_head.parameters(), student)
        if isinstance(self.map, nn.Linear):
            student = self.map(student.to(self.map.weight.dtype))
        logits, teacher_logits = (step.teacher_head(x.to(weight.dtype)) for x in (student, teacher))
        return kd_loss(logits, teacher_logits, self.temperature)
