"""What all trainings of a run share."""
import signal
from argparse import Namespace
from dataclasses import dataclass
from typing import Any, Callable, Dict, Tuple

import torch
from accelerate import Accelerator

from .loaders import Loaders
from .stop import Interrupted, StopRequest

__all__ = ['Session']


@dataclass
class Session:
    """What all trainings of a run share."""
    args: Namespace
    accelerator: Accelerator
    make_loaders: Callable[[], Loaders]
    stop: StopRequest

    @property
    def launch(self) -> Dict[str, Any]:
        """What the launcher decides of a training."""
        return dict(processes=self.accelerator.num_processes, mixed_precision=self.accelerator.mixed_precision)

    def stop_if_asked(self, failed: bool = False) -> Tuple[bool, bool]:
        """(Did anything go wrong on any process, was any told to stop): all processes get the same answer."""
        flags = failed, self.stop.signal_number is not None
        if self.accelerator.num_processes > 1:
            flags = self.accelerator.reduce(torch.tensor(flags, device=self.accelerator.device).float(), 'sum').tolist()
        return bool(flags[0]), bool(flags[1])

    def interrupt(self) -> None:
        raise Interrupted(self.stop.signal_number or signal.SIGTERM)
