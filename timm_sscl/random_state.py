"""Save and restore the state of all random number generators, and seed them for a block of code."""
import random
from contextlib import contextmanager
from typing import Any, Dict, Iterator, Sequence, Tuple, cast

import numpy as np
import torch

__all__ = ['get_random_state', 'set_random_state', 'seeded']


def get_random_state() -> Dict[str, Any]:
    """Return the state of Python's, numpy's and torch's global generators and of the current CUDA device's.

    The result contains only types that `torch.load(..., weights_only=True)` accepts.
    """
    name, keys, position, has_gauss, cached = cast(Tuple[str, np.ndarray, int, int, float], np.random.get_state())
    state: Dict[str, Any] = dict(
        python=random.getstate(),
        numpy=[name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        torch=torch.get_rng_state(),
    )
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state['cuda'] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Dict[str, Any]) -> None:
    """Restore the state that `get_random_state` returned."""
    version, internal, gauss = state['python']
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state['numpy']
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state['torch'])
    if 'cuda' in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'])


@contextmanager
def seeded(numbers: Sequence[int], restore: bool = True) -> Iterator[None]:
    """Seed random, numpy and torch (CPU only) from some numbers for a block of code.

    Args:
        numbers: Non-negative numbers, e.g. (seed, epoch, sample index).
        restore: Whether to restore the generators' states afterwards.
    """
    saved = (random.getstate(), np.random.get_state(), torch.get_rng_state()) if restore else None
    a, b, c = np.random.SeedSequence(numbers).generate_state(3)
    random.seed(int(a))
    np.random.seed(b)
    torch.default_generator.manual_seed(int(c))  # torch.manual_seed would also seed the GPU
    try:
        yield
    finally:
        if saved is not None:
            random.setstate(saved[0])
            np.random.set_state(saved[1])
            torch.set_rng_state(saved[2])
