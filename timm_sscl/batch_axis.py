"""Which activations do not work on the batch: found by running the model at two batch sizes, without arithmetic."""
from collections import OrderedDict
from contextlib import contextmanager
from typing import Callable, Dict, Iterator, List, Optional, Sequence, Set, Tuple

import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from .functional import ACTIVATION_FUNCTIONS
from .taps import probe_sizes

__all__ = ['without_batch_axis', 'undisturbed']

_BATCH_SIZES = 2, 3  # not 1, which broadcasts
_HOOKS = ('_forward_hooks', '_forward_pre_hooks')


def without_batch_axis(
        model: nn.Module,
        activations: Dict[str, nn.Module],
        callers: Dict[str, nn.Module],
        input_size: Optional[Sequence[int]] = None,
) -> Optional[Set[str]]:
    """Names of the activations whose first axis does not grow with the batch.

    A position-bias network works on a table of coordinates: a neuron in it would take rows of the table for time steps.

    Args:
        model: The ANN, before its conversion.
        activations: Activation modules by name.
        callers: Modules that call activations as functions, by name.
        input_size: Shape of one sample; None guesses from the model.

    Returns:
        The names, or None where the model does not run on the guessed input.
    """
    for size in [tuple(input_size)] if input_size is not None else probe_sizes(model):
        try:
            rows = [_rows(model, activations, callers, (batch, *size)) for batch in _BATCH_SIZES]
        except Exception:  # whatever an unknown model raises on an input that is not its own
            continue
        small, large = _BATCH_SIZES
        return {name for name, seen in rows[0].items()
                if [n * large for n in seen] != [n * small for n in rows[1].get(name, [])]}
    return None


def _rows(
        model: nn.Module,
        activations: Dict[str, nn.Module],
        callers: Dict[str, nn.Module],
        shape: Tuple[int, ...],
) -> Dict[str, List[int]]:
    """Lengths of the first axis that each activation saw, in the order of its calls."""
    seen: Dict[str, List[int]] = {}

    def saw(name: str, x: torch.Tensor) -> None:
        seen.setdefault(name, []).append(x.shape[0] if x.ndim else 0)

    watch = _WatchFunctions(saw)
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    with undisturbed(model), torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), watch:
        for name, module in activations.items():
            module.register_forward_pre_hook(lambda m, args, name=name: saw(name, args[0]))
        for name, module in callers.items():
            module.register_forward_pre_hook(lambda m, args, name=name: watch.enter(name))
            module.register_forward_hook(lambda m, args, out: watch.leave())
        model(torch.zeros(shape, dtype=like.dtype, device=like.device))
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


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and none of the user's hooks: they must not see the probe."""
    modules = list(model.modules())
    kept = [(module.training, {name: getattr(module, name) for name in _HOOKS}) for module in modules]
    for module in modules:
        for name in _HOOKS:
            setattr(module, name, OrderedDict())
    model.eval()
    try:
        yield
    finally:
        for module, (training, hooks) in zip(modules, kept):
            module.training = training
            for name, value in hooks.items():
                setattr(module, name, value)
