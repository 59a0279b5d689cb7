"""Run a part of a model a second time in training mode without side effects on statistics, records or random numbers.
"""
from contextlib import contextmanager
from typing import Any, Iterable, Iterator, List, Tuple

import torch.nn as nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from timm_sscl.neurons import SpikingNeuron

__all__ = ['second_pass']


def _at_rest(module: nn.Module) -> List[Tuple[str, Any]]:
    """Return the attribute values that switch off dropout, updates of running statistics and records of a module in
    training mode.
    """
    if not module.training:
        return []
    settings: List[Tuple[str, Any]] = []
    if isinstance(module, SpikingNeuron):
        settings.append(('repeats', True))
    if isinstance(module, _BatchNorm) and module.track_running_stats:
        settings.append(('track_running_stats', False))  # the norm still normalises by the batch
    if isinstance(module, _DropoutNd) and module.p:
        settings.append(('p', 0.))
    if isinstance(getattr(module, 'drop_rate', None), float) and module.drop_rate:
        settings.append(('drop_rate', 0.))  # timm's, for F.dropout in forward_head
    return settings


@contextmanager
def second_pass(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Run modules inside without dropout, updates of their running statistics, or records of neurons.

    Modules in training mode stay in it: a batch norm still normalises by the batch.

    Args:
        modules: All modules that may run; their children are not included.
    """
    changed = [(module, name, getattr(module, name), value) for module in modules for name, value in _at_rest(module)]
    for module, name, _, value in changed:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value, _ in changed:
            setattr(module, name, value)
