"""Stop a training in which a value is not finite, a process failed, or a signal asked for it."""
from typing import Any, Dict, List, NoReturn, Optional

import torch
from timm.utils import unwrap_model

from timm_sscl.models.finite import find_non_finite

from ..saving.checkpoint import Position
from ..exits import NonFiniteLoss, OtherProcessFailed
from .meters import layer_stats, scalar_terms
from ..saving.state import Training
from .step_check import BadStep

__all__ = ['guard_step', 'settle', 'check_weights']

_TERMS = {'task_loss': 'the cross-entropy (task_loss)'}


def guard_step(training: Training, step: int, result: Dict[str, torch.Tensor]) -> bool:
    """Keep values that are not finite out of the weights, and return whether to stop after this step.

    Nothing here waits for the device: loss and gradients are checked there (`StepCheck`), and the answer is read one
    step later, as is what other processes say (`StopVote`). Call this after the backward, before gradients are clipped.

    Raises:
        NonFiniteLoss, OtherProcessFailed: As `settle` does for the step before.
    """
    accelerator, session = training.accelerator, training.session
    stop = settle(training)
    session.vote.cast(training.read_failure is not None, session.stop.signal_number is not None)
    if accelerator.num_processes == 1:
        stop = session.vote.read()[1]
    parameters: List[Any] = []
    scale: Optional[torch.Tensor] = None
    if accelerator.sync_gradients:
        accelerator.unscale_gradients()
        parameters = list(unwrap_model(training.module).named_parameters())
        if accelerator.scaler is not None and accelerator.scaler.is_enabled():
            scale = accelerator.scaler.scale(result['loss'].new_ones((), dtype=torch.float32))
    terms = {**{k: v for k, v in scalar_terms(result).items() if k != 'loss'}, **layer_stats(training.task)}
    training.check.start(Position(training.position.epoch, step), result['loss'], terms, parameters, scale)
    return stop


def settle(training: Training) -> bool:
    """Read the answers for the last step, and return whether any process was told to stop. All processes must call
    this.

    Raises:
        NonFiniteLoss: The loss or the gradients are nan or infinite. No such value has reached a weight.
        OtherProcessFailed: Another process reports the reason.
    """
    failed, stop = training.session.vote.read()
    bad = training.check.read()
    if failed and training.read_failure is not None:
        raise training.read_failure
    if failed or (bad is not None and not bad.mine):
        raise OtherProcessFailed('another process stopped the run; its own message says why.')
    if bad is None:
        return stop
    _raise(training, bad)


def _raise(training: Training, bad: BadStep) -> NoReturn:
    where = f'at epoch {bad.place.epoch + 1}, step {bad.place.step + 1}'
    end = f'The last checkpoint in {training.folder} is from before. A smaller --lr or --clip-grad may help.'
    for name, parameter in unwrap_model(training.module).named_parameters():
        if not parameter.isfinite().all():
            raise NonFiniteLoss(
                f"{training.name}: '{name}' is not finite {where}: an update by finite gradients overflowed. {end}")
    what = 'the loss is' if bad.loss else 'the gradients are'
    raise NonFiniteLoss(
        f'{training.name}: {what} not finite {where}: {bad.reason(_TERMS)}. No value that is not finite has reached a '
        f'weight: this step moved the weights by momentum and weight decay at most. {end}')


def check_weights(training: Training) -> None:
    """Raise NonFiniteLoss if a weight is nan or infinite, before it is saved."""
    for name in find_non_finite(unwrap_model(training.module).state_dict()):
        raise NonFiniteLoss(
            f"'{name}' is not finite at epoch {training.position.epoch + 1}, step {training.position.step}, so "
            f'this checkpoint was not written; those in {training.folder} are from before. A smaller '
            f'--lr or --clip-grad may help.')
