"""TeacherRecord: identifies a run's teacher in checkpoints, so that the run continues with the same teacher."""
import hashlib
from typing import NamedTuple, Optional

import torch
import torch.nn as nn

from ..errors import OptionError

__all__ = ['TeacherRecord', 'weights_digest', 'check_same_teacher', 'check_asked_teacher']


class TeacherRecord(NamedTuple):
    """A run's teacher, as checkpoints store it."""
    name: str
    file: Optional[str]  # file of the weights; None for timm's pretrained weights
    epochs: Optional[int]  # epochs of its training, if this script trained it
    digest: str  # digest of the weights; '' in checkpoints of version 0.1.0
    dtype: str

    def __str__(self) -> str:
        weights = f"'{self.file}'" if self.file else "timm's pretrained weights"
        return (f'{self.name}, {weights}' + (f', {self.epochs} epochs' if self.epochs else '')
                + (f' (digest {self.digest})' if self.digest else ''))


def weights_digest(model: nn.Module) -> str:
    """Return sixteen hexadecimal digits of a digest of a model's state: names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        value = value.detach().cpu().contiguous()
        digest.update(f'{name} {value.dtype} {tuple(value.shape)} '.encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def check_asked_teacher(record: TeacherRecord, name: str, epochs: Optional[int]) -> None:
    """Check that the options of a resumed run do not ask for another teacher.

    Args:
        record: The run's teacher.
        name: Model name of the requested teacher.
        epochs: --teacher-epochs; None and 0 request none.

    Raises:
        OptionError: They do. The message names both teachers.
    """
    if name != record.name:
        raise OptionError(_other(record, f'--teacher {name}'))
    if epochs and epochs != record.epochs:
        raise OptionError(_other(record, f'--teacher-epochs {epochs}: {name} of {epochs} epochs'))


def check_same_teacher(record: TeacherRecord, now: TeacherRecord) -> None:
    """Check that the teacher's weights are those with which the run started.

    Raises:
        OptionError: They are not. The message names both teachers.
    """
    if record.digest and record.dtype == now.dtype and record.digest != now.digest:
        raise OptionError(_other(record, str(now)))


def _other(record: TeacherRecord, asked: str) -> str:
    return (f'--resume: the run was taught by {record}, and goes on with it; now it would be {asked}. Leave the '
            f'options of the teacher as they were, or start a new run from the weights (--initial-checkpoint).')
