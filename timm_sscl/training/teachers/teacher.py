"""Create the teacher's network and the transform from the student's images to its own."""
import logging
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

import timm
import torch.nn as nn

from timm_sscl.conversion import set_stem_pool
from timm_sscl.distillation.teacher_input import TeacherInput
from timm_sscl.models.spiking import PREFIX

from ..errors import OptionError, blame_options
from ..student import check_model_name, model_kwargs, place_model

__all__ = ['Teacher', 'teacher_name', 'create_teacher', 'pools_as_student']

_logger = logging.getLogger('train')


@dataclass
class Teacher:
    """The teacher of a run: the network and the settings that determine its weights.

    Attributes:
        args: Options of the run.
        model: The network.
        input: Transform from the student's images to the teacher's.
        num_classes: Number of classes of the data.
        root: Folder of all runs and teachers.
        launch: Settings of the launcher: `Session.launch`.
    """
    args: Namespace
    model: nn.Module
    input: TeacherInput
    num_classes: int
    root: Path
    launch: Dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the architecture."""
        return teacher_name(self.args)


def teacher_name(args: Namespace) -> str:
    """Return --teacher, by default the student's own ANN."""
    return args.teacher or args.model.removeprefix(PREFIX)


def create_teacher(args: Namespace, num_classes: int, data_config: Dict[str, Any]) -> Tuple[nn.Module, TeacherInput]:
    """Create the teacher's network, with pretrained weights only if asked for, and the transform of the student's
    images.

    The teacher is built for --teacher-size, by default the size of the student's images. If it cannot be built for that
    size, it gets its default size, and images are resized.
    """
    name = teacher_name(args)
    check_model_name(name, '--teacher')
    own = name == args.model.removeprefix(PREFIX)
    extra = {**(args.model_kwargs if own else {}), **args.teacher_kwargs}
    if not own:  # these options apply to the student, and not every architecture takes them
        args = Namespace(**{**vars(args), 'gp': None, 'drop_block': None, 'bn_momentum': None, 'bn_eps': None})
    channels, *size = data_config['input_size']
    wanted = tuple(args.teacher_size or size)

    def create(input_size):
        return timm.create_model(
            pretrained=args.teacher_pretrained, **model_kwargs(args, name, num_classes, extra, input_size))

    try:
        teacher = create((channels, *wanted))
    except Exception as error:  # timm's models raise many types
        if args.teacher_size:
            raise OptionError(
                f'--teacher-size {wanted[0]} {wanted[1]}: {name} cannot be built for it: {error}') from error
        cfg = timm.get_pretrained_cfg(name)
        wanted = tuple(cfg.input_size[1:]) if cfg is not None else wanted
        with blame_options(dict(teacher=name, teacher_pretrained=args.teacher_pretrained, teacher_kwargs=extra)):
            teacher = create((channels, *wanted))
        _logger.info(f'Teacher {name} cannot be built for images of {size[0]} x {size[1]} ({error}): it sees them '
                     f'resized to {wanted[0]} x {wanted[1]}.')
    if pools_as_student(args):
        set_stem_pool(teacher, args.stem_pool)
    with blame_options(dict(teacher=name, teacher_frames=args.teacher_frames)):
        teacher = place_model(args, teacher, args.teacher_frames)
    return teacher, TeacherInput(
        wanted if wanted != tuple(size) else None, _renormalization(args, teacher, data_config))


def pools_as_student(args: Namespace) -> bool:
    """Return whether --stem-pool applies to the teacher.

    It does if the teacher is the student's own ANN, unless timm's weights, trained with max pooling, are used
    unchanged.
    """
    as_they_are = args.teacher_pretrained and not args.teacher_epochs
    return args.stem_pool is not None and teacher_name(args) == args.model.removeprefix(PREFIX) and not as_they_are


def _renormalization(args: Namespace, teacher: nn.Module, data_config: Dict[str, Any]) -> Optional[Tuple]:
    """Return (student mean, student std, teacher mean, teacher std) if they differ, else None."""
    cfg = teacher.pretrained_cfg if args.teacher_pretrained and not args.teacher_epochs else data_config
    mean, std = args.teacher_mean or cfg['mean'], args.teacher_std or cfg['std']
    channels = data_config['input_size'][0]
    for option, values in (('--teacher-mean', mean), ('--teacher-std', std)):
        if len(values) not in (1, channels):
            raise OptionError(f'{option}: {len(values)} values for {channels} channels.')
    mean, std = (tuple(v) * channels if len(v) == 1 else tuple(v) for v in (mean, std))
    if (mean, std) == (tuple(data_config['mean']), tuple(data_config['std'])):
        return None
    return data_config['mean'], data_config['std'], mean, std
