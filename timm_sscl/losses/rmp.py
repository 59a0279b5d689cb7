"""RMP-Loss: membrane potentials should lie near 0 or near the threshold, so that spikes lose little (Guo 2023)."""
import math
from typing import Literal, Sequence

import torch
import torch.nn as nn

from .inputs import TrainStep
from .membranes import hidden_layers
from .registry import register_loss
from .schedules import known_progress

__all__ = ['RMPLoss', 'rmp_loss']


def rmp_loss(membranes: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the mean over the layers of mean(min(|u|, |1 - u|)^2), 0-d.

    A potential below half the threshold is pushed to 0, any other to the threshold. The gradient jumps there.

    Args:
        membranes: Potentials u of every layer, in thresholds, (T, B, ...) each.
    """
    return torch.stack([(u - (u >= 0.5).to(u.dtype)).square().mean() for u in membranes]).mean()


@register_loss('rmp', needs_membranes=True, minimum=1.)
class RMPLoss(nn.Module):
    """`rmp_loss` of the student's neuron layers, with a weight that grows from 0 at the start of the training.

    Potentials are those before the reset, in units of the threshold. The schedule multiplies the loss by (1 - cos(pi
    p)) / 2, with p the completed share of the training when the epoch began. The paper's weight at the end, k, is 0.1
    (unverified): --loss rmp=0.1. It pulls to 0 as well as to the threshold, so watch the firing rates.

    Re-implemented from a description of the paper: no code was found, and whether the paper adds or averages the layers
    is unknown. This loss averages.

    Args:
        schedule: Whether the weight grows by a cosine or is constant.
        skip_ends: Whether to leave out the first and the last neuron layer.

    Raises:
        ValueError: schedule is none of the two.
    """

    def __init__(self, schedule: Literal['cosine', 'constant'] = 'cosine', skip_ends: bool = False):
        super().__init__()
        if schedule not in ('cosine', 'constant'):
            raise ValueError(f"schedule='{schedule}': must be one of cosine, constant.")
        self.schedule, self.skip_ends = schedule, skip_ends

    def forward(self, step: TrainStep) -> torch.Tensor:
        loss = rmp_loss(hidden_layers(step.membranes, self.skip_ends))
        if self.schedule == 'constant':
            return loss
        progress = known_progress(step, schedule=self.schedule).to(loss.dtype)
        return loss * (0.5 - 0.5 * torch.cos(math.pi * progress))
