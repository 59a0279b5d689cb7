"""Get the teacher's weights: from a file, from timm, from an earlier run, or by training it."""
import copy
import json
import logging
from argparse import Namespace
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional

from accelerate.utils import broadcast_object_list
from timm.task import ClassificationTask

from ..saving.checkpoint import LAST, find_newest, lock_folder, write_text
from ..errors import OptionError
from ..runs.run_checks import LabelCountingEvaluator, warn_long_warmup, warn_teacher_at_chance
from ..session import Session
from ..saving.state import FitResult, Training, start_training
from ..task import criterion_kwargs
from .teacher import Teacher
from .teacher_folder import TEACHER_FILE, find_teacher, is_trained, record_teacher, recorded_file
from .teacher_key import teacher_settings
from .teacher_record import TeacherRecord, check_asked_teacher, check_same_teacher
from ..steps.validation import evaluate
from ..saving.weights import load_weights

__all__ = ['TeacherResult', 'obtain_teacher', 'check_teacher', 'warn_warmup', 'teacher_options', 'train_teacher']

_logger = logging.getLogger('train')


class TeacherResult(NamedTuple):
    """The teacher of a run and its accuracy on the validation set."""
    name: str
    top1: float
    source: str  # where its weights come from, in words
    record: TeacherRecord


def obtain_teacher(
        session: Session,
        teacher: Teacher,
        fit: Callable[[Training], FitResult],
        record: Optional[TeacherRecord] = None,
) -> TeacherResult:
    """Load the teacher's weights from a file, from timm, or from this output root; if there are none, train it first.
    """
    args, accelerator, model = session.args, session.accelerator, teacher.model
    if args.teacher_checkpoint:
        load_weights(model, args.teacher_checkpoint, '--teacher-checkpoint')
        source = file = args.teacher_checkpoint
    elif args.teacher_pretrained and not args.teacher_epochs:
        source, file = f"timm's pretrained weights ({model.pretrained_cfg.get('tag') or 'default'})", None
    elif record is not None:
        file = str(recorded_file(teacher, record))
        _logger.info(f'Teacher {teacher.name}: goes on with {file}, which this run was taught by.')
        load_weights(model, file, '--resume')
        source = f'{Path(file).parent}, {record.epochs} epochs' if record.epochs else file
    else:
        folder, = broadcast_object_list([find_teacher(teacher) if accelerator.is_main_process else None])
        if broadcast_object_list([is_trained(folder) if accelerator.is_main_process else None])[0]:
            _logger.info(f'Teacher {teacher.name}: found {folder}, trained on the same data with the same settings.')
        else:
            train_teacher(session, teacher, folder, fit)
        file = str(folder / LAST)
        load_weights(model, file, 'teacher')
        source = f'{folder}, {json.loads((folder / TEACHER_FILE).read_text())["epochs"]} epochs'
    taught_by = record_teacher(teacher, file)
    top1 = _accuracy(session, teacher, source)
    return TeacherResult(teacher.name, top1, source, taught_by)


def _accuracy(session: Session, teacher: Teacher, source: str) -> float:
    """Return and log the teacher's top-1 on the validation set in percent; warn if it is at chance."""
    accelerator = session.accelerator
    teacher.model.to(accelerator.device)
    loader = accelerator.prepare(session.make_loaders().eval)
    dtype = next(teacher.model.parameters()).dtype
    evaluator: Any = LabelCountingEvaluator(accelerator.device)
    metrics = evaluate(session, teacher.model, loader, lambda x: teacher.input(x.to(dtype)), evaluator)
    _logger.info(f'Teacher {teacher.name}: {metrics["top1"]:.2f} top-1 on the validation set ({source}).')
    if accelerator.is_main_process:
        counts = evaluator.label_counts.tolist()
        warn_teacher_at_chance(teacher.name, metrics['top1'], sum(counts), max(counts))
    accelerator.free_memory()
    return metrics['top1']


def check_teacher(teacher: Teacher, record: Optional[TeacherRecord] = None) -> None:
    """Check the teacher before any training. For a resumed run it must be the recorded teacher.

    Raises:
        OptionError: The weights do not fit, do not exist, or are not the recorded ones.
    """
    args, model = teacher.args, teacher.model
    pretrained, file = args.teacher_pretrained and not args.teacher_epochs, args.teacher_checkpoint
    if record is not None:
        check_asked_teacher(record, teacher.name, None if args.teacher_checkpoint else args.teacher_epochs)
    if args.teacher_checkpoint:
        load_weights(model, args.teacher_checkpoint, '--teacher-checkpoint')
    elif pretrained:
        classes = model.pretrained_cfg.get('num_classes')
        if classes != teacher.num_classes:
            raise OptionError(f'--teacher-pretrained: the pretrained {teacher.name} knows {classes} classes, the '
                              f'data has {teacher.num_classes}; --teacher-epochs N fine-tunes it first.')
    elif record is not None:
        file = str(recorded_file(teacher, record))
        load_weights(model, file, '--resume')
    elif args.teacher_epochs == 0 and not is_trained(find_teacher(teacher)):
        raise OptionError('--teacher-epochs 0: there are no weights for the teacher, and an untrained one teaches '
                          'nothing; give --teacher-checkpoint FILE or --teacher-pretrained, or let it train.')
    if record is not None:
        check_same_teacher(record, record_teacher(teacher, file))


def warn_warmup(args: Namespace, name: str, epochs: int) -> None:
    """Warn if a training with these options ends before its warm-up."""
    warn_long_warmup(name, args.sched, args.warmup_epochs, epochs, args.warmup_prefix)


def teacher_options(args: Namespace) -> Namespace:
    """Return the options of the teacher's training: its number of epochs, without the options that resume the student.
    """
    return Namespace(**{
        **vars(args), 'epochs': args.teacher_epochs or args.epochs, 'start_epoch': None, 'no_resume_opt': False})


def train_teacher(
        session: Session,
        teacher: Teacher,
        folder: Path,
        fit: Callable[[Training], FitResult],
) -> None:
    """Train a copy of the teacher and store it. An interrupted training continues from its newest undamaged checkpoint.
    """
    args, accelerator, name = session.args, session.accelerator, teacher.name
    epochs = args.teacher_epochs or args.epochs
    with lock_folder(folder, accelerator.is_main_process):
        resume, = broadcast_object_list([find_newest(folder) if accelerator.is_main_process else None])
        _logger.info(
            f'Teacher {name}: no weights for it, so it is trained first, for {epochs} epochs, and kept in {folder}'
            + (f' (goes on from {resume.name})' if resume else '') + '.')
        if accelerator.is_main_process:
            warn_warmup(args, f'teacher {name}', epochs)
        model = copy.deepcopy(teacher.model).requires_grad_(True)
        mixes = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
        task = ClassificationTask(
            model, criterion_kwargs=criterion_kwargs(args, mixes), device=accelerator.device, verbose=False)
        task.to(accelerator.device)
        result = fit(start_training(
            session, teacher_options(args), task, folder, 'teacher', resume=str(resume or ''),
            change_input=teacher.input))
        if accelerator.is_main_process:
            facts = dict(model=name, epochs=epochs, seed=args.seed, metrics=result.last, file=LAST,
                         options=teacher_settings(args, session.launch))
            write_text(folder / TEACHER_FILE, json.dumps(facts, indent=2) + '\n')
        accelerator.wait_for_everyone()
    accelerator.free_memory()
