"""Named splits of data that comes without one: which recordings of a class are for validation."""
import re
from typing import Sequence

import numpy as np

__all__ = ['validation_mask']

_NAME = re.compile(r'(first|last)([1-9]\d*)|random(\d*)')


def validation_mask(targets: Sequence[int], split: str) -> np.ndarray:
    """Which recordings a named split takes for validation; accuracies on different splits do not compare.

    Args:
        targets: Label of every recording, in the order in which the recordings of a class are counted.
        split: 'last100': the last 100 of every class; 'first100': the first 100 (easier on CIFAR10-DVS); other numbers
            likewise. 'random': a tenth of every class (at least one), the same in every run; 'random1', 'random2', ...
            are other draws.

    Returns:
        Boolean array (N,).

    Raises:
        ValueError: There is no such split, or a class would have nothing left for training.
    """
    match = _NAME.fullmatch(split)
    if match is None:
        raise ValueError(f"split '{split}': must be last100, first100 (or another number per class), or random.")
    targets = np.asarray(targets)
    generator = np.random.default_rng(int(match[3] or 0))
    mask = np.zeros(len(targets), bool)
    for label in np.unique(targets):
        members = np.flatnonzero(targets == label)
        n = int(match[2]) if match[2] else max(1, len(members) // 10)
        if n >= len(members):
            raise ValueError(f"split '{split}': class {label} has {len(members)} recordings, {n} for validation leave "
                             f'none for training; last{max(1, len(members) // 10)} or random would do.')
        if match[1] is None:
            members = generator.permutation(members)
        mask[members[-n:] if match[1] == 'last' else members[:n]] = True
    return mask
