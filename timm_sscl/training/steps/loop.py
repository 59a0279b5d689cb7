"""Functions that train.py's loop calls around its steps: batches, progress, checkpoints, signals, the end of an epoch.
"""
import logging
import time
from argparse import Namespace
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any, Callable, ContextManager, Dict, Iterator, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from accelerate import skip_first_batches
from accelerate.utils import gather_object
from timm.utils import distribute_bn, unwrap_model
from timm.utils.clip_grad import dispatch_clip_grad
from torchvision.utils import save_image

from timm_sscl.data.samples import Samples
from timm_sscl.distillation import SSCLTask
from timm_sscl.neurons import SpikingNeuron, packed_spikes
from timm_sscl.report import mean_per_step

from ..saving.checkpoint import Position
from ..exits import DATA_ERRORS
from .guard import check_weights, settle
from .meters import Meters
from .progress import ProgressLine
from ..runs.rows import append_row
from ..runs.silent_layers import SilentLayers
from ..saving.state import Training, collect_run_state

__all__ = [
    'EpochProgress', 'epochs_left', 'begin_epoch', 'batches_left', 'watch_layers', 'end_step', 'end_of_batches',
    'finish_epoch', 'save_recovery', 'clip_gradients', 'count_update', 'share_of_update', 'spike_packing',
    'task_inputs',
]

_logger = logging.getLogger('train')


# ---- epochs

@dataclass
class EpochProgress:
    """Progress of an epoch's batches on the terminal."""
    line: ProgressLine
    steps: int  # number of steps in the whole epoch
    began: float = field(default_factory=time.time)
    compiled: float = 0.  # seconds of compilations before the epoch
    images: int = 0  # images trained on since the start, over all processes
    checkpoint_due: bool = False
    layers: Optional[SilentLayers] = None  # records layers that do not fire


def epochs_left(training: Training) -> range:
    """Return the numbers of the epochs from the current to the last."""
    if training.position.epoch >= training.epochs:
        _logger.info(f'{training.name}: all {training.epochs} epochs are done already.')
    return range(training.position.epoch, training.epochs)


def begin_epoch(training: Training, epoch: int, layers: Optional[SilentLayers] = None) -> EpochProgress:
    """Set data, mixup, surrogates and modes for an epoch, of which some steps may be done already."""
    done = training.position.step if epoch == training.position.epoch else 0
    if not done:
        training.meters = Meters()
    training.position = Position(epoch, done)
    if hasattr(training.train_loader, 'set_epoch'):
        training.train_loader.set_epoch(epoch)
    if isinstance(training.dataset, Samples):
        training.dataset.set_epoch(epoch)
    if training.args.mixup_off_epoch and epoch >= training.args.mixup_off_epoch and training.mixup is not None:
        training.mixup.mixup_enabled = False
    for module in unwrap_model(training.module).modules():
        if isinstance(module, SpikingNeuron):
            module.set_progress(epoch / training.epochs)
    if isinstance(training.task, SSCLTask):
        training.task.set_progress(epoch / training.epochs)
    training.task.train()
    return EpochProgress(ProgressLine(training.accelerator.is_main_process), len(training.train_loader), layers=layers,
                         compiled=training.compiling.seconds)


def batches_left(training: Training) -> Iterator[Tuple[int, Sequence[torch.Tensor]]]:
    """Yield (step, batch) from the first step that is not done. If a sample cannot be read, the progress is saved
    first.
    """
    step, loader, batch = training.position.step, training.train_loader, None
    try:
        for batch in skip_first_batches(loader, step) if step else loader:
            yield step, batch
            step += 1
    except DATA_ERRORS as error:
        alone = training.accelerator.num_processes == 1
        if alone:
            save_recovery(training)
        if alone or batch is None:
            raise
        training.read_failure = error
        while step < len(loader):  # the other processes are in this step, and learn of the failure in the next
            yield step, batch
            step += 1


