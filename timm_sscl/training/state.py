"""One training: what its steps read and change, how it starts or goes on, and what a checkpoint keeps of it."""
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

from .checkpoint import Position, RunSaver, put_aside_later, read_run_state
from .learning_rate import resolve_lr
from .meters import Meters
from .optimizer import create_optimizer_and_schedule
from .resume import restore
from .rows import keep_rows
from .session import Session
from .teacher_cache import TeacherCache
from .teacher_record import TeacherRecord

__all__ = ['Training', 'FitResult', 'start_training', 'collect_run_state', 'restore_run_state', 'restore_random_state',
           'prepare_input']

_logger = logging.getLogger('train')


@dataclass
class Training:
    """One training, of a student or of a teacher: what its steps read and change.

    Attributes:
        name: For the log and the columns of trackers.
        args: Options; lr is resolved.
        session: What all trainings of the run share: Accelerate, the signal that asks for an end.
        folder: Where checkpoints and the summary go.
        task: timm TrainingTask.
        module: What Accelerate prepared of the task: the model and its losses' parameters.
        eval_model: Model to validate.
        optimizer: Prepared optimizer.
        scheduler: timm's schedule.
        train_loader: Prepared loader of the training set.
        eval_loader: Prepared loader of the validation set.
        dataset: The training set.
        mixup: timm's Mixup, where it is asked for.
        epochs: Number of epochs, with those of the schedule's cool-down.
        prepare_input: What is done to a batch of images before the model.
        saver: Writes the checkpoints, on the main process.
        teacher_cache: What the teacher said of every sample.
        teacher_record: The task's teacher, for the checkpoints.
        position: The next batch to train on.
        num_updates: Updates of the weights so far.
        meters: Sums of the epoch so far.
        random_state: Random state of every process, to go on from exactly.
        step_rates: Firing rates of the last validation, by layer and time step.
        stuck_layers: Layers that never or always fired at the last validation.
        silent_layers: Layers that did not fire in training since the log before the last.
        read_failure: What this process could not read in the step at hand.
        started: When this process began to train.
        steps_done: Steps that this process has done.
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
    stuck_layers: Dict[str, str] = field(default_factory=dict)
    silent_layers: List[str] = field(default_factory=list)
    read_failure: Optional[Exception] = None
    started: float = field(default_factory=time.time)
    steps_done: int = 0

    @property
    def accelerator(self) -> Accelerator:
        """Accelerate of the run."""
        return self.session.accelerator


class FitResult(NamedTuple):
    """What a training ended with."""
    last: Dict[str, float]  # metrics of the last epoch
    best: Optional[float]
    best_epoch: Optional[int]
    firing_rates: Dict[str, float]  # of the last epoch, on the validation set; empty for an ANN
    step_rates: Dict[str, List[float]]  # the same at every time step


def prepare_input(args: Namespace, input: torch.Tensor, change: Optional[Callable] = None) -> torch.Tensor:
    """Images as the model takes them: in --model-dtype, changed, in --channels-last."""
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
    """Build optimizer, schedule and loaders of a training, and put it where a checkpoint left it.

    Args:
        session: What all trainings of the run share.
        args: Options of this training.
        task: timm TrainingTask to train.
        folder: Where checkpoints and the summary go.
        name: For the log.
        resume: Checkpoint file to continue from.
        ema: Whether to keep --model-ema's average.
        compile_task: Whether to run the task through torch.compile.
        change_input: What is done to a batch of images first.
        teacher_cache: What the task's teacher said of every sample.
        teacher_record: The task's teacher, for the checkpoints.
    """
    accelerator = session.accelerator
    args = Namespace(**{**vars(args), 'lr': resolve_lr(args, accelerator.num_processes)})
    loaders = session.make_loaders()
    random_seed(args.seed, accelerator.process_index)
    updates = math.ceil(len(loaders.train) / accelerator.num_processes / args.grad_accum_steps)
    optimizer, scheduler, epochs = create_optimizer_and_schedule(args, task.get_trainable_module(), updates)
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
    """Load a checkpoint's weights and optimizer; where to go on, and the state to restore once the rest is built."""
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
    now = args.plugin_digests
    changed = [source for source, digest in then.items() if now.get(source, digest) != digest]
    if changed:
        _logger.warning(f'Plug-in {", ".join(changed)} is not as it was when the checkpoint was written: the run goes '
                        f'on, but not exactly as it would have.')


def _exactness_settings(args: Namespace, accelerator: Accelerator) -> Dict[str, Any]:
    """What a run must not change to go on exactly, beside its files and options."""
    return dict(
        processes=accelerator.num_processes, batch_size=args.batch_size, grad_accum_steps=args.grad_accum_steps,
        seed=args.seed, mixed_precision=accelerator.mixed_precision)


def _create_saver(training: Training, optimizer: torch.optim.Optimizer, resume: str) -> Optional[RunSaver]:
    """The main process's saver; files of a folder that lie behind the place to go on from are put aside."""
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
    """What a checkpoint holds beyond timm's; called by all processes."""
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
    """Take over what a checkpoint holds beyond timm's, but for the random state."""
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
    elif scheduler is not None and position != (0, 0):  # timm's others are functions of epoch and update
        if args.sched_on_updates:
            scheduler.step_update(training.num_updates)
        elif position.epoch:
            scheduler.step(position.epoch)


def restore_random_state(training: Training) -> None:
    """Set the random generators as the checkpoint left them, just before the first batch."""
    if training.random_state:
        set_random_state(training.random_state[training.accelerator.process_index])
