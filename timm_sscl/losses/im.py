"""IM-Loss: the mean membrane potential of every layer should be where spikes carry most information (Guo 2022)."""
from typing import Literal

import torch
import torch.nn as nn

from timm_sscl.distributed import batch_mean

from .inputs import TrainStep
from .membranes import hidden_layers
from .registry import register_loss

__all__ = ['IMLoss', 'im_loss']


def im_loss(means: torch.Tensor, target: float) -> torch.Tensor:
    """Return the mean over the layers of (mean potential - target)^2, 0-d.

    Args:
        means: Mean potential of every layer over timesteps, batch and neurons, in thresholds, (L,).
        target: Potential in thresholds.
    """
    return (means - target).square().mean()


@register_loss('im', needs_membranes=True, global_batch=True, minimum=1.)
class IMLoss(nn.Module):
    """`im_loss` of the student's neuron layers: a symmetric potential around the threshold fires half of the time.

    Potentials are those before the reset, in units of the threshold, as means over the global batch.

    The paper's target is the threshold, which is the default. The authors' code takes 0.5 / T (0.5 in a line that is
    switched off), uses the input current of some layers and the spikes of others instead of the potential, leaves out
    the first and last layer, and has the weight 0.005. The paper combines the loss with a surrogate that evolves.

    Args:
        target: Target of the mean potential: the threshold, half of it, or half of it divided by T.
        skip_ends: Whether to leave out the first and the last neuron layer.

    Raises:
        ValueError: target is none of the three.
    """

    def __init__(
            self,
            target: Literal['threshold', 'half', 'half_per_step'] = 'threshold',
            skip_ends: bool = True,
    ):
        super().__init__()
        if target not in ('threshold', 'half', 'half_per_step'):
            raise ValueError(f"target='{target}': must be one of threshold, half, half_per_step.")
        self.target, self.skip_ends = target, skip_ends

    def forward(self, step: TrainStep) -> torch.Tensor:
        layers = hidden_layers(step.membranes, self.skip_ends)
        timesteps = len(step.step_logits)
        level = dict(threshold=1., half=0.5, half_per_step=0.5 / timesteps)[self.target]
        means = batch_mean(torch.stack([u.mean() for u in layers]), step.input.shape[0])
        return im_loss(means, level)
