"""Classify modules as activations or gates, by class."""
from typing import AbstractSet, Any, Optional, Set, Tuple, Type

import torch.nn as nn

__all__ = ['register_activation', 'unregister_activation', 'is_activation', 'is_gate', 'runs_functions',
           'refuse_weights']

# by class name, since timm has several classes for one activation, and models define their own
_ACTIVATIONS = {
    'ReLU', 'ReLU6', 'LeakyReLU', 'PReLU', 'RReLU', 'ELU', 'SELU', 'CELU', 'GELU', 'GELUTanh', 'QuickGELU', 'SiLU',
    'Swish', 'SwishMe', 'Mish', 'MishMe', 'Hardswish', 'HardSwish', 'HardSwishMe', 'HardMish', 'HardMishMe', 'Hardtanh',
    'Tanh', 'Softplus', 'Softsign', 'StarReLU', 'SquaredReLU', 'GammaAct',
    'QCFS',
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
        ValueError: cls is a layer of torch's that is no activation.

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
    if cls.__module__.startswith('torch.nn.modules.') and not cls.__module__.endswith('.activation'):
        raise ValueError(f"register_activation({cls.__name__}): this is a layer of torch's and no activation; a neuron "
                         f'would replace it, weights and all.')
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


def refuse_weights(name: str, module: nn.Module) -> None:
    """Raise an error for an activation with weights, which a neuron in its place would drop.

    Scalars and vectors, such as the slopes of a PReLU, are an activation's.

    Args:
        name: Name of the module.
        module: An activation.

    Raises:
        ValueError: It has a parameter of two or more axes, or a child with parameters.
    """
    weights = [key for key, parameter in module.named_parameters() if parameter.ndim > 1 or '.' in key]
    if weights:
        kind = type(module).__name__
        raise ValueError(f"'{name}' ({kind}) has weights ({', '.join(weights[:3])}), which a neuron in its place would "
                         f'drop; {kind} is no activation. Register the class of the activation inside.')


def _inherited(
        module: nn.Module,
        names: Set[str],
        classes: AbstractSet[Type[nn.Module]] = frozenset(),
) -> Optional[Type[nn.Module]]:
    """Return the class in the module's MRO that is listed by name or registered and has the module's forward, or None.
    """
    cls = type(module)
    bases: Tuple[Any, ...] = cls.__mro__
    for base in bases:
        if (base.__name__ in names or base in classes) and (base is cls or base.forward is cls.forward):
            return base
    return None
