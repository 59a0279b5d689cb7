"""Parts of a model whose norms were folded: what is left of a norm, and layers with one map per timestep."""
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.modules.conv import _ConvNd

from timm_sscl.class_swap import Mixin, mix_in

from .dropout import OverTime

__all__ = ['FoldedNorm', 'StepwiseLayer', 'make_stepwise', 'runs_own_map']

_LAYERS = nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear


class FoldedNorm(nn.Module):
    """Placeholder for a norm that was folded into the layer before it. Of a norm-act layer, dropout and neuron stay."""

    @classmethod
    def of(cls, norm: nn.Module) -> 'FoldedNorm':
        """Return the placeholder of a norm."""
        folded = cls().train(norm.training)
        for name in ('drop', 'act'):
            if name in norm._modules:
                folded.add_module(name, norm._modules[name])
        return folded

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for module in self._modules.values():
            x = x if module is None else module(x)
        return x


class StepwiseLayer(OverTime, Mixin):
    """Mixin for a convolution or linear layer whose weight and bias have the timestep as their first axis.

    With fewer timesteps it uses the first ones; with more, the last is repeated.
    """
    per_step = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._samples(x)  # raises if the first axis does not hold T steps
        layer: Any = self
        steps, last = [], len(layer.weight) - 1
        for t, x_t in enumerate(x.chunk(self.timesteps)):
            weight, bias = layer.weight[min(t, last)], layer.bias[min(t, last)]
            if isinstance(layer, _ConvNd):
                steps.append(layer._conv_forward(x_t, weight, bias))
            else:
                steps.append(F.linear(x_t, weight, bias))
        return torch.cat(steps)


def runs_own_map(layer: nn.Module) -> bool:
    """Return whether a layer's forward is that of torch's convolution or linear layer."""
    return any(isinstance(layer, cls) and type(layer).forward is cls.forward for cls in _LAYERS)


def make_stepwise(layer: Any, timesteps: int) -> None:
    """Let a layer with parameters (steps, ...) use them by timestep, in place."""
    mix_in(layer, StepwiseLayer)
    layer.timesteps, layer.part_of_model = timesteps, True
