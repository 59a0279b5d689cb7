"""Restore a model after running it, and undo a change that failed."""
from collections import OrderedDict, deque
from contextlib import contextmanager
from functools import wraps
from typing import Any, Callable, Dict, Iterator, List, Tuple

import torch
import torch.nn as nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from timm_sscl.random_state import get_random_state, set_random_state

__all__ = ['untouched', 'undone_on_error', 'all_or_nothing', 'without_hooks', 'remove_hooks', 'part_of_layer']

_CONTAINERS = dict, list, set, deque  # types of attributes that a forward may fill in place
_HOOKS = '_forward_hooks', '_forward_pre_hooks'
_COMPUTE_WEIGHTS = WeightNorm, SpectralNorm, BasePruningMethod


class _ModelState:
    """Snapshot of everything in a model that a forward or a conversion may change.

    It holds the class and attributes of every module (with the entries of containers: modes, hooks, settings,
    children), the values of buffers, and `requires_grad` and gradients of parameters.

    Args:
        model: Model.
        parameters: Whether to copy the values of parameters, too.
    """

    def __init__(self, model: nn.Module, parameters: bool):
        self._modules: List[Tuple[nn.Module, type, Dict[str, Any]]] = []
        self._containers: List[Tuple[Any, Any]] = []
        for module in _all_modules(model):
            self._modules.append((module, type(module), dict(vars(module))))
            self._containers += [(value, value.copy()) for value in vars(module).values()
                                 if isinstance(value, _CONTAINERS)]
        buffers = {id(b): b for module, _, _ in self._modules for b in module._buffers.values() if b is not None}
        own = {id(p): p for module, _, _ in self._modules for p in module._parameters.values() if p is not None}
        self._parameters = [(p, p.requires_grad, p.grad) for p in own.values()]
        kept = [*buffers.values(), *(own.values() if parameters else ())]
        self._values = [(tensor, tensor.detach().clone()) for tensor in kept if not _is_lazy(tensor)]

    @torch.no_grad()
    def restore(self) -> None:
        for module, cls, attributes in self._modules:
            if type(module) is not cls:
                module.__class__ = cls
            vars(module).clear()
            vars(module).update(attributes)
        for container, entries in self._containers:
            _refill(container, entries)
        for tensor, value in self._values:
            if not tensor.is_meta and not torch.equal(tensor, value):
                tensor.copy_(value)
        for parameter, requires_grad, grad in self._parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad


def _all_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules of a model, including those that a neuron replaced and holds in its attribute `replaced`."""
    for module in model.modules():
        yield module
        if isinstance(vars(module).get('replaced'), nn.Module):
            yield from vars(module)['replaced'].modules()


def _is_lazy(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, vars(nn.parameter)['UninitializedTensorMixin'])


def _refill(container: Any, entries: Any) -> None:
    """Replace the entries of a container in place."""
    container.clear()
    container.extend(entries) if isinstance(container, (list, deque)) else container.update(entries)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Evaluate a model inside: evaluation mode, no gradients. Restore it afterwards, even after an error.

    Restored are the attributes of every module (modes, hooks, settings, classes, children), the values of buffers, and
    the random state of torch, numpy and Python. Parameters are not copied, since a forward does not write to them.
    """
    state, random_state = _ModelState(model, parameters=False), get_random_state()
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        state.restore()
        set_random_state(random_state)


@contextmanager
def undone_on_error(model: nn.Module, parameters: bool = False) -> Iterator[None]:
    """Change a model inside; if an exception is raised, restore it.

    Args:
        model: Model that is changed in place.
        parameters: Whether parameter values are changed, too. They are then copied first.
    """
    state = _ModelState(model, parameters)
    try:
        yield
    except BaseException:
        state.restore()
        raise


def all_or_nothing(parameters: bool = False) -> Callable[[Callable], Callable]:
    """Decorate a function that changes its first argument, a model, in place: an error undoes the change.

    Args:
        parameters: As in `undone_on_error`.
    """
    def decorate(change: Callable) -> Callable:
        @wraps(change)
        def changed(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            with undone_on_error(model, parameters):
                return change(model, *args, **kwargs)
        return changed
    return decorate


def part_of_layer(hook: Callable) -> Callable:
    """Mark a hook as part of its layer, so that `without_hooks` keeps it."""
    vars(hook)['part_of_layer'] = True
    return hook


def _is_part_of_layer(hook: Callable) -> bool:
    return isinstance(hook, _COMPUTE_WEIGHTS) or getattr(hook, 'part_of_layer', False)


def remove_hooks(model: nn.Module) -> List[str]:
    """Remove the user's forward hooks for good, and return the names of the modules that had some."""
    had = []
    for module_name, module in model.named_modules():
        hooks = [(name, key) for name in _HOOKS for key, hook in vars(module)[name].items()
                 if not _is_part_of_layer(hook)]
        for name, key in hooks:
            del vars(module)[name][key]
        had += [module_name] if hooks else []
    return had


@contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """Remove the user's forward hooks inside. Hooks that are part of their layer (weight norm, pruning) still run."""
    kept = [(module, name, vars(module)[name]) for module in model.modules() for name in _HOOKS]
    for module, name, hooks in kept:
        setattr(module, name, OrderedDict((key, hook) for key, hook in hooks.items()
                                          if _is_part_of_layer(hook)))
    try:
        yield
    finally:
        for module, name, hooks in kept:
            setattr(module, name, hooks)
