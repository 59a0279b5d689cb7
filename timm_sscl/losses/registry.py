"""Losses by name: one file and one decorator add a loss or a regulariser of your own."""
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Callable, Dict, List, Mapping, Type, Union

import torch
import torch.nn as nn

from timm_sscl.named import Registry

from .inputs import TrainStep
from .options import REQUIRED, TAP_ARGUMENTS, LossOption, check_option, read_options, takes_any_option, underlying

__all__ = ['LossSpec', 'register_loss', 'unregister_loss', 'create_loss', 'list_losses', 'loss_spec',
           'loss_compares_classes', 'loss_is_global', 'loss_needs']

Loss = Union[Type[nn.Module], Callable[..., Any]]


@dataclass(frozen=True)
class LossSpec:
    """What is known of a registered loss: see `register_loss`, whose arguments these are.

    Attributes:
        needs_teacher: It needs a teacher: logits, features or both.
        needs_features: It reads the features of student and teacher.
        needs_shapes: It is given the shapes of the features when it is built.
        needs_firing_rates: It reads the firing rates of the student's neuron layers.
        global_batch: Every process returns the loss of the global batch.
        compares_classes: It compares the teacher's logits with the student's class by class.
        options: Its options by name.
        any_option: It takes keyword arguments that its signature does not name.
    """
    needs_teacher: bool = False
    needs_features: bool = False
    needs_shapes: bool = False
    needs_firing_rates: bool = False
    global_batch: bool = False
    compares_classes: bool = False
    options: Mapping[str, LossOption] = field(default_factory=dict, compare=False, repr=False)
    any_option: bool = False

    def option(self, name: str, owner: str) -> LossOption:
        """One option.

        Raises:
            ValueError: There is none of this name; the message lists those that there are.
        """
        if not self.any_option:
            check_option(owner, self.options, name)
        return self.options.get(name, LossOption(name, REQUIRED, Any))


_losses: Registry[Loss] = Registry('loss')
_specs: Dict[str, LossSpec] = {}


class _FunctionLoss(nn.Module):
    """A plain function of a TrainStep as a module."""

    def __init__(self, fn: Callable[..., torch.Tensor], options: Mapping[str, Any]):
        super().__init__()
        self.fn = fn
        self.options = dict(options)

    def forward(self, step: TrainStep) -> torch.Tensor:
        return self.fn(step, **self.options)


def register_loss(
        name: str,
        needs_teacher: bool = False,
        needs_features: bool = False,
        needs_shapes: bool = False,
        needs_firing_rates: bool = False,
        global_batch: bool = False,
        other_classes: bool = False,
) -> Callable[[Loss], Loss]:
    """Decorator that registers a loss under a name, for SSCLTask and `train.py --loss NAME=WEIGHT`.

    What is decorated is called with a TrainStep and returns a 0-d tensor to minimise: a function, or an nn.Module
    class. Keyword arguments of the function or of the class's constructor are the loss's options. `create_loss` and
    `train.py --loss-kwargs NAME.OPTION=VALUE` take them. Their annotations say how a text is read, and the docstring's
    Args explain them. A class that needs features is also given `names`, `student_channels` and `teacher_channels`,
    one entry per tap. A module may offer `stats`, a dict of dicts of floats per layer, which become columns of the
    training summary. What is decorated stays as it is, and may be registered under several names.

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
        ValueError: The name is taken by another loss. The same one defined again replaces the old one, with a warning.

    Examples:
        ```python
        @register_loss('logit_norm')
        def logit_norm(step, power: float = 2.):
            return step.logits.abs().pow(power).mean()
        ```
    """
    def decorate(loss: Loss) -> Loss:
        spec = LossSpec(
            needs_teacher=needs_teacher or needs_features,
            needs_features=needs_features,
            needs_shapes=needs_features and needs_shapes,
            needs_firing_rates=needs_firing_rates,
            global_batch=global_batch,
            compares_classes=needs_teacher and not other_classes,
            options=MappingProxyType(read_options(loss, needs_features)),
            any_option=takes_any_option(loss),
        )
        _losses.register(name, loss)
        _specs[name] = spec
        return loss

    return decorate


def unregister_loss(name: str) -> None:
    """Remove a loss.

    Raises:
        ValueError: The name is not registered.
    """
    _losses.unregister(name)
    del _specs[name]


def loss_spec(name: str) -> LossSpec:
    """What a registered loss needs and which options it has.

    Raises:
        ValueError: The name is not registered.
    """
    _losses.get(name)
    return _specs[name]


def loss_needs(name: str) -> Dict[str, bool]:
    """What a registered loss needs: teacher, features, shapes (of features), firing_rates; `loss_spec` says more."""
    spec = loss_spec(name)
    return dict(teacher=spec.needs_teacher, features=spec.needs_features, shapes=spec.needs_shapes,
                firing_rates=spec.needs_firing_rates)


def loss_is_global(name: str) -> bool:
    """Whether a registered loss is that of the global batch on every process, see `register_loss`."""
    return loss_spec(name).global_batch


def loss_compares_classes(name: str) -> bool:
    """Whether a registered loss compares the teacher's logits with the student's class by class."""
    return loss_spec(name).compares_classes


def create_loss(name: str, **options: Any) -> nn.Module:
    """Build a registered loss.

    Args:
        name: Registered name, see list_losses().
        **options: Its options, see `loss_spec(name).options`. A loss that needs features also takes the taps' `names`,
            `student_channels` and `teacher_channels`.

    Returns:
        Module that maps a TrainStep to a 0-d tensor.

    Raises:
        ValueError: The name is not registered, or an option does not exist or does not fit.
    """
    loss, spec = _losses.get(name), loss_spec(name)
    taps = TAP_ARGUMENTS if spec.needs_features else ()
    for option in options:
        if option not in taps:
            spec.option(option, f"loss '{name}'")
    if not isinstance(underlying(loss), type):
        return _FunctionLoss(loss, {k: v for k, v in options.items() if k not in taps})
    try:
        return loss(**options)
    except TypeError as error:
        raise ValueError(f"loss '{name}': {error}") from error


def list_losses() -> List[str]:
    """Names of all registered losses, sorted."""
    return _losses.names()
