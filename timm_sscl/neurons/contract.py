"""Check what a neuron class returns, by types and shapes only, without waiting for the device."""
import inspect
from typing import Any, Callable, Tuple

import torch

__all__ = ['check_step', 'check_start', 'check_stepped', 'check_output']

_ARGUMENTS = 'x, state, constants, t, settings'


def check_step(cls: Any, base: Any) -> None:
    """Check that a neuron class has a step or its own run.

    Args:
        cls: Class of the neuron.
        base: SpikingNeuron.

    Raises:
        ValueError: It has neither, or its step does not take the five arguments.
    """
    if cls.run is not base.run:
        return
    if cls.step is base.step:
        raise ValueError(f'{cls.__name__} has no step; a neuron needs `@staticmethod def step({_ARGUMENTS})`.')
    try:
        inspect.signature(cls.step).bind(*_ARGUMENTS.split(', '))
    except TypeError as error:
        raise ValueError(f'{cls.__name__}.step: must be `@staticmethod def step({_ARGUMENTS})`; {error}.') from error


def check_start(owner: str, state: Any) -> None:
    """Raise ValueError if a neuron's `start` or `constants` did not return a tuple of tensors."""
    if not isinstance(state, (tuple, list)) or not all(isinstance(part, torch.Tensor) for part in state):
        raise ValueError(f'{owner} returned {_described(state)}; it must return a tuple of tensors.')


def check_stepped(step: Callable, stepped: Any) -> None:
    """Raise ValueError if a step did not return an output and a tuple of tensors."""
    pair = isinstance(stepped, (tuple, list)) and len(stepped) == 2
    name = getattr(step, '__qualname__', repr(step))
    if not pair or not isinstance(stepped[0], torch.Tensor):
        raise ValueError(f'{name} returned {_described(stepped)}; it must return the output, a tensor, and the state, '
                         f'a tuple of tensors.')
    check_start(f'{name}, as its state,', stepped[1])


def check_output(name: str, out: torch.Tensor, x: torch.Tensor) -> None:
    """Check the shape of a neuron's output.

    Args:
        name: Class of the neuron.
        out: Its output (T, B, ...).
        x: Its current (T, B, ...).

    Raises:
        ValueError: The shapes differ.
    """
    if out.shape != x.shape:
        raise ValueError(f'{name}: the output of a step has the shape {tuple(out.shape[1:])}, its current '
                         f'{tuple(x.shape[1:])}; step must return an output of the shape of its current (B, ...).')


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f'a tensor {tuple(value.shape)}'
    if isinstance(value, (tuple, list)):
        parts: Tuple[str, ...] = tuple(type(part).__name__ for part in value)
        return f'({", ".join(parts)})'
    return f'a {type(value).__name__}'
