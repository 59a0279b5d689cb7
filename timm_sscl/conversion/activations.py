"""Which modules are activations and which are gates, by class."""
from typing import Optional, Set, Type

import torch.nn as nn

__all__ = ['register_activation', 'unregister_activation', 'is_activation', 'is_gate', 'runs_functions']

# by name: timm has several classes of one activation, and models with their own
_ACTIVATIONS = {
    'ReLU', 'ReLU6', 'LeakyReLU', 'PReLU', 'RReLU', 'ELU', 'SELU', 'CELU', 'GELU', 'GELUTanh', 'QuickGELU', 'SiLU',
    'Swish', 'SwishMe', 'Mish', 'MishMe', 'Hardswish', 'HardSwish', 'HardSwishMe', 'HardMish', 'HardMishMe', 'Hardtanh',
    'Tanh', 'Softplus', 'Softsign', 'StarReLU', 'SquaredReLU', 'GammaAct',
}
_GATES = {'Sigmoid', 'HardSigmoid', 'HardSigmoidMe', 'Hardsigmoid', 'LogSigmoid', 'Softmax', 'Softmax2d', 'GLU'}
_GATES_OF_FUNCTIONS = {'HardSigmoid', 'HardSigmoidMe'}  # their forward may call relu6

_registered: Set[Type[nn.Module]] = set()


def register_activation(cls: Type[nn.Module]) -> Type[nn.Module]:
    """Say that a class of yours is an activation: conversions from now on make its modules neurons.

    A subclass that keeps its forward is one as well. The call works as a decorator.

    Args:
        cls: An nn.Module whose forward takes one tensor and returns one of the same shape.

    Returns:
        The class.

    Raises:
        TypeError: cls is no subclass of nn.Module.

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
    """Whether a module is an activation by its class, or inherits its forward from one."""
    return _inherited(module, _ACTIVATIONS, _registered) is not None


def is_gate(module: nn.Module) -> bool:
    """Whether a module is a gate by its class, or inherits its forward from one."""
    return _inherited(module, _GATES) is not None


def runs_functions(module: nn.Module) -> bool:
    """Whether a module's forward may be a call of an activation function, such as F.relu."""
    return is_activation(module) or _inherited(module, _GATES_OF_FUNCTIONS) is not None


def _inherited(
        module: nn.Module,
        names: Set[str],
        classes: Set[Type[nn.Module]] = frozenset(),
) -> Optional[Type[nn.Module]]:
    """The known class that a module is of, or whose forward it runs."""
    cls = type(module)
    for base in cls.__mro__:
        if (base.__name__ in names or base in classes) and (base is cls or base.forward is cls.forward):
            return base
    return None
