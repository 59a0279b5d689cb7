"""Cache the teacher's logits and features of every training sample in a memory-mapped file."""
import json
import logging
import math
import os
import shutil
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch

from ..saving.checkpoint import StorageError, replacing, write_text

__all__ = ['TeacherCache']

_logger = logging.getLogger(__name__)

# logits (B, K); features (T', B, C, ...) per tap
TeacherOutputs = Tuple[Optional[torch.Tensor], Optional[List[torch.Tensor]]]


class TeacherCache:
    """Compute the teacher's outputs once per sample. This is valid only if a sample's image is the same in every epoch.

    The file holds the logits and tapped features of every sample and is shared by the processes of a machine. It is
    empty whenever a run starts or continues, since another teacher may have written it. A manifest beside it is written
    last and describes its content. A file without the right manifest is not read.

    Args:
        folder: Folder of the file.
        num_samples: Number of training samples.
        create: Whether this process creates the file. Other processes must open it later.
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
        """Whether `open` was called, so that the cache can be read and written."""
        return self._parts is not None

    def open(self, outputs: TeacherOutputs) -> None:
        """Create or open the file.

        Args:
            outputs: Teacher outputs for one batch, which determine the shapes.

        Raises:
            StorageError: The disk has no room, or the file is damaged or belongs to another run.
        """
        rows = self._rows(outputs)
        sizes = [self.num_samples * math.prod(row.shape[1:]) * row.element_size() for row in rows]
        # so that each part is aligned for its dtype
        padded = [-(-size // 16) * 16 for size in (self.num_samples, *sizes)]
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
        """Create an empty file and allocate its full size, so that the disk cannot run out of space later."""
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
        """Raise StorageError if the file does not match this manifest."""
        try:
            found = json.loads((self.folder / self.MANIFEST).read_text())
        except (OSError, ValueError):
            found = None
        size = file.stat().st_size if file.is_file() else 0
        if found != manifest or size != manifest['bytes']:
            raise StorageError(f"--teacher-cache: '{file}' ({size} bytes) is not the cache of this run: it should hold "
                               f'{manifest}, and {self.MANIFEST} says {found}.')

    def __call__(self, index: torch.Tensor, teach: Callable[[], TeacherOutputs]) -> TeacherOutputs:
        """Return the teacher outputs of these samples, from the open file if it holds all of them.

        Args:
            index: Indices of the samples (B,).
            teach: Function that runs the teacher on the batch.
        """
        assert self._parts is not None  # it is open
        device, index = index.device, index.cpu()
        if self._known[index].all():
            logits, *features = (part[index].to(device) for part in self._parts)
            return logits, [f.transpose(0, 1) for f in features] or None
        outputs = teach()
        for part, row in zip(self._parts, self._rows(outputs)):
            part[index] = row.cpu()
        self._known[index] = 1  # after the rows, since another process may be reading
        return outputs

    @staticmethod
    def _rows(outputs: TeacherOutputs) -> List[torch.Tensor]:
        """Return one tensor (B, ...) for the logits and one per tap."""
        logits, features = outputs
        assert logits is not None  # SSCLTask.teach returns them where a loss needs a teacher
        return [logits.detach(), *(f.detach().transpose(0, 1) for f in features or [])]
