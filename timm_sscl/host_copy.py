"""A few numbers on their way from the device to the host, read without making the step wait for them."""
from typing import List, Optional

import torch

__all__ = ['HostCopy']


class HostCopy:
    """A copy of a tensor on the host, begun now and read once it is there.

    Args:
        values: Tensor of any device, one axis or more.
    """

    def __init__(self, values: torch.Tensor):
        self._values = values.detach().to('cpu', non_blocking=True)  # into pinned memory
        self._arrival: Optional[torch.Event] = None
        if values.device.type != 'cpu':
            self._arrival = torch.Event(values.device.type)
            self._arrival.record()

    @property
    def ready(self) -> bool:
        """Whether the values are there; asking does not wait."""
        return self._arrival is None or self._arrival.query()

    def read(self) -> List:
        """The values, as Tensor.tolist gives them; waits where they are not there yet."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._values.tolist()
