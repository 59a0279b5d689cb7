"""Validate a model: metrics, firing rates, and stuck layers."""
import logging
from collections import OrderedDict
from contextlib import nullcontext
from typing import Any, Callable, Dict, Iterator, Optional, Tuple

import torch
import torch.nn as nn
from timm.task.evaluator import ClassificationEvaluator
from timm.utils import unwrap_model

from timm_sscl.report import FiringRates

from ..exits import DATA_ERRORS, OtherProcessFailed
from .loop import save_recovery
from ..session import Session
from ..saving.state import Training

__all__ = ['evaluate', 'validate', 'validate_when_due']

_logger = logging.getLogger('train')


def _batches_or_stop_all(session: Session, loader: Any) -> Iterator[Any]:
    """Yield the loader's batches. If a sample cannot be read, tell the other processes to stop before raising."""
    try:
        yield from loader
    except DATA_ERRORS:
        session.stop_if_asked(True)
        raise


@torch.no_grad()
def evaluate(
        session: Session,
        model: nn.Module,
        loader: Any,
        cast: Callable,
        evaluator: Optional[ClassificationEvaluator] = None,
) -> 'OrderedDict[str, float]':
    """Return loss, top-1 and top-5 on a prepared validation loader. Every image counts once."""
    model.eval()
    accelerator = session.accelerator
    evaluator = ClassificationEvaluator(accelerator.device) if evaluator is None else evaluator
    for input, target in _batches_or_stop_all(session, loader):
        failed, stop = session.stop_if_asked()
        if failed:
            raise OtherProcessFailed('another process stopped the run; its own message says why.')
        if stop:
            session.interrupt()
        with accelerator.autocast():
            output = model(cast(input))
        output = output[0] if isinstance(output, (tuple, list)) else output
        output, target = accelerator.gather_for_metrics((output.float().contiguous(), target))
        evaluator.update(output, target)
    return evaluator.compute()


def validate(training: Training, epoch: int) -> Tuple[Dict[str, float], Dict[str, float]]:
    """Return metrics on the validation set and every neuron layer's firing rate. All processes must call this."""
    args, session, loader = training.args, training.session, training.eval_loader
    model, spiking = training.eval_model, hasattr(unwrap_model(training.eval_model), 'set_timesteps')
    last = epoch + 1 >= training.epochs
    if spiking and args.torchcompile:  # hooks would recompile the model at every validation
        spiking = last
        model = unwrap_model(model) if spiking else model
    firing = FiringRates(model, inputs=last) if spiking else None  # the last ones determine the energy
    with training.compiling, firing or nullcontext():
        metrics = evaluate(session, model, loader, training.prepare_input)
    if firing is not None:
        firing.sum_over_processes()
    training.step_rates = firing.per_step() if firing is not None else {}
    training.firing = firing
    rates = firing.per_layer() if firing is not None else {}
    _warn_stuck_layers(training, epoch, rates)
    if training.task.has_ema() and not args.model_ema_force_cpu:
        averaged: Any = training.task.get_eval_model(ema=True)
        average = evaluate(session, averaged, loader, training.prepare_input)
        metrics = OrderedDict({**metrics, **{f'{k}_ema': v for k, v in average.items()}})
    return metrics, rates


def validate_when_due(training: Training, epoch: int) -> Tuple[Dict[str, float], Dict[str, float]]:
    """Validate after every --val-interval epochs and after the last; return empty results otherwise."""
    if epoch + 1 < training.epochs and (epoch + 1) % training.args.val_interval:
        return {}, {}
    save_recovery(training)  # so that a failing validation loses no training
    metrics, rates = validate(training, epoch)
    shown = '  '.join(f'{k} {v:.4g}' for k, v in metrics.items())
    _logger.info(f'{training.name} epoch {epoch + 1}/{training.epochs} validation: {shown}')
    return metrics, rates


def _warn_stuck_layers(training: Training, epoch: int, rates: Dict[str, float]) -> None:
    """Warn of layers that never or always fire and did fire, or not always, before."""
    stuck = {name: 'never' if rate == 0. else 'always' for name, rate in rates.items() if rate in (0., 1.)}
    for name, what in stuck.items() if training.accelerator.is_main_process else ():
        if training.stuck_layers.get(name) != what:
            _logger.warning(f'Layer {name} {what} fires on the validation set (epoch {epoch + 1}).')
    training.stuck_layers = stuck
