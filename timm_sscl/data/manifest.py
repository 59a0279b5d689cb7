"""What data a run was started on, kept in its folder, so that other data is noticed when it goes on or is evaluated."""
import hashlib
import json
import logging
from pathlib import Path
from typing import Any, Dict, Iterable

from .checks import known_labels
from .folders import classes_of, sample_paths, some

__all__ = ['DATA_FILE', 'check_data', 'describe_data']

_logger = logging.getLogger(__name__)

DATA_FILE = 'data.json'  # in a run's folder


def describe_data(dataset: Any) -> Dict[str, Any]:
    """Classes with their labels, number of samples, a digest of the file names and labels; None where not known.

    A data set without files that knows its labels has a digest of them (`labels`).
    """
    paths = sample_paths(dataset) or getattr(dataset, 'files', None)
    labels = known_labels(dataset)
    described = dict(classes=classes_of(dataset), samples=len(dataset) if hasattr(dataset, '__len__') else None,
                     files=None)
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
    """Raise where data has other classes than a run was started on; say where it has other samples.

    Args:
        file: `DATA_FILE` of the run; where there is none (runs of older versions), nothing is checked.
        **found: `describe_data` of the splits, by the names in the file.

    Raises:
        ValueError: With the classes that differ.
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