@contextmanager
def watch_layers(training: Training) -> Iterator[Optional[SilentLayers]]:
    """Record layers that do not fire, and the time of compilations.

    There is no record for an ANN, or with torch.compile, which ignores new hooks.
    """
    model = training.eval_model
    spiking = isinstance(model, nn.Module) and hasattr(unwrap_model(model), 'set_timesteps')
    layers = SilentLayers(unwrap_model(model)) if spiking and not training.args.torchcompile else nullcontext()
    with training.compiling, layers as record:
        yield record


def _warn_silent_layers(training: Training, layers: Optional[SilentLayers], step: int) -> None:
    """Warn of layers that have not fired since the last log and did before. All processes must call this."""
    silent = layers.names() if layers is not None else []
    new = [name for name in silent if name not in training.silent_layers]
    if new and training.accelerator.is_main_process:
        _logger.warning(f'Not one spike in training since the last log, at epoch {training.position.epoch + 1}, step '
                        f'{step}: {", ".join(new)}.')
    training.silent_layers = silent


def end_step(
        training: Training,
        progress: EpochProgress,
        step: int,
        input: torch.Tensor,
        stop: bool,
) -> None:
    """Finish a step: update the progress line, write a due recovery checkpoint, and stop if a signal asked for it."""
    args, accelerator, steps = training.args, training.accelerator, progress.steps
    progress.images += len(input) * accelerator.num_processes
    training.steps_done += 1
    last = step + 1 == steps
    seconds = time.time() - progress.began - (training.compiling.seconds - progress.compiled)
    if last:
        training.images_done += progress.images
        training.seconds += seconds
    logs = last or (step + 1) % args.log_interval == 0
    rate = progress.images / seconds
    progress.line.update(partial(_progress_text, training, steps, step + 1, rate), logs, last=last)
    if logs:
        _warn_silent_layers(training, progress.layers, step + 1)
    if logs and args.save_images and accelerator.is_main_process:
        save_image(input, training.folder / f'train-batch-{step}.jpg', padding=0, normalize=True)
    if args.recovery_interval and (step + 1) % args.recovery_interval == 0:
        progress.checkpoint_due = True
    if not accelerator.sync_gradients:  # between accumulated steps there are gradients that no file holds
        return
    training.position = Position(training.position.epoch, step + 1)
    if last or stop or progress.checkpoint_due:
        stop = settle(training) or stop
    if stop or progress.checkpoint_due:
        save_recovery(training)
        progress.checkpoint_due = False
    if stop:
        training.session.interrupt()


def _progress_text(training: Training, steps: int, step: int, rate: float) -> str:
    """Return the line with the mean losses of this epoch, images per second, and the time left."""
    epoch = training.position.epoch
    per_step = (time.time() - training.started - training.compiling.seconds) / training.steps_done
    left = timedelta(seconds=round(per_step * (steps * (training.epochs - epoch) - step)))
    losses = {k: v for k, v in training.meters.means().items() if k == 'loss' or k.endswith('_loss')}
    terms = '  '.join(f'{k} {v:.4g}' for k, v in losses.items())
    lr = max(group['lr'] for group in training.optimizer.param_groups)
    return (f'{training.name} epoch {epoch + 1}/{training.epochs} [{step:>4}/{steps}]  {terms}  lr {lr:.3g}  '
            f'{rate:.0f} img/s  ETA {left}')


def end_of_batches(training: Training) -> Dict[str, float]:
    """Combine unreadable samples and batch norm statistics of all processes after an epoch's batches; return the mean
    losses.
    """
    accelerator, dataset, args = training.accelerator, training.dataset, training.args
    if accelerator.num_processes > 1 and isinstance(dataset, Samples):
        dataset.mark_unreadable(sorted(set(gather_object(dataset.unreadable))))
        dataset.check_limit()
    if accelerator.num_processes > 1 and args.dist_bn:
        reduce = args.dist_bn == 'reduce'
        distribute_bn(training.module, accelerator.num_processes, reduce)
        if training.task.has_ema() and not args.model_ema_force_cpu:
            distribute_bn(training.task.get_trainable_module(ema=True), accelerator.num_processes, reduce)
    return training.meters.means()


