"""Regulariser that pushes every layer's firing rate into a band."""
from typing import Dict, List, Optional, Sequence, Union

import torch
import torch.nn as nn
import torch.nn.functional as F

from timm_sscl.distributed import batch_mean

from .registry import register_loss
from .inputs import TrainStep

__all__ = ['FiringRateLoss', 'firing_rate_loss']


def firing_rate_loss(rates: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Return the squared distance of firing rates from the band [low, high], averaged over the layers; 0 inside the
    band.

    Args:
        rates: Firing rates in spikes per neuron and timestep, (L,).
        low: Lower end; a layer below it is pushed to fire more.
        high: Upper end; a layer above it is pushed to fire less.

    Returns:
        0-d tensor.

    Raises:
        ValueError: There are no rates, or low is larger than high.
    """
    if not low <= high:
        raise ValueError(f'low={low} and high={high}: the lower end must come first.')
    if not rates.numel():
        raise ValueError('there are no firing rates: no neuron layer ran.')
    return (F.relu(low - rates) + F.relu(rates - high)).square().mean()


@register_loss('firing_rate', needs_firing_rates=True, global_batch=True)
class FiringRateLoss(nn.Module):
    """`firing_rate_loss` of the student's neuron layers, with rates over the global batch.

    The gradient passes through the surrogate. A layer whose potentials are all outside the surrogate's window gets
    none.

    Args:
        target: The firing rate, or a band (low, high) of allowed rates; in spikes per neuron and timestep.

    Raises:
        ValueError: target is neither a rate nor a band.
    """

    def __init__(self, target: Union[float, Sequence[float]] = (0.05, 0.25)):
        super().__init__()
        band = tuple(target) if isinstance(target, (tuple, list)) else (target,)
        band = band * 2 if len(band) == 1 else band
        if len(band) != 2 or not 0 <= band[0] <= band[1] <= 1:
            raise ValueError(f'target={target}: must be a firing rate in [0, 1], or (low, high) of two in order.')
        self.low, self.high = band
        self._names: List[str] = []
        self._rates: Optional[torch.Tensor] = None

    @property
    def device_stats(self) -> Dict[str, Dict[str, torch.Tensor]]:
        """The values of `stats` as 0-d tensors, without waiting for the device."""
        if self._rates is None:
            return {}
        return {name: {'firing_rate': rate} for name, rate in zip(self._names, self._rates.unbind())}

    @property
    def stats(self) -> Dict[str, Dict[str, float]]:
        """Firing rate of every neuron layer at the last call, over the global batch."""
        if self._rates is None:
            return {}
        return {name: {'firing_rate': rate} for name, rate in zip(self._names, self._rates.tolist())}

    def forward(self, step: TrainStep) -> torch.Tensor:
        rates = batch_mean(torch.stack(list(step.firing_rates.values())), step.input.shape[0])
        self._names, self._rates = list(step.firing_rates), rates.detach()
        return firing_rate_loss(rates, self.low, self.high)
