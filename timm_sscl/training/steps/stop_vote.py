"""StopVote: processes agree on whether to stop, without waiting for each other."""
from functools import partial
from typing import Any, Callable, Optional, Sequence, Tuple

import torch
import torch.distributed as dist

from timm_sscl.distributed import world_size

__all__ = ['StopVote']


class StopVote:
    """Agreement of all processes on whether one failed, and whether one was told to stop.

    Every process casts a vote per step and reads the result at the next step, so that all stop at the same step. The
    flags are on the host and reduced by gloo in the background, whatever the devices are. A single process reads its
    own vote.
    """

    def __init__(self) -> None:
        self._group: Any = None
        self._read: Optional[Callable[[], Sequence[int]]] = None

    def cast(self, failed: bool, stop: bool) -> None:
        """Cast this process's vote. All processes must call this, after they have read the previous result."""
        if world_size() == 1:
            self._read = lambda: (failed, stop)
            return
        self._group = self._group or dist.new_group(backend='gloo')
        flags = torch.tensor([failed, stop], dtype=torch.uint8)
        work = dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._read = partial(_wait, work, flags)

    def read(self) -> Tuple[bool, bool]:
        """Return (did any process fail, was any told to stop) for the last vote; False if none is open."""
        read, self._read = self._read, None
        failed, stop = read() if read is not None else (False, False)
        return bool(failed), bool(stop)


def _wait(work: Any, flags: torch.Tensor) -> Sequence[int]:
    work.wait()
    return flags.tolist()
