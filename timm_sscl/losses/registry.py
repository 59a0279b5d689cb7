"""Register losses by name with a decorator, and build them."""
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Callable, Dict, List, Literal, Mapping, Optional, Tuple, Type, Union

import torch
import torch.nn as nn

from timm_sscl.named import Registry

from .inputs import TrainStep
from .options import (
    INDEX_ARGUMENTS, REQUIRED, TAP_ARGUMENTS, LossOption, check_option, read_options, takes_any_option, underlying)

__all__ = ['LossSpec', 'register_loss', 'unregister_loss', 'create_loss', 'list_losses', 'loss_spec',
           'loss_compares_classes', 'loss_is_global', 'loss_needs']

Loss = Union[Type[nn.Module], Callable[..., Any]]
OptionTest = Callable[[Mapping[str, Any]], bool]
Minimum = Union[Literal['teacher', 'nowhere'], float]


@dataclass(frozen=True)
class LossSpec:
    """Properties of a registered loss; see the arguments of `register_loss`.

    Attributes:
        needs_teacher: It needs a teacher: logits, features or both.
        needs_features: It uses the features of student and teacher.
        needs_shapes: Its constructor receives the shapes of the features.
        needs_firing_rates: It uses the firing rates of the student's neuron layers.
        needs_teacher_head: It uses the teacher's classifier.
        needs_labels: It needs one label per sample, and no soft targets; with the defaults of its options.
        needs_membranes: It uses the membrane potentials of the student's neuron layers.
        needs_index: It uses the indices of the samples.
        global_batch: Every process returns the loss of the global batch.
        compares_classes: It compares the teacher's logits with the student's class by class.
        minimum: Where the loss is smallest: 'teacher', 'nowhere', or a value of every membrane potential.
        options: Its options by name.
        any_option: It accepts keyword arguments that its signature does not name.
        labels_if: Function of the options that decides needs_labels; None if it does not depend on them.
    """
    needs_teacher: bool = False
    needs_features: bool = False
    needs_shapes: bool = False
    needs_firing_rates: bool = False
    needs_teacher_head: bool = False
    needs_labels: bool = False
    global_batch: bool = False
    compares_classes: bool = False
    minimum: Minimum = 'nowhere'
    options: Mapping[str, LossOption] = field(default_factory=dict, compare=False, repr=False)
    any_option: bool = False
    needs_membranes: bool = False
    needs_index: bool = False
    labels_if: Optional[OptionTest] = field(default=None, compare=False, repr=False)

    @property
    def passed(self) -> Tuple[str, ...]:
        """Arguments of the constructor that the task passes."""
        return (*(TAP_ARGUMENTS if self.needs_features else ()), *(INDEX_ARGUMENTS if self.needs_index else ()))

    def with_options(self, options: Mapping[str, Any]) -> 'LossSpec':
        """Return the properties of the loss with these options. The others have their defaults."""
        if self.labels_if is None:
            return self
        defaults = {name: option.default for name, option in self.options.items()}
        return replace(self, needs_labels=bool(self.labels_if({**defaults, **options})))

    def option(self, name: str, owner: str) -> LossOption:
        """Return one option.

        Raises:
            ValueError: There is none of this name. The message lists the options.
        """
        if not self.any_option:
            check_option(owner, self.options, name)
        return self.options.get(name, LossOption(name, REQUIRED, Any))


_losses: Registry[Loss] = Registry('loss', separators='=,.')
_specs: Dict[str, LossSpec] = {}


