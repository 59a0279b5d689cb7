"""Losses by name: one file and one decorator add a loss or a regulariser of your own."""
from typing import Any, Callable, Dict, List, Type, Union

import torch
import torch.nn as nn

from timm_sscl.named import Registry

from .inputs import TrainStep

__all__ = ['register_loss', 'unregister_loss', 'create_loss', 'list_losses', 'loss_compares_classes', 'loss_is_global',
           'loss_needs']

_losses: Registry[Callable[..., nn.Module]] = Registry('loss')
_TAP_OPTIONS = ('names', 'student_channels', 'teacher_channels', 'student_shapes', 'teacher_shapes')


class _FunctionLoss(nn.Module):
    """A plain function of a TrainStep as a module."""

    def __init__(self, fn: Callable[[TrainStep], torch.Tensor]):
        super().__init__()
        self.fn = fn

    def forward(self, step: TrainStep) -> torch.Tensor:
        return self.fn(step)


def register_loss(
        name: str,
        needs_teacher: bool = False,
        needs_features: bool = False,
        needs_shapes: bool = False,
        needs_firing_rates: bool = False,
        global_batch: bool = False,
        other_classes: bool = False,
) -> Callable:
    """Decorator that registers a loss under a name, for SSCLTask and `train.py --loss NAME=WEIGHT`.

    What is decorated is called with a TrainStep and returns a 0-d tensor to minimise: a function, or an nn.Module class
    whose constructor takes the loss's options by keyword. A class that needs features is also given `names`,
    `student_channels` and `teacher_channels`, one entry per tap. A module may offer `stats`, a dict of dicts of floats
    per layer, which become columns of the training summary.

    Args:
        name: Name of the loss.
        needs_teacher: Whether it reads the teacher's logits.
        needs_features: Whether it reads the features of student and teacher.
        needs_shapes: Whether a class that needs features is given `student_shapes` and `teacher_shapes` as well, the
            (T, C, ...) of every tap's feature on an image of the task's input_size.
        needs_firing_rates: Whether it reads the firing rates of the student's neuron layers.
        global_batch: Whether several processes all return the loss of the global batch (see `gather_rows`). Otherwise
            it is taken as a mean over the process's own samples, and weighted by their number.
        other_classes: Whether the teacher's logits may be of other classes than the student's; without it SSCLTask
            raises where a loss that needs the teacher's logits would compare different numbers of classes.

    Raises:
        ValueError: The name is taken.

    Examples:
        ```python
        @register_loss('logit_norm')
        def logit_norm(step):
            return step.logits.square().mean()
        ```
    """
    def decorate(loss: Union[Type[nn.Module], Callable]) -> Union[Type[nn.Module], Callable]:
        _losses.register(name, loss)
        loss.needs_teacher = needs_teacher or needs_features
        loss.needs_features = needs_features
        loss.needs_shapes = needs_features and needs_shapes
        loss.needs_firing_rates = needs_firing_rates
        loss.global_batch = global_batch
        loss.compares_classes = needs_teacher and not other_classes
        return loss

    return decorate


def unregister_loss(name: str) -> None:
    """Remove a loss.

    Raises:
        ValueError: The name is not registered.
    """
    _losses.unregister(name)


def loss_needs(name: str) -> Dict[str, bool]:
    """What a registered loss needs: teacher (its logits), features, shapes (of features), firing_rates."""
    loss = _losses.get(name)
    return dict(teacher=loss.needs_teacher, features=loss.needs_features, shapes=loss.needs_shapes,
                firing_rates=loss.needs_firing_rates)


def loss_is_global(name: str) -> bool:
    """Whether a registered loss is that of the global batch on every process, see `register_loss`."""
    return _losses.get(name).global_batch


def loss_compares_classes(name: str) -> bool:
    """Whether a registered loss compares the teacher's logits with the student's class by class."""
    return _losses.get(name).compares_classes


def create_loss(name: str, **options: Any) -> nn.Module:
    """Build a registered loss.

    Args:
        name: Registered name, see list_losses().
        **options: Options of its constructor.

    Returns:
        Module that maps a TrainStep to a 0-d tensor.

    Raises:
        ValueError: The name is not registered, or an option does not fit.
    """
    loss = _losses.get(name)
    if not isinstance(loss, type):
        if loss.needs_features:
            options = {k: v for k, v in options.items() if k not in _TAP_OPTIONS}
        if options:
            raise ValueError(f"loss '{name}' is a function and takes no options, got {', '.join(options)}.")
        return _FunctionLoss(loss)
    try:
        return loss(**options)
    except TypeError as error:
        raise ValueError(f"loss '{name}': {error}") from error


def list_losses() -> List[str]:
    """Names of all registered losses, sorted."""
    return _losses.names()
