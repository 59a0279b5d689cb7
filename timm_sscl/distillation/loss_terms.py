"""Call the losses of a training step, and check what they return and that they leave the step as it is."""
import logging
import traceback
from typing import Any, Dict, Iterator, Mapping, Optional, Set, Tuple

import torch
import torch.nn as nn

from timm_sscl.losses import TrainStep

__all__ = ['TermCheck', 'WrongLoss', 'compute_terms']

_logger = logging.getLogger(__name__)

# attributes of a TrainStep that are None if no loss asked for them, and how a loss asks
_ASKED_BY = {
    'teacher_logits': 'needs_teacher=True', 'student_features': 'needs_features=True',
    'teacher_features': 'needs_features=True', 'firing_rates': 'needs_firing_rates=True',
    'teacher_head': 'needs_teacher_head=True', 'membranes': 'needs_membranes=True', 'index': 'needs_index=True'}
_State = Dict[str, Tuple[int, int]]  # name -> identity and version of a tensor


class WrongLoss(ValueError):
    """A loss breaks its contract.

    It does not return a 0-d tensor with a gradient, it changes the training step, or it reads a field that it did not
    request when it was registered.
    """


def compute_terms(losses: nn.ModuleDict, step: TrainStep) -> Dict[str, Any]:
    """Return what every loss returns for a training step. Code under torch.compile is not checked.

    Raises:
        WrongLoss: A loss changed a tensor of the step in place, or read a field that is None because the loss did
            not request it.
    """
    if torch.compiler.is_compiling():
        return {name: loss(step) for name, loss in losses.items()}
    terms = {}
    for name, loss in losses.items():
        before = _state(step)
        terms[name] = _call(name, loss, step)
        after = _state(step)
        changed = [key for key in {**before, **after} if before.get(key) != after.get(key)]
        if changed:
            raise WrongLoss(f"loss '{name}' changes step.{changed[0]} in place, which the other losses and the "
                            f"student's output use as well; let it change a copy (clone()).")
    return terms


def _call(name: str, loss: nn.Module, step: TrainStep) -> Any:
    try:
        return loss(step)
    except (TypeError, AttributeError) as error:
        reason = ' '.join(str(error).split())
        missing = _missing(step, error) if 'NoneType' in reason else None
        if missing is None:
            raise
        attribute, place = missing
        raise WrongLoss(f"loss '{name}': step.{attribute} is None ({reason}; {place}); the loss asks for it by "
                        f"register_loss('{name}', {_ASKED_BY[attribute]}).") from error


def _missing(step: TrainStep, error: Exception) -> Optional[Tuple[str, str]]:
    """Return the name of a None field that the failing code reads, with file and line; None if there is none."""
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        for attribute in _ASKED_BY:
            if getattr(step, attribute) is None and attribute in frame.f_code.co_names:
                return attribute, f'{frame.f_code.co_filename}, line {line}'
    return None


def _state(step: TrainStep) -> _State:
    """Return the id and the version of every tensor of a step. PyTorch raises the version with each in-place change."""
    return {name: (id(tensor), -1 if tensor.is_inference() else tensor._version) for name, tensor in _tensors(step)}


def _tensors(step: TrainStep) -> Iterator[Tuple[str, torch.Tensor]]:
    for name in ('input', 'target', 'step_logits', 'teacher_logits', 'index'):
        if getattr(step, name) is not None:
            yield name, getattr(step, name)
    for name in ('student_features', 'teacher_features'):
        for i, tensor in enumerate(getattr(step, name) or ()):
            yield f'{name}[{i}]', tensor
    for name in ('firing_rates', 'membranes'):
        for layer, tensor in (getattr(step, name) or {}).items():
            yield f"{name}['{layer}']", tensor


class TermCheck:
    """Check that losses return 0-d floating point tensors with a gradient. It reads no values from the device.

    A loss that is 0 without a gradient, such as one that is turned off for a while, only logs a warning, once. To find
    that out, the value of a loss without a gradient is read, once.
    """

    def __init__(self) -> None:
        self.constant: Set[str] = set()  # losses that the warning named

    def __call__(self, terms: Mapping[str, Any], student: nn.Module) -> None:
        """Check the losses of one training step.

        Args:
            terms: What the losses returned, by name.
            student: The student.

        Raises:
            WrongLoss: A loss is no 0-d floating point tensor, or has no gradient although parameters of the student
                train.
        """
        for name, term in terms.items():
            problem = _problem(term)
            if problem:
                raise WrongLoss(f"loss '{name}' returns {problem}; it must return a 0-d floating point tensor, such as "
                                f'the mean over the batch.')
            if not term.requires_grad and name not in self.constant and torch.is_grad_enabled():
                self._check_constant(name, term, student)

    def _check_constant(self, name: str, term: torch.Tensor, student: nn.Module) -> None:
        if not any(p.requires_grad for p in student.parameters()):
            return
        if term.detach().item() != 0:
            raise WrongLoss(f"loss '{name}' has no gradient, so it would train nothing: it is detached (detach(), "
                            f'item(), no_grad()), rounded or compared, or nothing that it is computed from is trained.')
        self.constant.add(name)
        _logger.warning(f"Loss '{name}' is 0 without a gradient: it trains nothing.")


def _problem(term: Any) -> str:
    """Describe what is wrong with the type of a loss's value; '' if it is right."""
    if not isinstance(term, torch.Tensor):
        return f'{term!r} ({type(term).__name__})' if isinstance(term, (bool, int, float)) else \
            'None' if term is None else f'a {type(term).__name__}'
    good = term.ndim == 0 and term.is_floating_point()
    return '' if good else f'a tensor of {term.dtype} and shape {tuple(term.shape)}'
