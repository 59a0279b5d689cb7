"""Classify modules as activations or gates, by class."""
from typing import Optional, Set, Type

import torch.nn as nn

__all__ = ['register_activation', 'unregister_activation', 'is_activation', 'is_gate', 'runs_functions']

# by class name, since timm has several classes for one activation, and models define their own
_ACTIVATIONS = {
    'ReLU', 'ReLU6', 'LeakyReLU', 'PReLU', 'RReLU', 'ELU', 'SELU', 'CELU', 'GELU', 'GELUTanh', 'QuickGELU', 'SiLU',
    'Swish', 'SwishMe', 'Mish', 'MishMe', 'Hardswish', 'HardSwish', 'HardSwishMe', 'HardMish', 'HardMishMe', 'Hardtanh',
    'Tanh', 'Softplus', 'Softsign', 'StarReLU', 'SquaredReLU', 'GammaAct',
}
_GATES = {'Sigmoid', 'HardSigmoid', 'HardSigmoidMe', 'Hardsigmoid', 'LogSigmoid', 'Softmax', 'Softmax2d', 'GLU'}
_GATES_OF_FUNCTIONS = {'HardSigmoid', 'HardSigmoidMe'}  # gates whose forward may call relu6

_registered: Set[Type[nn.Module]] = set()


def register_activation(cls: Type[nn.Module]) -> Type[nn.Module]:
    """Register a class as an activation: later conversions replace its modules by neurons.

    A subclass with the same forward counts as well. Can be used as a decorator.

    Args:
        cls: An nn.Module whose forward takes one tensor and returns one of the same shape.

    Returns:
        The class.

    Raises:
        TypeError: cls is not a subclass of nn.Module.

    Examples:
        ```python
        @register_activation
        class HardSwish(nn.Module):
            def forward(self, x):
                return x * F.relu6(x + 3) / 6
        ```
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f'register_activation({cls!r}): needs a class of modules (a subclass of nn.Module), '
                        f'not a function or an instance.')
    _registered.add(cls)
    return cls


def unregister_activation(cls: Type[nn.Module]) -> None:
    """Undo register_activation.

    Raises:
        KeyError: cls is not registered.
    """
    if cls not in _registered:
        raise KeyError(f'{cls!r} is not registered as an activation.')
    _registered.remove(cls)


def is_activation(module: nn.Module) -> bool:
    """Return whether a module's class is an activation, or inherits its forward from one."""
    return _inherited(module, _ACTIVATIONS, _registered) is not None


def is_gate(module: nn.Module) -> bool:
    """Return whether a module's class is a gate, or inherits its forward from one."""
    return _inherited(module, _GATES) is not None


def runs_functions(module: nn.Module) -> bool:
    """Return whether a module's forward may be a call of an activation function such as F.relu."""
    return is_activation(module) or _inherited(module, _GATES_OF_FUNCTIONS) is not None


def _inherited(
        module: nn.Module,
        names: Set[str],
        classes: Set[Type[nn.Module]] = frozenset(),
) -> Optional[Type[nn.Module]]:
    """Return the class in the module's MRO that is listed by name or registered and has the module's forward, or None.
    """
    cls = type(module)
    for base in cls.__mro__:
        if (base.__name__ in names or base in classes) and (base is cls or base.forward is cls.forward):
            return base
    return None
