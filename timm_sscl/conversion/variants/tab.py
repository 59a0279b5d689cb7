"""TAB (Jiang et al. 2024): batch norm whose statistics at every timestep are over all timesteps so far."""
from typing import Any, Tuple

import torch
import torch.nn as nn

from .base import PerStepSettings
from .registry import register_variant
from .stepwise_norms import StepwiseBatchNorm, StepwiseNormVariant

__all__ = ['AccumulatedBatchNorm', 'TAB']


class AccumulatedBatchNorm(StepwiseBatchNorm):
    """Mixin for a batch norm.

        y_t = step_scale_t^2 * (weight_t * (x_t - mean_t) / sqrt(var_t + eps) + bias_t)

    mean_t and var_t are over B, H, W and the timesteps 0 to t, in evaluation mode the running values.
    """
    own_state = ('step_scale',)

    def normalise(self, x: torch.Tensor) -> torch.Tensor:
        steps = x.unflatten(0, (self.timesteps, -1))
        if self.training or self.running_mean is None:
            mean, var = self._accumulate(steps)
        else:
            mean, var = self.over_time(self.running_mean), self.over_time(self.running_var)
        squared = self.over_time(self.step_scale).square().to(mean.dtype).unsqueeze(1)
        scale = squared * self.over_time(self.weight) / (var + self.eps).sqrt()
        shift = squared * self.over_time(self.bias) - mean * scale
        shape = self.timesteps, 1, -1, *(1,) * (steps.ndim - 3)
        return (steps.to(scale.dtype) * scale.view(shape) + shift.view(shape)).to(x.dtype).flatten(0, 1)

    def _accumulate(self, steps: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Return mean and biased variance (T, C) over the timesteps up to each, and update the running statistics."""
        axes = [1, *range(3, steps.ndim)]
        steps = steps.to(torch.promote_types(steps.dtype, torch.float32))
        means, variances = steps.mean(axes), steps.var(axes, unbiased=False)
        # weights[t, s] averages over the timesteps s <= t; the spread of their means adds to the variance
        weights = torch.ones(self.timesteps, self.timesteps, device=steps.device, dtype=steps.dtype).tril()
        weights = weights / weights.sum(1, keepdim=True)
        mean = weights @ means
        spread = (weights.unsqueeze(2) * (means.unsqueeze(0) - mean.unsqueeze(1)).square()).sum(1)
        var = weights @ variances + spread
        if self.training and self.track_running_stats and self.running_mean is not None:
            self._follow(mean.detach(), var.detach(), steps[0].numel() // steps.shape[2])
        return mean, var

    @torch.no_grad()
    def _follow(self, mean: torch.Tensor, var: torch.Tensor, n: int) -> None:
        """Update the running statistics with those of a batch with n values per timestep and channel."""
        steps = min(self.timesteps, len(self.running_mean))
        counts = n * torch.arange(1, steps + 1, device=var.device, dtype=var.dtype).unsqueeze(1)
        unbiased = var[:steps] * counts / (counts - 1).clamp(min=1)
        rate = self.update_rate()
        for running, value in ((self.running_mean, mean[:steps]), (self.running_var, unbiased)):
            running[:steps].lerp_(value.to(running.dtype), rate)


@register_variant('norm', 'tab')
class TAB(StepwiseNormVariant):
    """Give every batch norm with a scale separate scales, shifts, statistics and a factor per timestep; the factor
    starts at 1.
    """
    mixin = AccumulatedBatchNorm
    label = 'TAB'
    Settings = PerStepSettings

    def set_up(self, norm: nn.Module, settings: Any) -> None:
        super().set_up(norm, settings)
        self.set_parameter(norm, 'step_scale', torch.ones(self.settings.steps))
