"""Find files and samples that training and validation data have in common."""
import filecmp
import hashlib
import os
from collections import defaultdict
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple

import numpy as np
import torch
from PIL import Image

from timm_sscl.random_state import seeded

__all__ = ['find_copies', 'find_shared_samples']

_LOOKED_UP = 32  # number of samples that find_shared_samples looks up
_MANY_SAMPLES = 1000  # find_shared_samples reads no larger data set as a whole
_TAIL = 4096  # last bytes of a file, compared first; an archive has its checksums there


def find_copies(files: Sequence[str], others: Sequence[str]) -> List[Tuple[str, str]]:
    """Return pairs (file, candidate) with identical bytes, whatever their names; each file at most once.

    Args:
        files: Files to look up.
        others: Candidates.
    """
    by_size: Dict[int, List[str]] = defaultdict(list)
    for other in others:
        by_size[_size(other)].append(other)
    by_size.pop(-1, None)
    tails: Dict[int, Dict[bytes, List[str]]] = {}
    copies = []
    for file in files:
        size = _size(file)
        if size not in by_size:
            continue
        if size not in tails:
            tails[size] = defaultdict(list)
            for other in by_size[size]:
                tails[size][_tail(other)].append(other)
        alike = tails[size].get(_tail(file), [])
        copy = next((other for other in alike if filecmp.cmp(file, other, shallow=False)), None)
        if copy is not None:
            copies.append((file, copy))
    return copies


def _size(file: str) -> int:
    try:
        return os.path.getsize(file)
    except OSError:  # reading the sample later reports the file
        return -1


def _tail(file: str) -> bytes:
    """Return a digest of a file's last bytes."""
    with open(file, 'rb') as f:
        f.seek(max(0, _size(file) - _TAIL))
        return hashlib.blake2b(f.read(), digest_size=16).digest()


def find_shared_samples(dataset: Any, others: Any) -> Tuple[List[Tuple[int, int]], int]:
    """Look up samples of a data set among those of another.

    Up to 32 evenly spaced samples are looked up. Of more than 1,000 others, only those at the same place are read,
    counted from the first, from the last, or in proportion. Samples that cannot be read are left out. The global random
    number generators are as before.

    Args:
        dataset: Map-style data set.
        others: Map-style data set of the candidates.

    Returns:
        Pairs (index, index in others) of equal samples, and the number of samples that were looked up.
    """
    indices = np.unique(np.linspace(0, len(dataset) - 1, _LOOKED_UP).round().astype(int)).tolist()
    with seeded((0,)):
        digests = {index: digest for index in indices if (digest := _sample_digest(dataset, index))}
        candidates = range(len(others)) if len(others) <= _MANY_SAMPLES else _same_places(digests, dataset, others)
        known = {_sample_digest(others, index): index for index in candidates}
    return [(index, known[digest]) for index, digest in digests.items() if digest in known], len(digests)


def _same_places(indices: Iterable[int], dataset: Any, others: Any) -> List[int]:
    """Return the places in others that correspond to places in dataset."""
    size, other_size = len(dataset), len(others)
    places = {place for i in indices for place in (i, other_size - size + i, i * other_size // size)}
    return sorted(place for place in places if 0 <= place < other_size)


def _sample_digest(dataset: Any, index: int) -> Optional[bytes]:
    """Return a digest of a sample; None if it cannot be read."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        for part in _parts(dataset[index]):
            digest.update(part)
    except MemoryError:
        raise
    except Exception:  # decoders raise many types; reading the sample later reports it
        return None
    return digest.digest()


def _parts(item: Any) -> Iterable[bytes]:
    """Yield the contents of an item: images, arrays and numbers, nested in tuples."""
    if isinstance(item, (tuple, list)):
        for part in item:
            yield from _parts(part)
    elif isinstance(item, (Image.Image, np.ndarray, torch.Tensor)) and np.asarray(item).ndim:
        array = np.asarray(item)
        yield f'{array.dtype}{array.shape}'.encode()
        yield array.tobytes()
    else:
        yield repr(item.item() if hasattr(item, 'item') else item).encode()
