"""Split data without a split of its own: choose the validation recordings of each class."""
import re
from typing import Sequence, Union

import numpy as np

__all__ = ['validation_mask']

_NAME = re.compile(r'(first|last)([1-9]\d*)|random(\d*)')


def validation_mask(targets: Union[Sequence[int], np.ndarray], split: str) -> np.ndarray:
    """Return which recordings a named split uses for validation. Accuracies on different splits are not comparable.

    Args:
        targets: Label of every recording. Recordings of a class are counted in this order.
        split: 'last100': the last 100 of every class. 'first100': the first 100 (easier on CIFAR10-DVS). Other numbers
            work likewise. 'random': a tenth of every class (at least one), the same in every run. 'random1', 'random2',
            ... are other draws.

    Returns:
        Boolean array (N,).

    Raises:
        ValueError: The split is unknown, or a class would have no training recording.
    """
    match = _NAME.fullmatch(split)
    if match is None:
        raise ValueError(f"split '{split}': must be last100, first100 (or another number per class), or random.")
    labels = np.asarray(targets)
    generator = np.random.default_rng(int(match[3] or 0))
    mask = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        n = int(match[2]) if match[2] else max(1, len(members) // 10)
        if n >= len(members):
            raise ValueError(f"split '{split}': class {label} has {len(members)} recordings, {n} for validation leave "
                             f'none for training; last{max(1, len(members) // 10)} or random would do.')
        if match[1] is None:
            members = generator.permutation(members)
        mask[members[-n:] if match[1] == 'last' else members[:n]] = True
    return mask
