"""Samples: a data set whose samples do not depend on the order of reading, with checks and reports of unreadable files.
"""
import logging
from typing import Any, Callable, List, Optional, Tuple

import torch
from torch.utils.data import Dataset, get_worker_info

from timm_sscl.random_state import seeded

from .items import ItemCheck, as_pair, label_problem

__all__ = ['Samples', 'UnreadableSample', 'WrongLabel', 'WrongSample', 'FailedTransform', 'sample_name']

_logger = logging.getLogger(__name__)


class UnreadableSample(RuntimeError):
    """A sample cannot be read and may not be replaced."""


class WrongLabel(RuntimeError):
    """A label is not a class of the model."""


class WrongSample(RuntimeError):
    """A sample has the wrong type or shape for the model and the transforms."""


class FailedTransform(RuntimeError):
    """A sample was read but its transform failed, because of an option rather than the file."""


def sample_name(dataset: Any, index: int) -> str:
    """Return the path of a sample if the data set knows it, else its index."""
    if callable(getattr(dataset, 'filename', None)):
        return str(dataset.filename(index, absolute=True))
    paths: Any = getattr(dataset, 'samples', None) or getattr(dataset, 'imgs', None)
    named = isinstance(paths, (list, tuple)) and isinstance(paths[index], (list, tuple)) and paths[index]
    return str(paths[index][0]) if named else f'number {index}'


class Samples(Dataset):
    """Wrap a map-style data set: seed the samples, check labels, replace samples that cannot be read.

    The augmentation of a training sample draws from (seed, epoch, index) alone. It is therefore the same in any worker
    and after a resume. In training, an unreadable sample is logged with its path and the reason, and the next readable
    sample takes its place, up to a limit of different samples counted over all workers.

    Args:
        dataset: Data set of (image, label) without a transform of its own.
        num_classes: Labels must lie in [0, num_classes).
        training: Whether samples are random and may be replaced.
        seed: Seed of the run.
        max_unreadable: How many different samples may be replaced; 0 raises at the first.
        with_index: Whether items are (image, label, index of the sample that was read).
        check: Function that returns what is wrong with an image or frames, '' if nothing.

    Raises:
        UnreadableSample: While reading, if the limit is exceeded or the sample is for validation.
        WrongLabel: While reading, if a label is out of range.
        WrongSample: While reading, if an item is not a pair (image, label), or the check finds a problem.
        FailedTransform: While reading, if the transform raised.
    """

    def __init__(
            self,
            dataset: Any,
            num_classes: int,
            training: bool,
            seed: int = 0,
            max_unreadable: int = 0,
            with_index: bool = False,
            check: Optional[ItemCheck] = None,
    ):
        self.dataset = dataset
        self.num_classes = num_classes
        self.training = training
        self.seed = seed
        self.max_unreadable = max_unreadable if training else 0
        self.with_index = with_index
        self.check = check
        self.transform: Optional[Callable] = None
        # in shared memory, so that persistent workers see the epoch and count together
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._unreadable = torch.zeros(len(dataset), dtype=torch.uint8).share_memory_()
        if hasattr(dataset, '_max_retries'):  # switches off timm's own replacement, which does not name the file
            dataset._max_retries = 1

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the samples read from now on, in running workers, too."""
        self._epoch.fill_(epoch)

    @property
    def unreadable(self) -> List[int]:
        """Indices of the samples that were unreadable so far."""
        return self._unreadable.nonzero().flatten().tolist()

    def mark_unreadable(self, indices: List[int]) -> None:
        """Count samples as unreadable that were found before a resume or by another process."""
        self._unreadable[indices] = 1

    def check_limit(self) -> None:
        """Raise UnreadableSample if more samples than allowed were unreadable."""
        found = self.unreadable
        if len(found) > self.max_unreadable:
            self._stop(found[-1], 'see the warnings above')

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Tuple:
        if not self.training:
            return self._make(index)
        with seeded((self.seed, int(self._epoch), index), restore=get_worker_info() is None):
            return self._make(index)

    def _make(self, index: int) -> Tuple:
        at, pair = self._read(index)
        try:
            item, target = as_pair(pair)
        except TypeError as error:
            raise WrongSample(f"'{sample_name(self.dataset, at)}' {error}.") from error
        problem = label_problem(target, self.num_classes)
        if problem:
            raise WrongLabel(f"'{sample_name(self.dataset, at)}' has the label {problem}.")
        problem = self.check(item) if self.check is not None else ''
        if problem:
            raise WrongSample(f"'{sample_name(self.dataset, at)}' {problem}.")
        item = item if self.transform is None else self._transformed(self.transform, item, at)
        return (item, target, at) if self.with_index else (item, target)

    def _transformed(self, transform: Callable, item: Any, index: int) -> Any:
        try:
            return transform(item)
        except MemoryError:
            raise
        except Exception as error:  # timm, torchvision and Pillow raise many types
            split = 'training' if self.training else 'validation'
            raise FailedTransform(
                f"{split} sample '{sample_name(self.dataset, index)}' was read, but its transform failed "
                f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); the options of the augmentation "
                f'(--aa, --scale, --ratio, ...) and of the input size decide on it.') from error

    def _read(self, index: int) -> Tuple[int, Any]:
        """Return (index, item) of the sample at index or of the next readable one."""
        for step in range(len(self)):
            at = (index + step) % len(self)
            try:
                return at, self.dataset[at]
            except MemoryError:
                raise
            except Exception as error:  # decoders raise many types
                self._count(at, error)
        raise UnreadableSample(f'none of the {len(self)} samples can be read.')

    def _count(self, index: int, error: Exception) -> None:
        """Count an unreadable sample and log it, or raise if the limit is exceeded."""
        reason = ' '.join(str(self._reason(index, error)).split())[:200]
        new = not self._unreadable[index]
        self._unreadable[index] = 1
        if not self.training or len(self.unreadable) > self.max_unreadable:
            self._stop(index, reason)
        if new:
            _logger.warning(f"Training sample '{sample_name(self.dataset, index)}' cannot be read and is replaced by "
                            f'the next one: {reason}')

    def _reason(self, index: int, error: Exception) -> Exception:
        """Read the file again to find out why it failed, since timm's data set hides the error."""
        if not hasattr(self.dataset, 'reader'):
            return error
        try:
            from PIL import Image
            Image.open(self.dataset.reader[index][0]).load()
        except Exception as reason:
            return reason
        return error

    def _stop(self, index: int, reason: str) -> None:
        name = sample_name(self.dataset, index)
        if not self.training:
            raise UnreadableSample(f"validation sample '{name}' cannot be read: {reason}. Validation samples are never "
                                   f'replaced; repair it or take it out of the folder.')
        raise UnreadableSample(
            f"training sample '{name}' cannot be read: {reason}. That makes {len(self.unreadable)}, and "
            f'--max-unreadable {self.max_unreadable} are replaced; repair the files, or allow more.')
