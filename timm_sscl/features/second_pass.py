"""A pass through a part of a model beside the one that counts: nothing is drawn and no running statistic moves."""
from contextlib import contextmanager
from typing import Any, Iterable, Iterator, List, Tuple

import torch.nn as nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

__all__ = ['second_pass']


def _at_rest(module: nn.Module) -> List[Tuple[str, Any]]:
    """Attributes with which a module in training draws no dropout and leaves its running statistics."""
    if not module.training:
        return []
    settings: List[Tuple[str, Any]] = []
    if isinstance(module, _BatchNorm) and module.track_running_stats:
        settings.append(('track_running_stats', False))  # it normalises by the batch all the same
    if isinstance(module, _DropoutNd) and module.p:
        settings.append(('p', 0.))
    if isinstance(getattr(module, 'drop_rate', None), float) and module.drop_rate:
        settings.append(('drop_rate', 0.))  # timm's, for torch.nn.functional.dropout in forward_head
    return settings


@contextmanager
def second_pass(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, these modules run in training as they do, without dropout, and their running statistics stay.

    What is computed a second time then neither counts twice in a batch norm nor moves the random numbers.

    Args:
        modules: Those that may run, one by one.
    """
    changed = [(module, name, getattr(module, name), value) for module in modules for name, value in _at_rest(module)]
    for module, name, _, value in changed:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value, _ in changed:
            setattr(module, name, value)
