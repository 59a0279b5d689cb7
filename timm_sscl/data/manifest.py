"""Store a description of a run's data in its folder, so that a resume or an evaluation on other data is noticed."""
import hashlib
import json
import logging
from pathlib import Path
from typing import Any, Dict, Iterable

from .checks import known_labels
from .folders import classes_of, sample_paths, some

__all__ = ['DATA_FILE', 'check_data', 'describe_data']

_logger = logging.getLogger(__name__)

DATA_FILE = 'data.json'  # file name in a run's folder


def describe_data(dataset: Any) -> Dict[str, Any]:
    """Describe a data set: classes with labels, number of samples, digest of file names and labels; None if unknown.

    A data set without files but with known labels has a digest of the labels (`labels`) instead.
    """
    paths = sample_paths(dataset) or getattr(dataset, 'files', None)
    labels = known_labels(dataset)
    described: Dict[str, Any] = dict(
        classes=classes_of(dataset), samples=len(dataset) if hasattr(dataset, '__len__') else None, files=None)
    if paths:
        described['files'] = _digest(f'{path}\0{int(label)}' for path, label in zip(paths, labels or [-1] * len(paths)))
    elif labels is not None:
        described['labels'] = _digest(str(int(label)) for label in labels)
    return described


def _digest(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(f'{line}\n'.encode('utf-8', 'surrogateescape'))
    return digest.hexdigest()[:16]


def check_data(file: Path, **found: Dict[str, Any]) -> None:
    """Compare data sets with those that a run was started on. A difference in samples only logs a warning.

    Args:
        file: `DATA_FILE` of the run. If it is missing (runs of older versions), nothing is checked.
        **found: Result of `describe_data` for each split, by the split's name in the file.

    Raises:
        ValueError: The classes differ. The message names them.
    """
    try:
        started = json.loads(file.read_text())
    except (OSError, ValueError):
        return
    for split, now in found.items():
        then = started.get(split)
        if not then:
            continue
        ours, theirs = now['classes'], then['classes']
        if ours and theirs and ours != theirs:
            differ = sorted(set(ours) ^ set(theirs)) or sorted(name for name in ours if ours[name] != theirs[name])
            raise ValueError(f"{split} data has {len(ours)} classes, and the run in '{file.parent}' was started on "
                             f'{len(theirs)}, so that labels would mean something else: {some(differ)} differ. Give it '
                             f'the same folders, or --class-map FILE.')
        for key, what in (('samples', 'samples'), ('files', 'file names or labels'), ('labels', 'labels')):
            if None not in (now.get(key), then.get(key)) and now[key] != then[key]:
                _logger.warning(f"The {split} data has other {what} than the run in '{file.parent}' was started on "
                                f'({then[key]}, now {now[key]}).')
                break
