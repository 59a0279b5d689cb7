"""Run a neuron's kernel through torch.compile when worthwhile, else eagerly."""
import logging
import types
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any, Callable, Hashable, Iterator, Set, Tuple

import torch
from torch._C import _len_torch_function_stack
from torch.overrides import _pop_mode_temporarily
from torch.utils._python_dispatch import _get_current_dispatch_mode

__all__ = ['MAX_UNROLLED', 'compiles', 'lif_backend', 'run']

_logger = logging.getLogger(__name__)

BACKENDS = ('auto', 'compiled', 'eager')
_WORTH_COMPILING = 2 ** 18  # number of elements; for smaller tensors, call overhead exceeds the arithmetic
MAX_UNROLLED = 16  # number of timesteps; each is separate code, which makes compilation slow

_chosen = 'auto'
_broken: Set[Tuple[Any, ...]] = set()  # (device type, owner) of kernels whose compilation failed


@contextmanager
def lif_backend(name: str) -> Iterator[None]:
    """Choose how neurons run inside.

    Args:
        name: 'auto' (the default: compiled for large tensors, if a compiler works; with more than 16 timesteps only the
            LIF, in chunks), 'compiled' (for any size) or 'eager'. All give the same numbers.

    Raises:
        ValueError: name is none of these.
    """
    global _chosen
    if name not in BACKENDS:
        raise ValueError(f"backend '{name}': must be one of {', '.join(BACKENDS)}.")
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before


def run(
        function: Callable,
        tensors: Tuple[Any, ...],
        timesteps: int,
        *settings: Any,
        owner: Hashable = None,
) -> Any:
    """Return function(*tensors, timesteps, *settings), run eagerly or compiled. Everything but the tensors is constant.

    Args:
        function: Kernel.
        tensors: Its tensors; an entry may be None or a tuple of tensors. The size of the first decides whether to
            compile.
        timesteps: Number of timesteps.
        settings: Hashable constants.
        owner: Owner of the kernel. If compilation fails, all kernels of the same owner run eagerly.
    """
    x = tensors[0]
    if compiles(x, timesteps, owner):
        signature = torch.is_grad_enabled(), _signature(tensors)
        compiled = _compiled(function, (timesteps, *settings), signature)
        try:
            with _without_function_modes():
                return compiled(*tensors)
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:  # there is no compiler, or it failed in some way
            _broken.add((x.device.type, owner))
            reason = ' '.join(f'{type(error).__name__}: {error}'.split())[:300]
            _logger.warning(f'Neurons on {x.device.type} run without torch.compile, several times slower: {reason}')
    return function(*tensors, timesteps, *settings)


@contextmanager
def _without_function_modes() -> Iterator[None]:
    """Suspend active TorchFunctionModes for the kernel.

    torch._C.DisableTorchFunction would also do so, but the compiler's proxies need their `__torch_function__`.
    """
    with ExitStack() as popped:
        for _ in range(_len_torch_function_stack()):
            popped.enter_context(_pop_mode_temporarily())
        yield


def compiles(x: torch.Tensor, timesteps: int, owner: Hashable) -> bool:
    """Return whether to compile the kernel for this input."""
    if _chosen == 'eager' or (x.device.type, owner) in _broken:
        return False
    if type(x) is not torch.Tensor or x.device.type == 'meta':
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or _get_current_dispatch_mode() is not None:
        return False  # part of an enclosing graph
    return _chosen == 'compiled' or (x.numel() >= _WORTH_COMPILING and timesteps <= MAX_UNROLLED)


def _signature(x: Any) -> Any:
    """Return the properties of tensors for which the compiler creates separate graphs, even with symbolic sizes."""
    if isinstance(x, tuple):
        return tuple([_signature(entry) for entry in x])
    return None if x is None else (x.dtype, x.device.type, x.requires_grad, tuple([n == 1 for n in x.shape]))


@lru_cache(maxsize=None)
def _compiled(function: Callable, settings: Tuple[Any, ...], signature: Tuple[Any, ...]) -> Callable:
    """Return the compiled kernel for these settings and this signature."""
    def call(*tensors):
        return function(*tensors, *settings)

    # dynamo keeps at most eight graphs per code object: use a copy of the code per signature
    call = types.FunctionType(call.__code__.replace(), call.__globals__, call.__name__, None, call.__closure__)
    # symbolic sizes, so that another batch size reuses the graph; no pool of compiler processes for a small kernel
    return torch.compile(call, dynamic=True, fullgraph=True, options=dict(compile_threads=1))
