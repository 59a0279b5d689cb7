"""Read class folders as intended: leave out hidden files, take evenly spread samples, report a suspicious layout."""
import logging
import os
import re
from collections import defaultdict
from typing import Any, Dict, List, Optional, Sequence

import numpy as np
import torch

from .events.dataset import spread_indices

__all__ = ['check_layout', 'class_to_idx_of', 'classes_of', 'drop_hidden', 'sample_paths', 'some', 'take_spread']

_logger = logging.getLogger(__name__)

# attributes of timm's readers and torchvision's data sets that have one entry per sample
_LISTS = 'samples', 'imgs', 'targets', 'data'
_HIDDEN = re.compile(r'(^|/)\.(?!\.?/)')  # a path component that starts with a dot, except . and ..


def some(names: Sequence[str], shown: int = 5) -> str:
    """Return the first of many names and the number of the others, as text."""
    return ', '.join(names[:shown]) + (f' and {len(names) - shown} more' if len(names) > shown else '')


def class_to_idx_of(dataset: Any) -> Optional[Dict[str, int]]:
    """Return the label of every class name if the data set or its reader has them, else None."""
    source = getattr(dataset, 'reader', dataset)
    # the second for tar files
    classes = getattr(source, 'class_to_idx', None) or getattr(source, 'class_name_to_idx', None)
    return classes if isinstance(classes, dict) and classes else None


def classes_of(dataset: Any) -> Optional[Dict[str, int]]:
    """Return the label of every class name from `class_to_idx` or the list `classes`; None if the data set has neither.

    Raises:
        ValueError: `classes` is not a list of distinct names.
    """
    classes = class_to_idx_of(dataset)
    if classes is not None:
        return {str(name): int(label) for name, label in classes.items()}
    names = getattr(dataset, 'classes', None)
    if names is None:
        return None
    if isinstance(names, dict):
        return {str(name): int(label) for name, label in names.items()} or None
    if isinstance(names, str) or not hasattr(names, '__iter__'):
        raise ValueError(f'{type(dataset).__name__}.classes is {names!r}: must be a list of names, in the order of the '
                         f'labels.')
    found = {str(name): label for label, name in enumerate(names)}
    if len(found) != len(list(names)):
        raise ValueError(f'{type(dataset).__name__}.classes has a name twice: {some(list(map(str, names)))}.')
    return found or None


def drop_hidden(dataset: Any, renumber: bool) -> None:
    """Remove samples and classes whose file or folder name starts with a dot (.ipynb_checkpoints, ._1.jpg).

    Args:
        dataset: timm or torchvision data set over a folder or tar file; others are left unchanged.
        renumber: Whether to number the remaining classes anew; False if a class map sets the labels.
    """
    source = getattr(dataset, 'reader', dataset)
    paths = sample_paths(dataset)
    if paths is None:
        return
    keep = [i for i, path in enumerate(paths) if not _HIDDEN.search(path)]
    if len(keep) == len(paths):
        return
    hidden = sorted(set(paths) - {paths[i] for i in keep})
    _logger.warning(f'{len(paths) - len(keep)} hidden images of {source.root} are left out: {some(hidden, 2)}.')
    _select(source, keep)
    if renumber:
        _renumber(source)


def take_spread(dataset: Any, num_samples: int) -> None:
    """Reduce a data set to evenly spaced samples, in place. Classes and labels stay.

    Samples are ordered by class, so the first ones would be of one class.

    Raises:
        ValueError: The samples of this type of data set cannot be selected.
    """
    source = getattr(dataset, 'reader', dataset)
    lists = [name for name in _LISTS if isinstance(getattr(source, name, None), (list, np.ndarray, torch.Tensor))]
    if not {'samples', 'data'} & set(lists):
        raise ValueError(f'{type(source).__name__} cannot be cut to {num_samples} samples (--train-num-samples, '
                         f'--val-num-samples).')
    _select(source, spread_indices(len(source), num_samples).tolist())


