"""Whether torch.compile has a backend and a mode, before anything is built."""
import difflib
from typing import Optional

import torch
from torch._dynamo import lookup_backend  # a backend may be an entry point of a package, which no list has

from .errors import OptionError

__all__ = ['check_compile_options']


def check_compile_options(backend: str, mode: Optional[str] = None) -> None:
    """Raise for a backend or a mode that torch.compile does not know.

    Args:
        backend: --torchcompile.
        mode: --torchcompile-mode, of the backend 'inductor'.

    Raises:
        OptionError: With the names there are.
    """
    try:
        lookup_backend(backend)
    except Exception as error:  # InvalidBackend, and whatever importing a backend raises
        known = torch.compiler.list_backends()
        close = difflib.get_close_matches(backend, known, n=1)
        raise OptionError(f"--torchcompile {backend}: unknown; there are {', '.join(known)}."
                          + (f" Did you mean '{close[0]}'?" if close else '')) from error
    modes = torch._inductor.list_mode_options()
    if backend == 'inductor' and mode is not None and mode not in modes:
        raise OptionError(f"--torchcompile-mode {mode}: unknown; there are {', '.join(modes)}.")
