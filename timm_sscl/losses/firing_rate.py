"""Regulariser on the neurons: every layer's firing rate into a band."""
from typing import Dict, List, Optional, Sequence, Union

import torch
import torch.nn as nn
import torch.nn.functional as F

from timm_sscl.distributed import batch_mean

from .registry import register_loss
from .inputs import TrainStep

__all__ = ['FiringRateLoss', 'firing_rate_loss']


def firing_rate_loss(rates: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Squared distance of firing rates from the band [low, high], 0 inside, the mean over the layers.

    Args:
        rates: Firing rates in spikes per neuron and step, (L,).
        low: Lower end; a layer below it is pushed to fire more.
        high: Upper end; a layer above it is pushed to fire less.

    Returns:
        0-d tensor.

    Raises:
        ValueError: There are no rates, or low lies above high.
    """
    if not low <= high:
        raise ValueError(f'low={low} and high={high}: the lower end must come first.')
    if not rates.numel():
        raise ValueError('there are no firing rates: no neuron layer ran.')
    return (F.relu(low - rates) + F.relu(rates - high)).square().mean()


@register_loss('firing_rate', needs_firing_rates=True, global_batch=True)
class FiringRateLoss(nn.Module):
    """`firing_rate_loss` of the student's neuron layers, their rates taken over the global batch.

    The gradient goes through the neurons' surrogate: a layer whose potentials all lie outside its window gets none.

    Args:
        target: The rate to hold, or a band (low, high) in which a layer is left alone; in spikes per neuron and step.

    Raises:
        ValueError: target is no rate, or no band of two.
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
    def stats(self) -> Dict[str, Dict[str, float]]:
        """Of the last call, per neuron layer: firing_rate (the global batch)."""
        if self._rates is None:
            return {}
        return {name: {'firing_rate': rate} for name, rate in zip(self._names, self._rates.tolist())}

    def forward(self, step: TrainStep) -> torch.Tensor:
        rates = batch_mean(torch.stack(list(step.firing_rates.values())), step.input.shape[0])
        self._names, self._rates = list(step.firing_rates), rates.detach()
        return firing_rate_loss(rates, self.low, self.high)
