"""BNTT (Kim and Panda 2021): a separate batch norm for every timestep, without a shift."""
from dataclasses import dataclass
from typing import Any, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F

from timm_sscl.knobs import knob

from .base import PerStepSettings
from .registry import register_variant
from .stepwise_norms import StepwiseBatchNorm, StepwiseNormVariant

__all__ = ['BatchNormThroughTime', 'BNTT']


class BatchNormThroughTime(StepwiseBatchNorm):
    """Mixin for a batch norm.

        y_t = weight_t * (x_t - mean_t) / sqrt(var_t + eps)

    mean_t and var_t are over B, H and W of timestep t, in evaluation mode the running values. There is no shift.
    """

    def normalise(self, x: torch.Tensor) -> torch.Tensor:
        momentum = self.update_rate()
        by_batch = self.training or self.running_mean is None
        tracks = self.running_mean is not None and (not self.training or self.track_running_stats)
        steps = []
        for x_t, i in zip(x.chunk(self.timesteps), self.steps_used()):
            mean, var = (self.running_mean[i], self.running_var[i]) if tracks else (None, None)
            steps.append(F.batch_norm(x_t, mean, var, self.weight[i], None, by_batch, momentum, self.eps))
        return torch.cat(steps)


@register_variant('norm', 'bntt')
class BNTT(StepwiseNormVariant):
    """Give every batch norm with a scale separate scales and statistics per timestep, and no shift.

    The authors train it with a threshold of 1, a decay factor of 0.95, a soft reset, the surrogate 'damped_triangle'
    and Poisson input. If an ANN's weights are loaded, the shifts are dropped.
    """
    mixin = BatchNormThroughTime
    label = 'BNTT'
    has_bias = False

    @dataclass(frozen=True)
    class Settings(PerStepSettings):
        eps: float = knob(1e-4, 'added to the variance')
        momentum: Optional[float] = knob(.1, 'share of a batch in the running statistics')

    def set_up(self, norm: nn.Module, settings: Any) -> None:
        super().set_up(norm, settings)
        norm.__dict__.setdefault('_before_bntt', (norm.eps, norm.momentum))
        norm.eps, norm.momentum = self.settings.eps, self.settings.momentum

    def tear_down(self, norm: nn.Module) -> None:
        super().tear_down(norm)
        norm.eps, norm.momentum = norm.__dict__.pop('_before_bntt')
