"""Run torch's modules without their fused paths, so that every operation is seen."""
from contextlib import contextmanager
from typing import Iterator

import torch

__all__ = ['without_fused_paths']


@contextmanager
def without_fused_paths() -> Iterator[None]:
    """torch's attention and transformer layers call their parts inside, activations and products, one by one."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
