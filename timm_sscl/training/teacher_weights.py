"""The teacher's weights: from a file, from timm, from an earlier run, or trained first."""
import copy
import json
import logging
from argparse import Namespace
from pathlib import Path
from typing import Any, Callable, Dict, NamedTuple, Optional

import torch.nn as nn
from accelerate.utils import broadcast_object_list
from timm.task import ClassificationTask

from timm_sscl.distillation.teacher_input import TeacherInput

from .checkpoint import LAST, find_newest, lock_folder, write_text
from .errors import OptionError
from .run_checks import LabelCountingEvaluator, warn_long_warmup, warn_teacher_at_chance
from .session import Session
from .state import FitResult, Training, start_training
from .task import criterion_kwargs
from .teacher import teacher_name
from .teacher_folder import TEACHER_FILE, find_teacher, is_trained, record_teacher, recorded_file
from .teacher_key import teacher_settings
from .teacher_record import TeacherRecord, check_asked_teacher, check_same_teacher
from .validation import evaluate
from .weights import load_weights

__all__ = ['TeacherResult', 'obtain_teacher', 'check_teacher', 'warn_warmup', 'teacher_options', 'train_teacher']

_logger = logging.getLogger('train')


class TeacherResult(NamedTuple):
    name: str
    top1: float
    source: str  # where its weights come from
    record: TeacherRecord


def obtain_teacher(
        session: Session,
        teacher: nn.Module,
        teacher_input: TeacherInput,
        num_classes: int,
        root: Path,
        fit: Callable[[Training], FitResult],
        record: Optional[TeacherRecord] = None,
) -> TeacherResult:
    """Give the teacher its weights: from a file, from timm, from this output root, or by training it first."""
    args, accelerator = session.args, session.accelerator
    name = teacher_name(args)
    if args.teacher_checkpoint:
        load_weights(teacher, args.teacher_checkpoint, '--teacher-checkpoint')
        source = file = args.teacher_checkpoint
    elif args.teacher_pretrained and not args.teacher_epochs:
        source, file = f"timm's pretrained weights ({teacher.pretrained_cfg.get('tag') or 'default'})", None
    elif record is not None:
        file = str(recorded_file(args, teacher, num_classes, root, session.launch, record))
        _logger.info(f'Teacher {name}: goes on with {file}, which this run was taught by.')
        load_weights(teacher, file, '--resume')
        source = f'{Path(file).parent}, {record.epochs} epochs' if record.epochs else file
    else:
        folder, = broadcast_object_list(
            [find_teacher(args, teacher, num_classes, root, session.launch) if accelerator.is_main_process else None])
        if broadcast_object_list([is_trained(folder) if accelerator.is_main_process else None])[0]:
            _logger.info(f'Teacher {name}: found {folder}, trained on the same data with the same settings.')
        else:
            train_teacher(session, name, teacher, teacher_input, folder, fit)
        file = str(folder / LAST)
        load_weights(teacher, file, 'teacher')
        source = f'{folder}, {json.loads((folder / TEACHER_FILE).read_text())["epochs"]} epochs'
    taught_by = record_teacher(args, teacher, file)
    teacher.to(accelerator.device)
    loader = accelerator.prepare(session.make_loaders().eval)
    dtype = next(teacher.parameters()).dtype
    evaluator = LabelCountingEvaluator(accelerator.device)
    metrics = evaluate(session, teacher, loader, lambda x: teacher_input(x.to(dtype)), evaluator)
    _logger.info(f'Teacher {name}: {metrics["top1"]:.2f} top-1 on the validation set ({source}).')
    if accelerator.is_main_process:
        counts = evaluator.label_counts.tolist()
        warn_teacher_at_chance(name, metrics['top1'], sum(counts), max(counts))
    accelerator.free_memory()
    return TeacherResult(name, metrics['top1'], source, taught_by)


def check_teacher(
        args: Namespace,
        teacher: nn.Module,
        num_classes: int,
        root: Path,
        launch: Optional[Dict[str, Any]] = None,
        record: Optional[TeacherRecord] = None,
) -> None:
    """Find what is wrong with the teacher before anything is trained; of a resumed run it must be the recorded one."""
    pretrained, file = args.teacher_pretrained and not args.teacher_epochs, args.teacher_checkpoint
    if record is not None:
        check_asked_teacher(record, teacher_name(args), None if args.teacher_checkpoint else args.teacher_epochs)
    if args.teacher_checkpoint:
        load_weights(teacher, args.teacher_checkpoint, '--teacher-checkpoint')
    elif pretrained:
        classes = teacher.pretrained_cfg.get('num_classes')
        if classes != num_classes:
            raise OptionError(f'--teacher-pretrained: the pretrained {teacher_name(args)} knows {classes} classes, the '
                              f'data has {num_classes}; --teacher-epochs N fine-tunes it first.')
    elif record is not None:
        file = str(recorded_file(args, teacher, num_classes, root, launch or {}, record))
        load_weights(teacher, file, '--resume')
    elif args.teacher_epochs == 0 and not is_trained(find_teacher(args, teacher, num_classes, root, launch or {})):
        raise OptionError('--teacher-epochs 0: there are no weights for the teacher, and an untrained one teaches '
                          'nothing; give --teacher-checkpoint FILE or --teacher-pretrained, or let it train.')
    if record is not None:
        check_same_teacher(record, record_teacher(args, teacher, file))


def warn_warmup(args: Namespace, name: str, epochs: int) -> None:
    warn_long_warmup(name, args.sched, args.warmup_epochs, epochs, args.warmup_prefix)


def teacher_options(args: Namespace) -> Namespace:
    """Options of the teacher's own training: its epochs, and none of those that say where the student's run starts."""
    return Namespace(**{
        **vars(args), 'epochs': args.teacher_epochs or args.epochs, 'start_epoch': None, 'no_resume_opt': False})


def train_teacher(
        session: Session,
        name: str,
        teacher: nn.Module,
        teacher_input: TeacherInput,
        folder: Path,
        fit: Callable[[Training], FitResult],
) -> None:
    """Train a copy of the teacher and keep it; a training that was cut off goes on from its newest whole checkpoint."""
    args, accelerator = session.args, session.accelerator
    epochs = args.teacher_epochs or args.epochs
    with lock_folder(folder, accelerator.is_main_process):
        resume, = broadcast_object_list([find_newest(folder) if accelerator.is_main_process else None])
        _logger.info(
            f'Teacher {name}: no weights for it, so it is trained first, for {epochs} epochs, and kept in {folder}'
            + (f' (goes on from {resume.name})' if resume else '') + '.')
        if accelerator.is_main_process:
            warn_warmup(args, f'teacher {name}', epochs)
        model = copy.deepcopy(teacher).requires_grad_(True)
        mixes = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
        task = ClassificationTask(
            model, criterion_kwargs=criterion_kwargs(args, mixes), device=accelerator.device, verbose=False)
        task.to(accelerator.device)
        result = fit(start_training(
            session, teacher_options(args), task, folder, 'teacher', resume=str(resume or ''),
            change_input=teacher_input))
        if accelerator.is_main_process:
            facts = dict(model=name, epochs=epochs, seed=args.seed, metrics=result.last, file=LAST,
                         options=teacher_settings(args, session.launch))
            write_text(folder / TEACHER_FILE, json.dumps(facts, indent=2) + '\n')
        accelerator.wait_for_everyone()
    accelerator.free_memory()
