"""Buffers that others write into (loaders, averaged copies): noticed without asking the device at every call."""
import ctypes
from typing import List, NamedTuple, Optional

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ['Seen', 'changed', 'is_readable', 'read_values']


_UNREAD = -1  # no version of a tensor


class Seen(NamedTuple):
    """A buffer as it was when it was read."""
    tensor: torch.Tensor
    version: Optional[int]
    content: Optional[bytes] = None  # where it can be had at no cost

    @classmethod
    def now(cls, tensor: torch.Tensor) -> 'Seen':
        return cls(tensor, None if tensor.is_inference() else tensor._version, _content(tensor))

    def again(self) -> 'Seen':
        """The same, whose version tells nothing: it is read again unless its content is known to be the same."""
        return self._replace(version=_UNREAD)


def changed(tensor: torch.Tensor, seen: Optional[Seen], training: bool) -> bool:
    """Whether a buffer has to be read again: it is another tensor, or was written in place.

    On the CPU its bytes tell. On other devices its version does, which does not count what is written by `tensor.data`
    or in inference mode: `train()` and `eval()` have it read again. Training on several devices writes into it at every
    step (DDP broadcasts the first process's buffers), and a reading would wait for the device: there only another
    tensor counts.
    """
    if seen is None or tensor is not seen.tensor:
        return True
    content = _content(tensor)
    if content is not None and seen.content is not None:
        return content != seen.content
    if seen.version == _UNREAD:
        return True
    if tensor.is_inference() or tensor._version == seen.version:
        return False
    return not (training and tensor.device.type != 'cpu' and dist.is_available() and dist.is_initialized())


def _content(tensor: torch.Tensor) -> Optional[bytes]:
    """A tensor's bytes in this process's memory, read past all modes; None where they lie elsewhere."""
    with torch._C.DisableTorchFunction():
        if not is_readable(tensor) or tensor.device.type != 'cpu' or not tensor.is_contiguous():
            return None
        return ctypes.string_at(tensor.data_ptr(), tensor.nbytes)


def is_readable(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds values: none on the meta device, none in a fake tensor or inside torch.func.vmap."""
    return (type(tensor) is torch.Tensor and not tensor.is_meta
            and not torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def read_values(tensor: torch.Tensor) -> List:
    """The values, whatever mode watches this thread's operations."""
    with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
        return tensor.flatten().tolist()
