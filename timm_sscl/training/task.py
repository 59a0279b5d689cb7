"""Create the student's training task with its losses and their options."""
from argparse import Namespace
from typing import Any, Dict, List, Optional

import torch
import torch.nn as nn

from timm_sscl.distillation import SSCLTask
from timm_sscl.distillation.teacher_input import TeacherInput
from timm_sscl.losses import loss_spec

from .errors import OptionError

__all__ = ['LOSS_OPTIONS', 'criterion_kwargs', 'parse_taps', 'create_task', 'needs_teacher']

LOSS_OPTIONS = (
    'distill', 'loss', 'loss_kwargs', 'loss_file', 'sscl_taps', 'sscl_teacher_taps', 'teacher', 'bce_loss',
    'bce_pos_weight')


def criterion_kwargs(args: Namespace, loaders_mix: bool) -> Dict[str, Any]:
    """Return the options of timm's classification loss."""
    kwargs = dict(loss_type='bce' if args.bce_loss else 'ce', smoothing=args.smoothing, soft_targets=loaders_mix)
    if args.bce_loss:
        kwargs.update(bce_target_thresh=args.bce_target_thresh, bce_sum=args.bce_sum, pos_weight=args.bce_pos_weight)
    return kwargs


def parse_taps(text: Optional[str]) -> Any:
    """Parse --sscl-taps: a number of stages, or a list of names."""
    if text is None:
        return None
    return int(text) if str(text).strip().isdigit() else [name.strip() for name in str(text).split(',')]


def create_task(
        args: Namespace,
        student: nn.Module,
        teacher: Optional[nn.Module],
        teacher_input: TeacherInput,
        data_config: Dict[str, Any],
        device: torch.device,
        mixes: bool,
        dataset: Any = None,
) -> SSCLTask:
    """Create the student's training task. `dataset` is the training set, whose size some losses need.

    Raises:
        OptionError: A loss needs labels, and mixup or cutmix make soft targets.
    """
    specs = {name: loss_spec(name).with_options(args.loss_options.get(name, {})) for name in args.losses}
    need_labels = [name for name, spec in specs.items() if spec.needs_labels]
    if mixes and need_labels:
        raise OptionError(f'--mixup and --cutmix make soft targets, but the loss {", ".join(need_labels)} needs '
                          f'labels{_because(need_labels, args)}; leave them out.')
    return SSCLTask(
        student, teacher, losses=args.losses, loss_options=args.loss_options,
        criterion_kwargs=criterion_kwargs(args, mixes),
        task_loss_weight=1. if args.task_loss_weight is None else args.task_loss_weight,
        taps=parse_taps(args.sscl_taps), teacher_taps=parse_taps(args.sscl_teacher_taps),
        input_size=data_config['input_size'], renormalize=teacher_input.renormalize, teacher_size=teacher_input.size,
        device=device, dtype=getattr(torch, args.model_dtype or 'float32'),
        num_samples=len(dataset) if hasattr(dataset, '__len__') else None)


def _because(losses: List[str], args: Namespace) -> str:
    """Return the changed options of losses that need labels only with some options."""
    specs = {name: loss_spec(name) for name in losses}
    texts = [f'{name}.{option}={value}' for name, spec in specs.items() if spec.labels_if is not None
             for option, value in args.loss_options.get(name, {}).items() if value != spec.options[option].default]
    return f' with {", ".join(texts)}' if texts else ''


def needs_teacher(args: Namespace) -> bool:
    """Return whether a loss of the run needs a teacher."""
    return any(loss_spec(name).needs_teacher for name in args.losses)
