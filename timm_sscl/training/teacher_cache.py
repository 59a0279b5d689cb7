"""The teacher's logits and features of every training sample, kept in a memory-mapped file after the first epoch."""
import json
import logging
import math
import os
import shutil
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch

from .checkpoint import StorageError, replacing, write_text

__all__ = ['TeacherCache']

_logger = logging.getLogger(__name__)

Taught = Tuple[Optional[torch.Tensor], Optional[List[torch.Tensor]]]  # logits (B, K), features (T', B, C, ...) per tap


class TeacherCache:
    """Asks the teacher for a sample once; right only where a sample's image is the same in every epoch.

    The file holds as many bytes per sample as the logits and the tapped features take, and is shared by the processes
    of a machine. It begins empty whenever a run starts or goes on, since another teacher may have written it. A
    manifest beside it, written last, says what it holds: a file without one, or with another, is not read.

    Args:
        folder: Where the file goes.
        num_samples: Number of training samples.
        create: Whether this process makes the file; the others must come after it.
    """

    FILE = 'teacher-features.bin'
    MANIFEST = 'teacher-features.json'

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
            StorageError: The disk has no room for it, or the file is not whole or holds something else.
        """
        rows = self._rows(taught)
        sizes = [self.num_samples * math.prod(row.shape[1:]) * row.element_size() for row in rows]
        padded = [-(-size // 16) * 16 for size in (self.num_samples, *sizes)]  # parts are read as their own dtype
        total = sum(padded)
        file = self.folder / self.FILE
        manifest = dict(bytes=total, samples=self.num_samples,
                        parts=[[str(row.dtype).removeprefix('torch.'), *row.shape[1:]] for row in rows])
        if self.create:
            self._make(file, manifest)
        self._check(file, manifest)
        bytes_ = torch.from_file(str(file), shared=True, size=total, dtype=torch.uint8)
        self._known, *parts = bytes_.split(padded)
        self._parts = [part[:size].view(row.dtype).view(self.num_samples, *row.shape[1:])
                       for part, size, row in zip(parts, sizes, rows)]

    def _make(self, file: Path, manifest: Dict[str, Any]) -> None:
        """An empty file of its full size, at once: a disk that fills up later takes nothing from it."""
        for old in (self.folder / self.MANIFEST, file):
            old.unlink(missing_ok=True)
        total, free = manifest['bytes'], shutil.disk_usage(self.folder).free
        if total > 0.9 * free:
            raise StorageError(f'--teacher-cache needs {total / 2 ** 30:.1f} GiB in {self.folder}, where '
                               f'{free / 2 ** 30:.1f} GiB are free.')
        with replacing(file) as aside, open(aside, 'wb') as f:
            os.posix_fallocate(f.fileno(), 0, total) if hasattr(os, 'posix_fallocate') else f.truncate(total)
        write_text(self.folder / self.MANIFEST, json.dumps(manifest) + '\n')
        _logger.info(f'Teacher cache: {total / 2 ** 20:.0f} MiB for {self.num_samples} samples in {file}.')

    def _check(self, file: Path, manifest: Dict[str, Any]) -> None:
        """Refuse a file that is not the one of this manifest."""
        try:
            found = json.loads((self.folder / self.MANIFEST).read_text())
        except (OSError, ValueError):
            found = None
        size = file.stat().st_size if file.is_file() else 0
        if found != manifest or size != manifest['bytes']:
            raise StorageError(f"--teacher-cache: '{file}' ({size} bytes) is not the cache of this run: it should hold "
                               f'{manifest}, and {self.MANIFEST} says {found}.')

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
