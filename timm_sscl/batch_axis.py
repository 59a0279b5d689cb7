"""Which activations do not work on the batch: found by running the model at two batch sizes."""
from typing import Any, Callable, Dict, List, Optional, Sequence, Set

import torch
import torch.nn as nn
from torch.overrides import TorchFunctionMode

from .functional import ACTIVATION_FUNCTIONS
from .probing import Example, ProbeError, probe

__all__ = ['without_batch_axis']

_BATCH_SIZES = 2, 3  # not 1, which broadcasts


def without_batch_axis(
        model: nn.Module,
        activations: Dict[str, nn.Module],
        callers: Dict[str, nn.Module],
        input_size: Optional[Sequence[int]] = None,
        example_inputs: Any = None,
) -> Optional[Set[str]]:
    """Names of the activations whose first axis does not grow with the batch.

    A position-bias network works on a table of coordinates: a neuron in it would take rows of the table for time steps.

    Args:
        model: The ANN, before its conversion.
        activations: Activation modules by name.
        callers: Modules that call activations as functions, by name.
        input_size: Shape of one sample; None guesses from the model.
        example_inputs: What the model takes, see `probing.examples`.

    Returns:
        The names, or None where the model does not run on the guessed input.
    """
    def run(example: Example) -> List[Dict[str, List[int]]]:
        return [_rows(model, activations, callers, example.with_batch(batch)) for batch in _BATCH_SIZES]

    try:
        rows = probe(model, run, _BATCH_SIZES[-1], input_size, example_inputs)
    except ProbeError:
        return None
    small, large = _BATCH_SIZES
    return {name for name, seen in rows[0].items()
            if [n * large for n in seen] != [n * small for n in rows[1].get(name, [])]}


def _rows(
        model: nn.Module,
        activations: Dict[str, nn.Module],
        callers: Dict[str, nn.Module],
        example: Example,
) -> Dict[str, List[int]]:
    """Lengths of the first axis that each activation saw, in the order of its calls."""
    seen: Dict[str, List[int]] = {}

    def saw(name: str, x: torch.Tensor) -> None:
        seen.setdefault(name, []).append(x.shape[0] if x.ndim else 0)

    watch, handles = _WatchFunctions(saw), []
    for name, module in activations.items():
        handles.append(module.register_forward_pre_hook(lambda m, args, name=name: saw(name, args[0])))
    for name, module in callers.items():
        handles.append(module.register_forward_pre_hook(lambda m, args, name=name: watch.enter(name)))
        handles.append(module.register_forward_hook(lambda m, args, out: watch.leave()))
    with watch:
        example(model)
    for handle in handles:
        handle.remove()
    return seen


class _WatchFunctions(TorchFunctionMode):
    """Tells the first argument of activations that are called as functions, and by which module."""

    def __init__(self, saw: Callable[[str, torch.Tensor], None]):
        super().__init__()
        self.saw = saw
        self.inside: List[str] = []

    def enter(self, name: str) -> None:
        self.inside.append(name)

    def leave(self) -> None:
        self.inside.pop()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if self.inside and getattr(func, '__name__', '') in ACTIVATION_FUNCTIONS:
            self.saw(self.inside[-1], args[0])
        return func(*args, **(kwargs or {}))
