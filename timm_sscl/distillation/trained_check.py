"""Warn if the projections of a loss are not in the optimizer, or differ between processes."""
import logging
from typing import Any, Dict, Optional

import torch
import torch.nn as nn

from timm_sscl.distributed import gather_rows, world_size
from timm_sscl.host_copy import HostCopy, can_copy

__all__ = ['SyncedCheck', 'TrainedCheck']

_logger = logging.getLogger(__name__)


class TrainedCheck:
    """Warn once if the optimizer changes the student but not the projections. Only the first calls are checked.

    It compares on the device and reads the result when it has arrived on the host.

    Args:
        calls: Number of calls to check.
    """

    def __init__(self, calls: int = 50):
        self.calls = calls
        self.before: Optional[torch.Tensor] = None
        self.answer: Optional[HostCopy] = None

    def __call__(self, student: nn.Module, criterion: nn.Module) -> None:
        if self.calls == 0 or not can_copy(criterion.g_student[0].weight):
            return
        self.calls -= 1
        student_parameter = next((p for p in student.parameters() if p.requires_grad), None)
        if student_parameter is None:
            return
        projection = criterion.g_student[0].weight
        # compare sums, since a fused optimizer does not increase the version counters
        now = torch.stack([_sum(student_parameter), _sum(projection).to(student_parameter.device)])
        if self.before is not None and self.answer is None:
            same = now == self.before
            self.answer = HostCopy((~same[:1] & same[1:]).to(torch.uint8))
        self.before = now
        if self.answer is not None and self.answer.ready:
            (forgotten,), self.answer = self.answer.read(), None
            if forgotten:
                self.calls = 0
                _logger.warning('SSCLLoss: the student is being trained but the projections g_S and g_A are not; '
                                'add sscl.parameters() to the optimizer.')

    def __getstate__(self) -> Dict[str, Any]:
        return dict(calls=self.calls)  # a pending result belongs to a stream of the device

    def __setstate__(self, state: Dict[str, Any]) -> None:
        self.calls, self.before, self.answer = state['calls'], None, None


class SyncedCheck:
    """Warn once if the projections of several processes differ, as without DistributedDataParallel around the loss.

    Only the first calls are checked. Every process takes part in all of these, whatever it has read so far.

    Args:
        calls: Number of calls to check.
    """

    def __init__(self, calls: int = 50):
        self.calls = calls
        self.warned = False
        self.answer: Optional[HostCopy] = None

    def __call__(self, criterion: nn.Module) -> None:
        weight = criterion.g_student[0].weight
        # not of a sharded parameter, of which every process has another part
        if world_size() == 1 or self.calls == 0 or not can_copy(weight) or hasattr(weight, 'placements'):
            return
        self.calls -= 1
        sums = gather_rows(_sum(weight).reshape(1), [1] * world_size())
        if self.answer is None:
            self.answer = HostCopy((sums != sums[0]).any().to(torch.uint8).reshape(1))
        if self.answer.ready:
            (differ,), self.answer = self.answer.read(), None
            if differ and not self.warned:
                self.warned = True
                _logger.warning('SSCLLoss: the projections g_S and g_A differ between the processes; wrap the loss in '
                                'DistributedDataParallel as well as the student.')

    def __getstate__(self) -> Dict[str, Any]:
        return dict(calls=self.calls, warned=self.warned)  # a pending result belongs to a stream of the device

    def __setstate__(self, state: Dict[str, Any]) -> None:
        self.__init__(state['calls'])  # type: ignore[misc]
        self.warned = state['warned']


def _sum(parameter: torch.Tensor) -> torch.Tensor:
    dtype = torch.float32 if parameter.device.type == 'mps' else torch.float64
    return parameter.detach().to(dtype).sum()
