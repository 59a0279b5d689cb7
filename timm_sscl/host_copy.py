"""HostCopy: copy a few numbers from the device to the host without making the step wait."""
from typing import List, Optional

import torch

__all__ = ['HostCopy', 'is_capturing']


def is_capturing() -> bool:
    """Return whether a CUDA graph records the current step. It must not ask for values on the host then."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


class HostCopy:
    """Copy of a tensor on the host. The copy starts now and is read once it has arrived.

    Args:
        values: Tensor on any device, with at least one axis.
    """

    def __init__(self, values: torch.Tensor):
        self._values = values.detach().to('cpu', non_blocking=True)  # to pinned memory
        self._arrival: Optional[torch.Event] = None
        if values.device.type != 'cpu':
            self._arrival = torch.Event(values.device.type)
            self._arrival.record()

    @property
    def ready(self) -> bool:
        """Whether the values have arrived. Asking does not wait."""
        return self._arrival is None or self._arrival.query()

    def read(self) -> List:
        """Return the values as Tensor.tolist does; wait if they have not arrived."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._values.tolist()
