"""TEBN (Duan et al. 2022): batch norm over time, batch and space, with a learnable factor for every timestep."""
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

    mean and var are over T, B, H and W. The factor multiplies the shift as well.
    """
    own_state = ('step_scale',)
    per_step = True

    def normalise(self, x: torch.Tensor) -> torch.Tensor:
        steps = super().normalise(x).unflatten(0, (self.timesteps, -1))
        scale = self.step_scale[self.steps_used()].to(x.dtype)
        return (steps * scale.view(-1, *(1,) * (steps.ndim - 1))).flatten(0, 1)


@register_variant('norm', 'tebn')
class TEBN(BatchNormVariant):
    """Every batch norm with a scale has a learnable factor per timestep behind it, 1 at the start.

    The authors' ResNet also has such norms on shortcuts without a convolution; here only norms that exist become TEBN.
    """
    mixin = TemporalEffectiveBatchNorm
    label = 'TEBN'
    changes_state = True
    Settings = PerStepSettings

    def set_up(self, norm: nn.Module, settings: Any) -> None:
        self.set_parameter(norm, 'step_scale', torch.ones(self.settings.steps))
