"""Rebuild what a run trained: student, teacher and validation data, from the files of the run."""
import logging
from argparse import Namespace
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Callable, List, Optional, Tuple

import torch
import torch.nn as nn
from timm.models import clean_state_dict
from timm.utils.checkpoint_saver import load_checkpoint_metadata
from torch.utils.data import DataLoader, IterableDataset, Subset

from timm_sscl.data.folders import classes_of
from timm_sscl.models.finite import check_finite

from ..datasets import create_datasets, guard_samples, resolve_input, resolve_num_classes
from ..errors import OptionError
from ..loaders import create_loaders
from ..command_line.options import parse_args
from ..processes import count_cores
from .run_files import RunFiles
from ..saving.state import prepare_input
from ..student import create_student, without_initial_weights
from ..task import needs_teacher
from ..teachers.teacher import create_teacher
from ..saving.weights import load_weights

__all__ = ['Rebuilt', 'rebuild']

_logger = logging.getLogger('train')


@dataclass
class Rebuilt:
    """Student, teacher and validation data of a run.

    Attributes:
        args: Options of the run.
        student: Student with the weights of the newest checkpoint, in evaluation mode.
        teacher: Teacher in evaluation mode, or None.
        no_teacher: Why there is none, in words.
        teacher_input: Transform from the student's images to the teacher's.
        loader: Batches (images, labels) of the validation set or of a part of it, in the student's format.
        classes: Names of the classes by label.
        mean: Mean that the images were normalised by, per channel.
        std: Standard deviation, likewise.
        whole: Whether the loader has the whole validation set.
    """
    args: Namespace
    student: nn.Module
    teacher: Optional[nn.Module]
    no_teacher: str
    teacher_input: Callable[[torch.Tensor], torch.Tensor]
    loader: Any
    classes: List[str]
    mean: Tuple[float, ...]
    std: Tuple[float, ...]
    whole: bool


def rebuild(run: RunFiles, images: int, device: torch.device) -> Rebuilt:
    """Rebuild the student, the teacher and the validation data of a run.

    Args:
        run: Files of the run.
        images: At most so many images, evenly spaced over the validation set.
        device: Device for the models.

    Raises:
        OptionError: The options of the run do not apply any more, for example since its data has moved.
        ValueError: The weights of the run are not finite.
    """
    args, _ = parse_args(['--resume', str(run.folder), '--eval-only'])
    args = without_initial_weights(args)
    datasets = create_datasets(args)
    num_classes = resolve_num_classes(args, datasets[1])
    named = classes_of(datasets[1]) or {}
    names = {label: name for name, label in named.items()}
    student = create_student(args, num_classes)
    config = args.data_config = resolve_input(args, student)
    datasets = guard_samples(args, datasets, config, num_classes)
    state = clean_state_dict(load_checkpoint_metadata(str(run.checkpoint))['state_dict'])
    check_finite(state, f"'{run.checkpoint}'")
    student.load_state_dict(state)
    teacher, why, teacher_input = _rebuild_teacher(run, args, num_classes)
    loader = create_loaders(Namespace(**{**vars(args), 'workers': 0}), datasets, config, num_classes).eval
    whole = not hasattr(loader.dataset, '__len__') or len(loader.dataset) <= images
    for model in (student, teacher):
        if model is not None:
            model.to(device).eval()
    chosen = _some_images(loader, min(args.workers, count_cores()[1]), images)
    return Rebuilt(
        args, student, teacher, why, teacher_input, _Cast(chosen, args, device),
        [names.get(label, str(label)) for label in range(num_classes)], tuple(config['mean']), tuple(config['std']),
        whole)


class _Cast:
    """A loader whose batches are in the student's format on its device.

    Args:
        loader: Loader of (images, labels).
        args: Options of the run.
        device: Where to move the batches.
    """

    def __init__(self, loader: Any, args: Namespace, device: torch.device):
        self.loader = loader
        self.device = device
        self.cast = partial(prepare_input, args)

    def __iter__(self):
        for images, labels in self.loader:
            yield self.cast(images.to(self.device)), labels.to(self.device)


def _some_images(loader: Any, workers: int, images: int) -> Any:
    """Return a loader of at most so many images, evenly spaced over the data set; of a stream, the first batches."""
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset):
        return _First(loader, images)
    count = min(len(dataset), images)
    chosen = Subset(dataset, [i * len(dataset) // count for i in range(count)])
    return DataLoader(chosen, batch_size=loader.batch_size, num_workers=workers, collate_fn=loader.collate_fn)


class _First:
    """The first batches of a stream, until they hold so many images."""

    def __init__(self, loader: Any, images: int):
        self.loader = loader
        self.images = images

    def __iter__(self):
        seen = 0
        for batch in self.loader:
            yield batch
            seen += len(batch[0])
            if seen >= self.images:
                return


def _rebuild_teacher(run: RunFiles, args: Namespace, num_classes: int) -> Tuple[Optional[nn.Module], str, Any]:
    """Return the teacher with its weights, why there is none, and the transform of the student's images."""
    if not needs_teacher(args):
        return None, 'The run had no teacher.', None
    if run.teacher is None:
        return None, 'The checkpoint does not say what the teacher was.', None
    file, args = run.teacher.file, Namespace(**vars(args))
    if file is not None:
        args.teacher_pretrained = False  # the weights are in the file
        where = Path(file)
        moved = [parent / 'teachers' / where.parent.name / where.name for parent in run.folder.resolve().parents[:2]]
        file = next((str(path) for path in (where, *moved) if path.exists()), None)
        if file is None:
            return None, f"The teacher's weights are gone: '{where}'.", None
    try:
        teacher, teacher_input = create_teacher(args, num_classes, args.data_config)
        if file is not None:
            load_weights(teacher, file, 'teacher')
    except (OptionError, ValueError, OSError, RuntimeError) as error:
        return None, f'The teacher cannot be rebuilt: {" ".join(str(error).split())[:300]}', None
    return teacher, '', teacher_input
