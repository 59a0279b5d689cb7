"""Let neurons fire after the max pooling that follows them."""
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from timm_sscl.class_swap import Mixin, mix_in, take_out
from timm_sscl.neurons import SpikingNeuron

__all__ = ['set_pool_first', 'pooled_current', 'commutes_with_pooling']

_WINDOW = 'kernel_size', 'stride', 'padding', 'dilation', 'ceil_mode'


class _PoolFirst(Mixin):
    """Mixin for a neuron: it integrates the maximum of the current over the windows of a pooling."""
    window: Tuple

    def _over_time(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        neuron: Any = super()
        return neuron._over_time(pooled_current(self, x))


class _PooledBefore(Mixin):
    """Mixin for the max pooling behind such a neuron: its input is pooled already."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input


def pooled_current(neuron: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return the current that a neuron integrates: x, or its maxima if the neuron fires after the pooling.

    Only maps (N, C, H, W) are pooled.
    """
    return F.max_pool2d(x, *neuron.window) if isinstance(neuron, _PoolFirst) and x.ndim == 4 else x


def commutes_with_pooling(neuron: nn.Module, factor: torch.Tensor) -> bool:
    """Return whether a factor on the current that a neuron integrates may be one on its input instead."""
    return not isinstance(neuron, _PoolFirst) or bool((factor > 0).all())


def set_pool_first(model: nn.Module, pairs: Optional[Sequence[str]]) -> None:
    """Let neurons fire after the max pooling behind them, in place; all others fire before it.

    Args:
        model: Spiking model.
        pairs: 'neuron:pooling' by module names.

    Raises:
        ValueError: The model has no such neuron or pooling.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    wanted: Dict[str, str] = dict(pair.split(':') for pair in pairs or ())
    found: List[Tuple[nn.Module, nn.Module]] = []
    for name, pool in wanted.items():
        neuron, pooling = modules.get(name), modules.get(pool)
        if not isinstance(neuron, SpikingNeuron) or not isinstance(pooling, nn.MaxPool2d):
            raise ValueError(f'pool_first: {type(model).__name__} has no neuron {name} before a MaxPool2d {pool}.')
        found.append((neuron, pooling))
    for module in modules.values():
        take_out(module, _PoolFirst)
        take_out(module, _PooledBefore)
    for neuron, pooling in found:
        mix_in(neuron, _PoolFirst)
        mix_in(pooling, _PooledBefore)
        neuron.__dict__['window'] = tuple(getattr(pooling, name) for name in _WINDOW)
