"""Switch off torch's fused attention, so that hooks and dispatch modes see every operation."""
from contextlib import contextmanager
from typing import Iterator

import torch

__all__ = ['without_fused_paths']


@contextmanager
def without_fused_paths() -> Iterator[None]:
    """Run torch's attention and transformer layers operation by operation instead of as one fused kernel."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