def sample_paths(dataset: Any) -> Optional[List[str]]:
    """Return the path of every sample relative to the data set's folder or tar file, with '/'; None if there are no
    paths.
    """
    source = getattr(dataset, 'reader', dataset)
    if hasattr(source, 'class_name_to_idx'):
        return [info.path for info, *_ in source.samples]
    samples, root = getattr(source, 'samples', None), getattr(source, 'root', None)
    if not isinstance(samples, list) or not samples or not isinstance(samples[0][0], str) or not root:
        return None
    inside = os.path.join(root, '')  # faster than os.path.relpath, which takes ten seconds for a million paths
    return [(path[len(inside):] if path.startswith(inside) else os.path.relpath(path, root)).replace(os.sep, '/')
            for path, _ in samples]


def _labels(source: Any) -> Sequence[int]:
    return source.targets if hasattr(source, 'targets') else [label for _, label in source.samples]


def _select(source: Any, keep: List[int]) -> None:
    """Keep the samples at these positions."""
    for name in _LISTS:
        values = getattr(source, name, None)
        if isinstance(values, (np.ndarray, torch.Tensor)):
            setattr(source, name, values[keep])
        elif isinstance(values, list):
            setattr(source, name, [values[i] for i in keep])


def _renumber(source: Any) -> None:
    """Number the classes that still have samples 0, 1, ... in their previous order."""
    found = sorted(set(map(int, _labels(source))))
    new = {old: label for label, old in enumerate(found)}
    if hasattr(source, 'class_name_to_idx'):
        source.targets = np.array([new[int(old)] for old in source.targets])
        source.class_name_to_idx = {name: new[old] for name, old in source.class_name_to_idx.items() if old in new}
        source.class_idx_to_name = {label: name for name, label in source.class_name_to_idx.items()}
        return
    source.samples = [(path, new[old]) for path, old in source.samples]
    source.class_to_idx = {name: new[old] for name, old in source.class_to_idx.items() if old in new}
    if hasattr(source, 'targets'):  # torchvision data sets
        source.imgs, source.targets = source.samples, [label for _, label in source.samples]
        source.classes = list(source.class_to_idx)


def check_layout(dataset: Any) -> None:
    """Check the folder layout of an image data set.

    Logs classes that come from several folders, and class folders inside other class folders.

    Raises:
        ValueError: Images lie outside the class folders, or a class has no name.
    """
    source = getattr(dataset, 'reader', dataset)
    paths = sample_paths(dataset)
    if paths is None:
        return
    classes = class_to_idx_of(dataset) or {}
    beside = [name for name in ('', '.') if name in classes and hasattr(dataset, 'reader')]
    if beside:
        outside = [path for path in paths if path.removeprefix('./').count('/') == 0]
        if not outside:
            raise ValueError(f'the class map (--class-map) has an empty name, of class {classes[beside[0]]}: remove '
                             f'the empty line.')
        raise ValueError(f"'{source.root}': {len(outside)} images lie outside the class folders ({some(outside, 2)}) "
                         f'and would be a class of their own; move them into folders, one per class.')
    if type(source).__name__ != 'ReaderImageFolder':
        return  # torchvision names classes by the outermost folder
    folders = sorted({path.rpartition('/')[0] for path in paths})
    by_name: Dict[str, List[str]] = defaultdict(list)
    for folder in folders:
        by_name[folder.rpartition('/')[2]].append(folder)
    several = [f"'{name}' from {some(found, 3)}" for name, found in by_name.items() if len(found) > 1]
    if several:
        _logger.warning(f'Classes of {source.root} are named by the innermost folder, so that folders of one name are '
                        f'one class: {some(several, 3)}.')
    known = set(folders)
    inside = [folder for folder in folders if not known.isdisjoint(_parents(folder))]
    if inside:
        _logger.warning(f'Folders inside class folders of {source.root} are classes of their own: {some(inside, 3)}.')


def _parents(folder: str) -> List[str]:
    """Return all parent folders of a relative path."""
    parts = folder.split('/')
    return ['/'.join(parts[:i]) for i in range(1, len(parts))]
