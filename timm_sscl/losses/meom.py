"""MEOM: a different teacher for every timestep, and each timestep's mean should foresee the next one (ICLR 2026)."""
from typing import Sequence

import torch
import torch.nn as nn

from .inputs import TrainStep
from .kd import kd_loss
from .logits import as_float, check_positive, check_share
from .maps import check_features, time_mean
from .registry import register_loss
from .tet import tet_loss

__all__ = ['MEOMLoss', 'next_step_loss']


def next_step_loss(step_logits: torch.Tensor) -> torch.Tensor:
    """Return mean_t CE(p_{t+1}, p_t) over t < T, where p_t predicts from the mean of the first t timesteps' logits.

    The target p_{t+1} has no gradient. If all timesteps are equal, the loss is the entropy of their prediction. With
    one timestep, it is 0.

    Args:
        step_logits: Student logits of every timestep, (T, B, K).
    """
    o = as_float(step_logits)
    if len(o) == 1:
        return (o * 0).sum()
    count = torch.arange(1, len(o) + 1, dtype=o.dtype, device=o.device).view(-1, 1, 1)
    log_p = (o.cumsum(0) / count).log_softmax(-1)
    return -(log_p[1:].detach().exp() * log_p[:-1]).sum(-1).mean()


@register_loss('meom', needs_teacher=True, needs_features=True, needs_shapes=True, needs_teacher_head=True)
class MEOMLoss(nn.Module):
    """mean_t CE(o_t, y) + teacher_weight * mean_t KL_tau(a_t || o_t) + next_weight * `next_step_loss`.

    a_t = (1 - mix) * a + mix * head(f * m_t) is a teacher of timestep t's own: a are the teacher's logits, f its
    feature of the last tap and head its classifier. The mask m_t leaves out channels. There is one per timestep, drawn
    when the loss is built and fixed from then on. With mix = 0 the term is `kd_step_loss`. The loss classifies by
    itself; use it with --task-loss-weight 0.

    Re-implemented from a description of the paper. The two weights are the paper's. mix, mask and temperature are
    unknown, as is whether the target of the last term has a gradient: their defaults here are not the paper's.

    Args:
        teacher_weight: Weight of the teachers.
        next_weight: Weight of the prediction of the next timestep.
        mix: Share of the masked teacher in a_t.
        mask: Share of the channels that a mask leaves out.
        temperature: Temperature tau of the teachers.

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
            teacher_weight: float = 0.5,
            next_weight: float = 0.3,
            mix: float = 0.5,
            mask: float = 0.15,
            temperature: float = 3.,
    ):
        super().__init__()
        check_share(mix=mix, mask=mask)
        check_positive(temperature=temperature)
        self.teacher_weight, self.next_weight = teacher_weight, next_weight
        self.mix, self.temperature = mix, temperature
        timesteps = max(shape[0] for shape in student_shapes)
        with torch.random.fork_rng(devices=[]):  # does not change other random numbers of the run
            kept = torch.rand(timesteps, teacher_channels[-1]) >= mask
        self.register_buffer('masks', kept.float())  # one per timestep, the same after a resume

    def forward(self, step: TrainStep) -> torch.Tensor:
        cross_entropy = tet_loss(step.step_logits, step.target, 0.)
        teachers = self.teachers(step)
        teacher = kd_loss(step.step_logits.flatten(0, 1), teachers.flatten(0, 1), self.temperature)
        return cross_entropy + self.teacher_weight * teacher + self.next_weight * next_step_loss(step.step_logits)

    def teachers(self, step: TrainStep) -> torch.Tensor:
        """Return the logits a_t of every timestep's teacher, (T, B, K).

        Raises:
            ValueError: The student runs more timesteps than it did when the loss was built.
        """
        timesteps = len(step.step_logits)
        if timesteps > len(self.masks):
            raise ValueError(f"loss 'meom': {timesteps} timesteps, but it was built for {len(self.masks)}; build it "
                             f'anew after set_timesteps.')
        _, feature = check_features(step.student_features, step.teacher_features)[-1]
        feature = time_mean(feature)
        feature = feature.flatten(2).mean(2) if feature.ndim > 2 else feature
        masked = feature * self.masks[:timesteps].to(feature.dtype).unsqueeze(1)
        weight = next(step.teacher_head.parameters(), masked)
        logits = as_float(step.teacher_head(masked.to(weight.dtype)))
        return (1 - self.mix) * as_float(step.teacher_logits) + self.mix * logits