def finish_epoch(
        training: Training,
        epoch: int,
        train_metrics: Dict[str, float],
        metrics: Dict[str, float],
        rates: Dict[str, float],
) -> None:
    """Step the schedule, write the row in summary.csv and the epoch's checkpoint. All processes must call this."""
    name, scheduler = training.args.eval_metric, training.scheduler
    # metrics of the averaged model rank the epochs if there is one, as in timm
    metric = metrics.get(f'{name}_ema', metrics.get(name))
    groups = training.optimizer.param_groups
    columns = {
        **{f'train_{k}': v for k, v in train_metrics.items()}, **{f'eval_{k}': v for k, v in metrics.items()},
        **{f'firing_rate_{k}': v for k, v in rates.items()},
        **{f'firing_rate_step{t + 1}': v for t, v in enumerate(mean_per_step(training.step_rates) if rates else ())},
        'lr': sum(group['lr'] for group in groups) / len(groups)}
    training.accelerator.log({f'{training.name}/{k}': v for k, v in columns.items()}, step=epoch)
    if scheduler is not None:
        scheduler.step(epoch + 1, metric)
    training.position = Position(epoch + 1, 0)
    check_weights(training)
    state = collect_run_state(training)
    if training.saver is not None:
        append_row(training.folder / 'summary.csv', {'epoch': epoch, **columns})
        training.saver.save_epoch(training.position, state, metric=metric)


def save_recovery(training: Training) -> None:
    """Save a recovery checkpoint. All processes must call this."""
    settle(training)
    check_weights(training)
    state = collect_run_state(training)
    if training.saver is not None:
        training.saver.save_recovery(training.position, state)


# ---- parts of a step

def spike_packing(args: Namespace) -> ContextManager:
    """--pack-spikes: return the context in which convolutions save their input spikes as bits."""
    return packed_spikes() if args.pack_spikes else nullcontext()


def task_inputs(training: Training, input: torch.Tensor, index: Sequence[torch.Tensor]) -> Dict[str, Any]:
    """Return further arguments of the student's task: the indices of the samples if a loss uses them, and with
    --teacher-cache the cached teacher outputs.

    Args:
        training: The training.
        input: Images.
        index: Indices of the samples, as the one item of a sequence; empty if the loader has none.
    """
    cache, task = training.teacher_cache, training.task
    inputs: Dict[str, Any] = {}
    if isinstance(task, SSCLTask) and task.index_losses:
        inputs['index'], = index
    if cache is None:
        return inputs
    teach: Callable[..., Any] = training.task.teach
    samples, = index
    if not cache.is_open:
        outputs = teach(input)
        with training.accelerator.local_main_process_first():
            cache.open(outputs)
    return {**inputs, 'taught': cache(samples, partial(teach, input))}


def share_of_update(training: Training, step: int) -> float:
    """Return the factor that corrects a loss in the last, smaller update of an epoch.

    Accelerate divides every loss by --grad-accum-steps, but the last update may accumulate fewer steps.
    """
    accumulated, steps = training.args.grad_accum_steps, len(training.train_loader)
    rest = steps % accumulated
    return accumulated / rest if rest and step >= steps - rest else 1.


def clip_gradients(training: Training) -> None:
    """--clip-grad: clip the gradients once an update's gradients are complete."""
    args, accelerator = training.args, training.accelerator
    if args.clip_grad is not None and accelerator.sync_gradients:
        dispatch_clip_grad(training.task.get_clip_parameters(exclude_head='agc' in args.clip_mode),
                           value=args.clip_grad, mode=args.clip_mode)


def count_update(training: Training) -> None:
    """Count an update of the weights, and update the averaged model (EMA) and a schedule that depends on updates."""
    training.num_updates += 1
    _update_average(training)
    if training.scheduler is not None:
        training.scheduler.step_update(num_updates=training.num_updates, metric=None)


@torch.no_grad()
def _update_average(training: Training) -> None:
    """Update the averaged model (EMA), unless loss or gradients of this step are not finite. This reads nothing."""
    task, ok = training.task, training.check.ok
    if not task.has_ema():
        return
    average: Any = task.get_trainable_module(ema=True)
    values = list(average.state_dict().values())
    before = [value.clone() for value in values]
    task.update_ema(step=training.num_updates)
    if ok is not None:
        for value, old in zip(values, before):
            value.copy_(torch.where(ok.to(value.device), value, old))
