"""Warn if the projections of a loss are not in the optimizer."""
import logging
from typing import Any, Dict, Optional

import torch
import torch.nn as nn

from timm_sscl.host_copy import HostCopy, can_copy

__all__ = ['TrainedCheck']

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


def _sum(parameter: torch.Tensor) -> torch.Tensor:
    dtype = torch.float32 if parameter.device.type == 'mps' else torch.float64
    return parameter.detach().to(dtype).sum()
