"""BKDSNN: restore the teacher's feature from the student's with channels left out, and weighted logits (ECCV 2024)."""
from typing import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F

from .inputs import TrainStep
from .logits import as_float, check_logits, check_positive, check_share
from .maps import check_features, same_size, time_mean
from .registry import register_loss

__all__ = ['BKDSNNLoss', 'weighted_soft_loss']


def weighted_soft_loss(
        logits: torch.Tensor,
        teacher_logits: torch.Tensor,
        target: torch.Tensor,
        temperature: float = 2.,
) -> torch.Tensor:
    """Return temperature^2 * mean(w * CE(teacher || student)) on softened predictions (WSLD, Zhou 2021).

    The weight w = 1 - exp(-CE_S / CE_A) of a sample compares the cross-entropies with its label of student and teacher.
    It carries no gradient. A sample that the student knows better than the teacher has a small weight.

    Args:
        logits: Student logits, (B, K).
        teacher_logits: Teacher logits, (B, K).
        target: Labels (B,) or soft targets (B, K).
        temperature: Divides both logits.

    Raises:
        ValueError: The logits are not both (B, K) with equal sizes, or temperature is not positive.
    """
    check_logits(logits, teacher_logits)
    check_positive(temperature=temperature)
    student, teacher = as_float(logits), as_float(teacher_logits)
    target = target.to(student.dtype) if target.is_floating_point() else target
    with torch.no_grad():
        own, others = (F.cross_entropy(x, target, reduction='none') for x in (student, teacher))
        weight = 1 - torch.exp(-own / others.clamp(min=torch.finfo(others.dtype).tiny))
    soft = (teacher / temperature).softmax(-1)
    return temperature ** 2 * (weight * F.cross_entropy(student / temperature, soft, reduction='none')).mean()


@register_loss('bkdsnn', needs_teacher=True, needs_features=True, needs_shapes=True)
class BKDSNNLoss(nn.Module):
    """feature_weight * mean (G(m * student feature) - teacher feature)^2 + logit_weight * `weighted_soft_loss`.

    The features are those of the last tap that has spatial axes, averaged over time. In training, the mask m leaves
    out whole channels of a sample. The generator G, two 3x3 convolutions with a ReLU between them (linear maps for a
    feature without spatial axes), is trained with the student.

    The paper sums the squared errors and divides by the batch, with the weight 7e-5 or 2e-3. The mean here makes the
    weight independent of the feature's size: theirs corresponds to feature_weight = 2e-3 * C * H * W. Their code
    rescales the teacher's feature to the student's maximum on request; this loss does not.

    The mask is drawn on the device from torch's generator, in training mode only, so that a step may be captured in a
    CUDA graph.

    Args:
        mask: Share of the channels that are left out.
        feature_weight: Weight of the feature term.
        logit_weight: Weight of the logit term.
        temperature: Temperature of the logit term.

    Raises:
        ValueError: An option is out of its range.
    """

    def __init__(
            self,
            names: Sequence[str],
            student_channels: Sequence[int],
            teacher_channels: Sequence[int],
            student_shapes: Sequence[Sequence[int]],
            teacher_shapes: Sequence[Sequence[int]],
            mask: float = 0.15,
            feature_weight: float = 1.,
            logit_weight: float = 1.,
            temperature: float = 2.,
    ):
        super().__init__()
        check_share(mask=mask)
        check_positive(temperature=temperature)
        self.mask, self.temperature = mask, temperature
        self.feature_weight, self.logit_weight = feature_weight, logit_weight
        spatial = [len(shape) - 2 for shape in student_shapes]
        self.tap = max((i for i, axes in enumerate(spatial) if axes > 0), default=len(spatial) - 1)
        with torch.random.fork_rng(devices=[]):  # does not change other random numbers of the run
            self.generator = _generator(student_channels[self.tap], teacher_channels[self.tap], spatial[self.tap])

    def forward(self, step: TrainStep) -> torch.Tensor:
        student, teacher = map(time_mean, check_features(step.student_features, step.teacher_features)[self.tap])
        if self.training:
            kept = torch.rand(student.shape[:2], device=student.device) >= self.mask
            student = student * kept.view(*kept.shape, *(1,) * (student.ndim - 2)).to(student.dtype)
        dtype = next(self.generator.parameters()).dtype
        restored, teacher = same_size(as_float(self.generator(student.to(dtype))), teacher)
        features = (restored - teacher).square().mean()
        logits = weighted_soft_loss(step.logits, step.teacher_logits, step.target, self.temperature)
        return self.feature_weight * features + self.logit_weight * logits


def _generator(student: int, teacher: int, spatial: int) -> nn.Sequential:
    """Return the generator from student to teacher channels for a feature with this number of spatial axes."""
    def layer(channels: int) -> nn.Module:
        convolution = (None, nn.Conv1d, nn.Conv2d, nn.Conv3d)[spatial]
        return nn.Linear(channels, teacher) if convolution is None else convolution(channels, teacher, 3, padding=1)

    return nn.Sequential(layer(student), nn.ReLU(), layer(teacher))
