"""Check the options of torch.compile before anything is built."""
from typing import Optional

import torch
from torch._dynamo import lookup_backend  # a backend may be registered by another package and not be in any list

from timm_sscl.closest import closest

from .errors import OptionError

__all__ = ['check_compile_options']


def check_compile_options(backend: str, mode: Optional[str] = None) -> None:
    """Check that torch.compile knows a backend and a mode.

    Args:
        backend: Value of --torchcompile.
        mode: Value of --torchcompile-mode, for the backend 'inductor'.

    Raises:
        OptionError: It does not. The message lists the known names.
    """
    try:
        lookup_backend(backend)
    except Exception as error:  # InvalidBackend, or an error while importing the backend
        known = torch.compiler.list_backends()
        close = closest(backend, known)
        raise OptionError(f"--torchcompile {backend}: unknown; there are {', '.join(known)}."
                          + (f" Did you mean '{close[0]}'?" if close else '')) from error
    modes = torch._inductor.list_mode_options()
    if backend == 'inductor' and mode is not None and mode not in modes:
        raise OptionError(f"--torchcompile-mode {mode}: unknown; there are {', '.join(modes)}.")
