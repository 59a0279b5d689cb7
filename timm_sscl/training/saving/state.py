"""Training: the state of one training. Build it, restore it from a checkpoint, collect what a checkpoint stores."""
import logging
import math
import time
from argparse import Namespace
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import torch
import torch.nn as nn
from accelerate import Accelerator
from accelerate.utils import gather_object
from timm.data import Mixup
from timm.task.task import TrainingTask
from timm.utils import random_seed, unwrap_model
from torch.utils.data import Dataset

from timm_sscl.data.samples import Samples
from timm_sscl.random_state import get_random_state, set_random_state
from timm_sscl.report import FiringRates

from .checkpoint import Position, RunSaver, put_aside_later, read_run_state
from ..steps.compiling import CompileClock
from ..steps.learning_rate import resolve_lr
from ..steps.meters import Meters
from ..optimizer import create_optimizer_and_schedule
from .resume import restore
from ..runs.rows import keep_rows
from ..session import Session
from ..steps.step_check import StepCheck
from ..teachers.teacher_cache import TeacherCache
from ..teachers.teacher_record import TeacherRecord

__all__ = ['Training', 'FitResult', 'start_training', 'collect_run_state', 'restore_run_state', 'restore_random_state',
           'prepare_input']

_logger = logging.getLogger('train')


@dataclass
class Training:
    """State of one training, of a student or of a teacher.

    Attributes:
        name: Name for the log and the columns of trackers.
        args: Options; lr is resolved.
        session: Objects that all trainings of the run share: Accelerate, the request to stop.
        folder: Folder for checkpoints and the summary.
        task: timm TrainingTask.
        module: The task's module as prepared by Accelerate: the model and the parameters of its losses.
        eval_model: Model to validate.
        optimizer: Prepared optimizer.
        scheduler: timm's schedule.
        train_loader: Prepared loader of the training set.
        eval_loader: Prepared loader of the validation set.
        dataset: The training set.
        mixup: timm's Mixup, or None.
        epochs: Number of epochs, including the cool-down of the schedule.
        prepare_input: Function applied to a batch of images before the model.
        saver: Writes the checkpoints, on the main process.
        teacher_cache: Cached outputs of the teacher for every sample.
        teacher_record: The task's teacher, for the checkpoints.
        position: The next batch to train on.
        num_updates: Number of updates of the weights so far.
        meters: Sums of the epoch so far.
        random_state: Random state of every process in the checkpoint.
        step_rates: Firing rates at the last validation, by layer and timestep.
        firing: Counts of the last validation.
        stuck_layers: Layers that never or always fired at the last validation.
        silent_layers: Layers that did not fire in training between the last two logs.
        read_failure: Error of this process when reading the current batch.
        check: Check of the loss and the gradients of every step.
        started: Time when this process began to train.
        steps_done: Number of steps that this process has done.
        images_done: Number of images trained on in them, over all processes.
        seconds: Time that the steps took, without compilations.
        compiling: Compilations during steps and validations.
    """
    name: str
    args: Namespace
    session: Session
    folder: Path
    task: TrainingTask
    module: nn.Module
    eval_model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    train_loader: Any
    eval_loader: Any
    dataset: Dataset
    mixup: Optional[Mixup]
    epochs: int
    prepare_input: Callable[[torch.Tensor], torch.Tensor]
    saver: Optional[RunSaver] = None
    teacher_cache: Optional[TeacherCache] = None
    teacher_record: Optional[TeacherRecord] = None
    position: Position = Position(0, 0)
    num_updates: int = 0
    meters: Meters = field(default_factory=Meters)
    random_state: Optional[list] = None
    step_rates: Dict[str, List[float]] = field(default_factory=dict)
    firing: Optional[FiringRates] = None
    stuck_layers: Dict[str, str] = field(default_factory=dict)
    silent_layers: List[str] = field(default_factory=list)
    read_failure: Optional[Exception] = None
    check: StepCheck = field(default_factory=StepCheck)
    started: float = field(default_factory=time.time)
    steps_done: int = 0
    images_done: int = 0
    seconds: float = 0.
    compiling: CompileClock = field(default_factory=CompileClock)

    @property
    def accelerator(self) -> Accelerator:
        """Accelerator of the run."""
        return self.session.accelerator

    def result(self, metrics: Dict[str, float], rates: Dict[str, float]) -> 'FitResult':
        """Return the result of the training, from its last metrics and firing rates."""
        best, epoch = (self.saver.best_metric, self.saver.best_epoch) if self.saver else (None, None)
        speed = self.images_done / self.seconds if self.seconds else None
        return FitResult(dict(metrics), best, epoch, rates, self.step_rates if rates else {}, speed, self.firing)


