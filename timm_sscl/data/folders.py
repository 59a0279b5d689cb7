"""Class folders of image data as their owner means them: without hidden files, and with what looks wrong said."""
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

_LISTS = 'samples', 'imgs', 'targets', 'data'  # of timm's readers and torchvision's data sets, one entry per sample
_HIDDEN = re.compile(r'(^|/)\.(?!\.?/)')  # a name that begins with a dot, and is not . or ..


def some(names: Sequence[str], shown: int = 5) -> str:
    """The first of many names, and how many more there are."""
    return ', '.join(names[:shown]) + (f' and {len(names) - shown} more' if len(names) > shown else '')


def class_to_idx_of(dataset: Any) -> Optional[Dict[str, int]]:
    """Label of every class name, where a data set or its reader knows them."""
    source = getattr(dataset, 'reader', dataset)
    classes = getattr(source, 'class_to_idx', None) or getattr(source, 'class_name_to_idx', None)  # of a tar file
    return classes if isinstance(classes, dict) and classes else None


def classes_of(dataset: Any) -> Optional[Dict[str, int]]:
    """Label of every class by its name, from `class_to_idx` or from the list `classes`; None where neither is there.

    Raises:
        ValueError: `classes` is no list of different names.
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
    """Leave out files and folders whose name begins with a dot (.ipynb_checkpoints, ._1.jpg), as classes too.

    Args:
        dataset: timm's or torchvision's, over a folder or tar file; others are left alone.
        renumber: Whether labels follow the classes that are left; False where a class map sets them.
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
    """Keep that many samples, evenly spread, since they lie class by class; classes and labels stay.

    Raises:
        ValueError: The data set is of a kind whose samples cannot be chosen.
    """
    source = getattr(dataset, 'reader', dataset)
    lists = [name for name in _LISTS if isinstance(getattr(source, name, None), (list, np.ndarray, torch.Tensor))]
    if not {'samples', 'data'} & set(lists):
        raise ValueError(f'{type(source).__name__} cannot be cut to {num_samples} samples (--train-num-samples, '
                         f'--val-num-samples).')
    _select(source, spread_indices(len(source), num_samples).tolist())


def sample_paths(dataset: Any) -> Optional[List[str]]:
    """Path of every sample inside the data set's folder or tar file, with '/'; None where there are no such."""
    source = getattr(dataset, 'reader', dataset)
    if hasattr(source, 'class_name_to_idx'):
        return [info.path for info, *_ in source.samples]
    samples, root = getattr(source, 'samples', None), getattr(source, 'root', None)
    if not isinstance(samples, list) or not samples or not isinstance(samples[0][0], str) or not root:
        return None
    inside = os.path.join(root, '')  # a million relpath calls would take ten seconds
    return [(path[len(inside):] if path.startswith(inside) else os.path.relpath(path, root)).replace(os.sep, '/')
            for path, _ in samples]


def _labels(source: Any) -> Sequence[int]:
    return source.targets if hasattr(source, 'targets') else [label for _, label in source.samples]


def _select(source: Any, keep: List[int]) -> None:
    """Keep these samples."""
    for name in _LISTS:
        values = getattr(source, name, None)
        if isinstance(values, (np.ndarray, torch.Tensor)):
            setattr(source, name, values[keep])
        elif isinstance(values, list):
            setattr(source, name, [values[i] for i in keep])


def _renumber(source: Any) -> None:
    """Labels 0, 1, ... of the classes that still have samples, in the order that they had."""
    found = sorted(set(map(int, _labels(source))))
    new = {old: label for label, old in enumerate(found)}
    if hasattr(source, 'class_name_to_idx'):
        source.targets = np.array([new[int(old)] for old in source.targets])
        source.class_name_to_idx = {name: new[old] for name, old in source.class_name_to_idx.items() if old in new}
        source.class_idx_to_name = {label: name for name, label in source.class_name_to_idx.items()}
        return
    source.samples = [(path, new[old]) for path, old in source.samples]
    source.class_to_idx = {name: new[old] for name, old in source.class_to_idx.items() if old in new}
    if hasattr(source, 'targets'):  # torchvision's
        source.imgs, source.targets = source.samples, [label for _, label in source.samples]
        source.classes = list(source.class_to_idx)


def check_layout(dataset: Any) -> None:
    """Refuse images outside the class folders; say where a class comes from several folders, or from inside another.

    Raises:
        ValueError: Images lie beside the class folders, or a class has no name.
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
        return  # torchvision names its classes by the outermost folders
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
    parts = folder.split('/')
    return ['/'.join(parts[:i]) for i in range(1, len(parts))]
