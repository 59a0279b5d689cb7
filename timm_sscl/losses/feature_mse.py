"""KDSNN's feature loss: the student's firing rates, mapped to the teacher's channels, should equal its features (Xu
2023).
"""
from typing import Sequence

import torch
import torch.nn as nn

from .inputs import TrainStep
from .maps import check_features, same_size, time_mean
from .registry import register_loss

__all__ = ['KDSNNFeatureLoss']


@register_loss('kdsnn_features', needs_features=True, minimum='teacher')
class KDSNNFeatureLoss(nn.Module):
    """Mean over the taps of the mean squared error between the mapped student feature and the teacher's.

    The student's feature is averaged over time, which gives the firing rate of spikes. A 1x1 map without bias precedes
    it if the numbers of channels differ, or always with align. Published code sums the errors. The mean here makes the
    weight independent of the feature's size.

    Args:
        align: Whether to use the map always, or only if needed; it is trained with the student.
    """

    def __init__(
            self,
            names: Sequence[str],
            student_channels: Sequence[int],
            teacher_channels: Sequence[int],
            align: bool = False,
    ):
        super().__init__()
        with torch.random.fork_rng(devices=[]):  # a run's other random numbers do not depend on this loss
            self.maps = nn.ModuleList(
                nn.Linear(s, a, bias=False) if align or s != a else nn.Identity()
                for s, a in zip(student_channels, teacher_channels))

    def forward(self, step: TrainStep) -> torch.Tensor:
        terms = []
        for linear, (s, a) in zip(self.maps, check_features(step.student_features, step.teacher_features)):
            s, a = same_size(time_mean(s), time_mean(a))
            if isinstance(linear, nn.Linear):
                s = linear(s.movedim(1, -1).to(linear.weight.dtype)).movedim(-1, 1)
            terms.append((s - a).square().mean())
        return torch.stack(terms).mean()
