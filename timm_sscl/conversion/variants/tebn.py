"""TEBN (Duan et al. 2022): batch norm over time, batch and space, with a learnable factor per timestep."""
from typing import Any

import torch
import torch.nn as nn

from .base import PerStepSettings
from .batch_norms import BatchNormOverTime, BatchNormVariant
from .registry import register_variant

__all__ = ['TemporalEffectiveBatchNorm', 'TEBN']


class TemporalEffectiveBatchNorm(BatchNormOverTime):
    """Mixin for a batch norm.

        y_t = step_scale_t * (weight * (x_t - mean) / sqrt(var + eps) + bias)

    mean and var are over T, B, H and W. The factor also multiplies the shift.
    """
    own_state = ('step_scale',)
    per_step = True
    step_factor = 'step_scale'

    def normalise(self, x: torch.Tensor) -> torch.Tensor:
        steps = super().normalise(x).unflatten(0, (self.timesteps, -1))
        scale = self.over_time(self.step_scale).to(x.dtype)
        return (steps * scale.view(-1, *(1,) * (steps.ndim - 1))).flatten(0, 1)


@register_variant('norm', 'tebn')
class TEBN(BatchNormVariant):
    """Add a learnable factor per timestep after every batch norm with a scale; it starts at 1.

    The authors' ResNet also has such norms on shortcuts without a convolution. Here only existing norms become TEBN.
    """
    mixin = TemporalEffectiveBatchNorm
    label = 'TEBN'
    changes_state = True
    Settings = PerStepSettings

    def set_up(self, norm: nn.Module, settings: Any) -> None:
        self.set_parameter(norm, 'step_scale', torch.ones(self.settings.steps))