class _FunctionLoss(nn.Module):
    """Module that calls a plain function of a TrainStep."""

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
        minimum: Minimum = 'nowhere',
        needs_teacher_head: bool = False,
        needs_labels: Union[bool, OptionTest] = False,
        needs_membranes: bool = False,
        needs_index: bool = False,
) -> Callable[[Loss], Loss]:
    """Decorator that registers a loss by name, for SSCLTask and `train.py --loss NAME=WEIGHT`.

    Decorate a function or an nn.Module class. It is called with a TrainStep and returns a 0-d tensor to minimise.
    Keyword arguments of the function or of the constructor are the options of the loss, which `create_loss` and
    `train.py --loss-kwargs NAME.OPTION=VALUE` accept. Type annotations determine how a text is parsed, and the
    docstring's Args are the help texts. A class that needs features also receives `names`, `student_channels` and
    `teacher_channels`, one entry per tap. A class that needs the index receives `num_samples`, the size of the training
    set. A module may have `stats`, a dict of dicts of floats per layer, which become
    columns of the training summary. The decorated object is returned unchanged and may be registered under several
    names.

    Args:
        name: Name of the loss.
        needs_teacher: Whether it uses the teacher's logits.
        needs_features: Whether it uses the features of student and teacher.
        needs_shapes: Whether a class that needs features also receives `student_shapes` and `teacher_shapes`, the
            (T, C, ...) of every tap's feature for an image of the task's input_size.
        needs_firing_rates: Whether it uses the firing rates of the student's neuron layers.
        global_batch: Whether all of several processes return the loss of the global batch (see `gather_rows`).
            Otherwise the loss is a mean over the process's own samples and is weighted by their number.
        other_classes: Whether the teacher's logits may have other classes than the student's. Otherwise SSCLTask raises
            if the loss uses the teacher's logits and the numbers of classes differ.
        minimum: Where the loss is smallest, with the defaults of its options: 'teacher' if it is 0, without a gradient,
            for a student that outputs what the teacher outputs; a number if it is so where all membrane potentials
            have this value. The tests of all losses check it.
        needs_teacher_head: Whether it uses the teacher's classifier, `step.teacher_head`.
        needs_labels: Whether it needs labels, one per sample; or a function of its options, by name, that decides it.
            The script then refuses mixup and cutmix.
        needs_membranes: Whether it uses the membrane potentials of the student's neuron layers, `step.membranes`.
        needs_index: Whether it uses the indices of the samples, `step.index`.

    Raises:
        ValueError: The name is taken by another loss, is one of SSCLTask's own results, or is not possible on the
            command line; or an option of a function has no default. The same loss defined again replaces the old one
            with a warning.

    Examples:
        ```python
        @register_loss('logit_norm')
        def logit_norm(step, power: float = 2.):
            return step.logits.abs().pow(power).mean()
        ```
    """
    def decorate(loss: Loss) -> Loss:
        _check_loss(name, loss)
        by_options = None if isinstance(needs_labels, bool) else needs_labels
        spec = LossSpec(
            needs_teacher=needs_teacher or needs_features or needs_teacher_head,
            needs_features=needs_features,
            needs_shapes=needs_features and needs_shapes,
            needs_firing_rates=needs_firing_rates,
            needs_teacher_head=needs_teacher_head,
            needs_labels=by_options is None and bool(needs_labels),
            global_batch=global_batch,
            compares_classes=needs_teacher and not other_classes,
            minimum=minimum,
            any_option=takes_any_option(loss),
            needs_membranes=needs_membranes,
            needs_index=needs_index,
            labels_if=by_options,
        )
        spec = replace(spec, options=MappingProxyType(read_options(loss, spec.passed))).with_options({})
        _losses.register(name, loss)
        _specs[name] = spec
        return loss

    return decorate


def _check_loss(name: str, loss: Loss) -> None:
    """Raise ValueError if SSCLTask needs a name for its own results, or if an option of a function has no default."""
    if name in ('output', 'task') or hasattr(nn.ModuleDict(), str(name)):
        raise ValueError(f"register_loss('{name}'): SSCLTask uses this name itself; choose another one.")
    if isinstance(underlying(loss), type):
        return  # `create_loss` checks a constructor's arguments
    for option in read_options(loss).values():
        if option.default is REQUIRED:
            raise ValueError(f"register_loss('{name}'): the option {option.name} has no default. A function is called "
                             f'with a TrainStep; its other parameters are options, each with a default.')


def unregister_loss(name: str) -> None:
    """Remove a loss.

    Raises:
        ValueError: The name is not registered.
    """
    _losses.unregister(name)
    del _specs[name]


def loss_spec(name: str) -> LossSpec:
    """Return the needs and options of a registered loss.

    Raises:
        ValueError: The name is not registered.
    """
    _losses.get(name)
    return _specs[name]


def loss_needs(name: str) -> Dict[str, bool]:
    """Return what a registered loss needs: teacher, features, shapes (of features), firing_rates. See also `loss_spec`.
    """
    spec = loss_spec(name)
    return dict(teacher=spec.needs_teacher, features=spec.needs_features, shapes=spec.needs_shapes,
                firing_rates=spec.needs_firing_rates)


def loss_is_global(name: str) -> bool:
    """Return whether a registered loss returns the loss of the global batch on every process; see `register_loss`."""
    return loss_spec(name).global_batch


def loss_compares_classes(name: str) -> bool:
    """Return whether a registered loss compares the teacher's logits with the student's class by class."""
    return loss_spec(name).compares_classes


def create_loss(name: str, **options: Any) -> nn.Module:
    """Build a registered loss.

    Args:
        name: Registered name, see list_losses().
        **options: Options of the loss, see `loss_spec(name).options`. A loss that needs features also takes `names`,
            `student_channels` and `teacher_channels` of the taps, and one that needs the index `num_samples`.

    Returns:
        Module that maps a TrainStep to a 0-d tensor.

    Raises:
        ValueError: The name is not registered, or an option does not exist or is not valid.
    """
    loss: Callable[..., Any] = _losses.get(name)
    spec = loss_spec(name)
    options = {option: value if option in spec.passed else spec.option(option, f"loss '{name}'").read(value, name)
               for option, value in options.items()}
    if not isinstance(underlying(loss), type):
        return _FunctionLoss(loss, {k: v for k, v in options.items() if k not in spec.passed})
    try:
        return loss(**options)
    except TypeError as error:
        raise ValueError(f"loss '{name}': {error}") from error


def list_losses() -> List[str]:
    """Return the names of all registered losses, sorted."""
    return _losses.names()