class FitResult(NamedTuple):
    """Result of a training."""
    last: Dict[str, float]  # metrics of the last epoch
    best: Optional[float]
    best_epoch: Optional[int]
    firing_rates: Dict[str, float]  # firing rates of the last epoch on the validation set; empty for an ANN
    step_rates: Dict[str, List[float]]  # firing rates at every timestep
    images_per_second: Optional[float] = None  # of the training, over all processes; None if no step was left
    firing: Optional[FiringRates] = None  # counts of the last validation; None for an ANN


def prepare_input(args: Namespace, input: torch.Tensor, change: Optional[Callable] = None) -> torch.Tensor:
    """Convert images to the model's format: --model-dtype, `change`, --channels-last."""
    if args.model_dtype:
        input = input.to(getattr(torch, args.model_dtype))
    input = input if change is None else change(input)
    return input.contiguous(memory_format=torch.channels_last) if args.channels_last and input.ndim == 4 else input


def start_training(
        session: Session,
        args: Namespace,
        task: TrainingTask,
        folder: Path,
        name: str,
        resume: str = '',
        ema: bool = False,
        compile_task: bool = False,
        change_input: Optional[Callable[[torch.Tensor], torch.Tensor]] = None,
        teacher_cache: Optional[TeacherCache] = None,
        teacher_record: Optional[TeacherRecord] = None,
) -> Training:
    """Build optimizer, schedule and loaders of a training, and restore them from a checkpoint.

    Args:
        session: Objects that all trainings of the run share.
        args: Options of this training.
        task: timm TrainingTask to train.
        folder: Folder for checkpoints and the summary.
        name: Name for the log.
        resume: Checkpoint file from which to continue.
        ema: Whether to average the weights (--model-ema).
        compile_task: Whether to compile the task with torch.compile.
        change_input: Function applied to a batch of images first.
        teacher_cache: Cached outputs of the task's teacher for every sample.
        teacher_record: The task's teacher, for the checkpoints.
    """
    accelerator = session.accelerator
    args = Namespace(**{**vars(args), 'lr': resolve_lr(args, accelerator.num_processes)})
    loaders = session.make_loaders()
    random_seed(args.seed, accelerator.process_index)
    session.reset_loss_scale()
    updates = math.ceil(len(loaders.train) / accelerator.num_processes / args.grad_accum_steps)
    trainable: Any = task.get_trainable_module()
    optimizer, scheduler, epochs = create_optimizer_and_schedule(args, trainable, updates)
    if ema:
        task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup,
                       device=torch.device('cpu') if args.model_ema_force_cpu else None)
    position, state = _resume(args, accelerator, task, resume, optimizer)
    if compile_task:
        task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
    eval_model = task.__dict__.get('eval_model')
    module, prepared_optimizer, train_loader, eval_loader = accelerator.prepare(
        task.trainable_module, optimizer, loaders.train, loaders.eval)
    task.trainable_module = module
    training = Training(
        name, args, session, folder, task, module,
        eval_model if eval_model is not None else unwrap_model(task.get_eval_model()), prepared_optimizer, scheduler,
        train_loader, eval_loader, loaders.train.dataset, loaders.mixup, epochs,
        partial(prepare_input, args, change=change_input), teacher_cache=teacher_cache, teacher_record=teacher_record,
        position=position, num_updates=position.epoch * updates)
    training.saver = _create_saver(training, optimizer, resume)
    restore_run_state(training, state)
    return training


def _resume(
        args: Namespace,
        accelerator: Accelerator,
        task: TrainingTask,
        file: str,
        optimizer: torch.optim.Optimizer,
) -> Tuple[Position, Dict[str, Any]]:
    """Load a checkpoint's weights and optimizer. Return where to continue, and the state to restore after the rest is
    built.
    """
    if not file:
        return Position(args.start_epoch or 0, 0), {}
    epoch = restore(task, file, None if args.no_resume_opt else optimizer)
    if args.start_epoch is not None:
        return Position(args.start_epoch, 0), {}
    state = read_run_state(Path(file))
    if state is None:
        return Position(epoch or 0, 0), {}
    _warn_changed_plugins(args, state.get('plugins') or {})
    now = _exactness_settings(args, accelerator)
    then = {key: state.get(key, value) for key, value in now.items()}
    if now == then:
        return state['position'], state
    changed = ', '.join(f'{key} {then[key]} -> {now[key]}' for key in now if now[key] != then[key])
    _logger.warning(f'The checkpoint was written with other settings ({changed}): the run goes on at the same '
                    f'place of the epoch, but not exactly as it would have.')
    samples = state['position'].step * then['processes'] * then['batch_size']
    step = samples // (now['processes'] * now['batch_size'])
    step -= step % args.grad_accum_steps
    return Position(state['position'].epoch, step), {**state, 'random': None, 'meters': None}


