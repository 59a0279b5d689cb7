"""The teacher that a run was taught by: a checkpoint names it, and a run goes on with that one."""
import hashlib
from typing import NamedTuple, Optional

import torch
import torch.nn as nn

from .errors import OptionError

__all__ = ['TeacherRecord', 'weights_digest', 'check_same_teacher', 'check_asked_teacher']


class TeacherRecord(NamedTuple):
    """A run's teacher, as its checkpoints keep it."""
    name: str
    file: Optional[str]  # its weights; None for timm's pretrained ones
    epochs: Optional[int]  # that it was trained for, where this script trained it
    digest: str  # of its weights; '' where an earlier version wrote the checkpoint
    dtype: str

    def __str__(self) -> str:
        weights = f"'{self.file}'" if self.file else "timm's pretrained weights"
        return (f'{self.name}, {weights}' + (f', {self.epochs} epochs' if self.epochs else '')
                + (f' (digest {self.digest})' if self.digest else ''))


def weights_digest(model: nn.Module) -> str:
    """Sixteen hexadecimal digits of a model's state: the same for the same values under the same names."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        value = value.detach().cpu().contiguous()
        digest.update(f'{name} {value.dtype} {tuple(value.shape)} '.encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def check_asked_teacher(record: TeacherRecord, name: str, epochs: Optional[int]) -> None:
    """Raise where the options of a resumed run ask for another teacher than it was taught by.

    Args:
        record: The run's teacher.
        name: Model name of the teacher that is asked for.
        epochs: --teacher-epochs; None and 0 ask for none.

    Raises:
        OptionError: With both.
    """
    if name != record.name:
        raise OptionError(_other(record, f'--teacher {name}'))
    if epochs and epochs != record.epochs:
        raise OptionError(_other(record, f'--teacher-epochs {epochs}: {name} of {epochs} epochs'))


def check_same_teacher(record: TeacherRecord, now: TeacherRecord) -> None:
    """Raise where a teacher's weights are not those that the run was taught by.

    Raises:
        OptionError: With both.
    """
    if record.digest and record.dtype == now.dtype and record.digest != now.digest:
        raise OptionError(_other(record, str(now)))


def _other(record: TeacherRecord, asked: str) -> str:
    return (f'--resume: the run was taught by {record}, and goes on with it; now it would be {asked}. Leave the '
            f'options of the teacher as they were, or start a new run from the weights (--initial-checkpoint).')
