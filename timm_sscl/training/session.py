"""Session: objects that the teacher's and the student's training share."""
import signal
from argparse import Namespace
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Tuple

import torch
from accelerate import Accelerator

from .loaders import Loaders
from .steps.stop import Interrupted, StopRequest
from .steps.stop_vote import StopVote

__all__ = ['Session']


@dataclass
class Session:
    """Objects that all trainings of a run share: options, Accelerate, loaders, the request to stop, the processes' vote
    on it.
    """
    args: Namespace
    accelerator: Accelerator
    make_loaders: Callable[[], Loaders]
    stop: StopRequest
    vote: StopVote = field(init=False, default_factory=StopVote)
    _first_scale: Dict[str, Any] = field(init=False, default_factory=dict)

    def __post_init__(self):
        scaler = getattr(self.accelerator, 'scaler', None)
        self._first_scale = scaler.state_dict() if scaler is not None else {}

    def reset_loss_scale(self) -> None:
        """Restore the initial loss scale of --amp, so that each training is independent of the previous one."""
        if self._first_scale:
            self.accelerator.scaler.load_state_dict(self._first_scale)

    @property
    def launch(self) -> Dict[str, Any]:
        """Settings of the launcher that a training depends on."""
        return dict(processes=self.accelerator.num_processes, mixed_precision=self.accelerator.mixed_precision)

    def stop_if_asked(self, failed: bool = False) -> Tuple[bool, bool]:
        """Return (did any process fail, was any told to stop). All processes get the same answer."""
        flags = failed, self.stop.signal_number is not None
        if self.accelerator.num_processes > 1:
            flags = self.accelerator.reduce(torch.tensor(flags, device=self.accelerator.device).float(), 'sum').tolist()
        return bool(flags[0]), bool(flags[1])

    def interrupt(self) -> None:
        """Raise Interrupted with the signal that this process received, or SIGTERM."""
        raise Interrupted(self.stop.signal_number or signal.SIGTERM)
