"""Notice when others (loaders, averaged copies) write to a buffer, without waiting for the device at every call."""
import ctypes
from typing import List, NamedTuple, Optional

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ['BufferSnapshot', 'changed', 'is_readable', 'read_values']


_UNREAD = -1  # not a version of any tensor


class BufferSnapshot(NamedTuple):
    """Snapshot of a buffer when it was read."""
    tensor: torch.Tensor
    version: Optional[int]
    content: Optional[bytes] = None  # its bytes, if they are in this process's memory

    @classmethod
    def now(cls, tensor: torch.Tensor) -> 'BufferSnapshot':
        """Take a snapshot of a tensor."""
        return cls(tensor, None if tensor.is_inference() else tensor._version, _content(tensor))

    def again(self) -> 'BufferSnapshot':
        """Return a snapshot without a version: the buffer is read again unless its bytes are known to be equal."""
        return self._replace(version=_UNREAD)


def changed(tensor: torch.Tensor, seen: Optional[BufferSnapshot], training: bool) -> bool:
    """Return whether a buffer must be read again: it is another tensor or was written in place.

    On the CPU its bytes are compared. On other devices its version is, which does not count writes to `tensor.data` or
    in inference mode; `train()` and `eval()` therefore cause a new reading. When training on several devices, DDP
    writes to every buffer in every step (it broadcasts the first process's buffers), and reading would wait for the
    device: then only another tensor counts.
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
    """Return a tensor's bytes in this process's memory, bypassing all modes; None if they are elsewhere."""
    with torch._C.DisableTorchFunction():
        if not is_readable(tensor) or tensor.device.type != 'cpu' or not tensor.is_contiguous():
            return None
        return ctypes.string_at(tensor.data_ptr(), tensor.nbytes)


def is_readable(tensor: torch.Tensor) -> bool:
    """Return whether a tensor holds values. Meta tensors, fake tensors and tensors inside torch.func.vmap do not."""
    return (type(tensor) is torch.Tensor and not tensor.is_meta
            and not torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def read_values(tensor: torch.Tensor) -> List:
    """Return the values of a tensor, bypassing all modes."""
    with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
        return tensor.flatten().tolist()
