"""The teacher's logits and features of every training sample, kept in a memory-mapped file after the first epoch."""
import logging
import math
import shutil
from pathlib import Path
from typing import Callable, List, Optional, Tuple

import torch

from timm_sscl.checkpoint import StorageError

__all__ = ['TeacherCache']

_logger = logging.getLogger(__name__)

Taught = Tuple[Optional[torch.Tensor], Optional[List[torch.Tensor]]]  # logits (B, K), features (T', B, C, ...) per tap


class TeacherCache:
    """Asks the teacher for a sample once; right only where a sample's image is the same in every epoch.

    The file holds as many bytes per sample as the logits and the tapped features take, and is shared by the processes
    of a machine. It begins empty whenever a run starts or goes on, since another teacher may have written it.

    Args:
        folder: Where the file goes.
        num_samples: Number of training samples.
        create: Whether this process makes the file; the others must come after it.
    """

    FILE = 'teacher-features.bin'

    def __init__(self, folder: Path, num_samples: int, create: bool = True):
        self.folder = folder
        self.num_samples = num_samples
        self.create = create
        self._parts: Optional[List[torch.Tensor]] = None

    @property
    def is_open(self) -> bool:
        """Whether the shapes are known and the file is there."""
        return self._parts is not None

    def open(self, taught: Taught) -> None:
        """Make or open the file, from one batch that tells the shapes.

        Args:
            taught: What the teacher gives for a batch.

        Raises:
            StorageError: The disk has no room for it.
        """
        rows = self._rows(taught)
        sizes = [self.num_samples * math.prod(row.shape[1:]) * row.element_size() for row in rows]
        padded = [-(-size // 16) * 16 for size in (self.num_samples, *sizes)]  # parts are read as their own dtype
        total = sum(padded)
        file = self.folder / self.FILE
        if self.create:
            file.unlink(missing_ok=True)
            free = shutil.disk_usage(self.folder).free
            if total > 0.9 * free:
                raise StorageError(f'--teacher-cache needs {total / 2 ** 30:.1f} GiB in {self.folder}, where '
                              f'{free / 2 ** 30:.1f} GiB are free.')
            _logger.info(f'Teacher cache: {total / 2 ** 20:.0f} MiB for {self.num_samples} samples in {file}.')
        bytes_ = torch.from_file(str(file), shared=True, size=total, dtype=torch.uint8)
        self._known, *parts = bytes_.split(padded)
        self._parts = [part[:size].view(row.dtype).view(self.num_samples, *row.shape[1:])
                       for part, size, row in zip(parts, sizes, rows)]

    def __call__(self, index: torch.Tensor, teach: Callable[[], Taught]) -> Taught:
        """What the teacher gives for these samples, from the (open) file where it holds all of them.

        Args:
            index: Numbers of the samples (B,).
            teach: Asks the teacher.
        """
        device, index = index.device, index.cpu()
        if self._known[index].all():
            logits, *features = (part[index].to(device) for part in self._parts)
            return logits, [f.transpose(0, 1) for f in features] or None
        taught = teach()
        for part, row in zip(self._parts, self._rows(taught)):
            part[index] = row.cpu()
        self._known[index] = 1  # after the rows: another process may be reading
        return taught

    @staticmethod
    def _rows(taught: Taught) -> List[torch.Tensor]:
        """One tensor (B, ...) each for the logits and the taps."""
        logits, features = taught
        return [logits.detach(), *(f.detach().transpose(0, 1) for f in features or [])]