def _warn_changed_plugins(args: Namespace, then: Dict[str, str]) -> None:
    """Warn of plug-in files that changed since the checkpoint was written."""
    now = args.plugin_digests
    changed = [source for source, digest in then.items() if now.get(source, digest) != digest]
    if changed:
        _logger.warning(f'Plug-in {", ".join(changed)} is not as it was when the checkpoint was written: the run goes '
                        f'on, but not exactly as it would have.')


def _exactness_settings(args: Namespace, accelerator: Accelerator) -> Dict[str, Any]:
    """Return the settings, besides files and options, that must not change for a run to continue exactly."""
    return dict(
        processes=accelerator.num_processes, batch_size=args.batch_size, grad_accum_steps=args.grad_accum_steps,
        seed=args.seed, mixed_precision=accelerator.mixed_precision)


def _create_saver(training: Training, optimizer: torch.optim.Optimizer, resume: str) -> Optional[RunSaver]:
    """Create the main process's saver. Files in the folder with a later position than the run's are renamed."""
    if not training.accelerator.is_main_process:
        return None
    args, folder, position = training.args, training.folder, training.position
    keep_rows(folder / 'summary.csv', lambda row: int(row['epoch']) < position.epoch)
    saver = RunSaver(folder, training.task, optimizer, args, args.checkpoint_hist, args.eval_metric == 'loss')
    if resume and Path(resume).parent.resolve() == folder.resolve():
        put_aside_later(folder, position, Path(resume))
        saver.load_state_dict_from_checkpoint(resume)
        if position.step == 0:
            saver.drop_recoveries_before(position)
    return saver


def collect_run_state(training: Training) -> Dict[str, Any]:
    """Return the state that a checkpoint stores besides timm's. All processes must call this."""
    scheduler, scaler, dataset = training.scheduler, training.accelerator.scaler, training.dataset
    plateau = getattr(scheduler, 'lr_scheduler', None)
    return dict(
        num_updates=training.num_updates, **_exactness_settings(training.args, training.accelerator),
        plugins=training.args.plugin_digests,
        teacher=training.teacher_record._asdict() if training.teacher_record else None,
        random=gather_object([get_random_state()]), meters=training.meters.state_dict(),
        scaler=scaler.state_dict() if scaler is not None else None,
        scheduler=dict(restore_lr=scheduler.restore_lr, plateau=plateau.state_dict()) if plateau else None,
        unreadable=dataset.unreadable if isinstance(dataset, Samples) else [])


def restore_run_state(training: Training, state: Dict[str, Any]) -> None:
    """Restore the state that a checkpoint stores besides timm's, except the random state."""
    scheduler, args, position = training.scheduler, training.args, training.position
    training.num_updates = state.get('num_updates', training.num_updates)
    training.random_state = state.get('random')
    if state.get('meters'):
        training.meters.load_state_dict(state['meters'])
    if state.get('scaler') and training.accelerator.scaler is not None and not args.no_resume_opt:
        training.accelerator.scaler.load_state_dict(state['scaler'])
    if state.get('unreadable') and isinstance(training.dataset, Samples):
        training.dataset.mark_unreadable(state['unreadable'])
    if state.get('scheduler'):
        scheduler.restore_lr = state['scheduler']['restore_lr']
        scheduler.lr_scheduler.load_state_dict(state['scheduler']['plateau'])
    elif scheduler is not None and position != (0, 0):  # timm's other schedules are functions of epoch and update
        if args.sched_on_updates:
            scheduler.step_update(training.num_updates)
        elif position.epoch:
            scheduler.step(position.epoch)


def restore_random_state(training: Training) -> None:
    """Restore the random generators from the checkpoint. Call this just before the first batch."""
    if training.random_state:
        set_random_state(training.random_state[training.accelerator.process_index])
