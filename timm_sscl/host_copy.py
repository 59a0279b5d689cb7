"""HostCopy: copy a few numbers from the device to the host without making the step wait."""
from typing import List, Optional

import torch

__all__ = ['HostCopy', 'can_copy']


def can_copy(values: torch.Tensor) -> bool:
    """Return whether numbers can be copied to the host here: not in a graph that is compiled or captured."""
    if torch.compiler.is_compiling():
        return False
    return not (values.is_cuda and torch.cuda.is_current_stream_capturing())


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
