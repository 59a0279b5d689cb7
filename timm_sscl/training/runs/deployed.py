"""--deploy: accuracy and speed of the deployed model."""
import time
from functools import partial
from typing import Any, Dict

import torch
import torch.nn as nn

from timm_sscl.conversion.model import SpikingModule
from timm_sscl.export import deploy

from ..errors import OptionError
from ..session import Session
from ..saving.state import prepare_input
from ..steps.validation import evaluate

__all__ = ['check_deploy', 'evaluate_deployed']


class _Timed(nn.Module):
    """A model in float32 that measures the time of its calls after the first, which compiles and packs."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.calls = 0
        self.images = 0
        self.seconds = 0.

    def forward(self, x: torch.Tensor) -> Any:
        started = time.perf_counter()
        with torch.autocast('cpu', enabled=False):
            out = self.model(x.float())
        if self.calls == 1:
            self.images, self.seconds = 0, 0.
        self.calls += 1
        self.images += len(x)
        self.seconds += time.perf_counter() - started
        return out


def check_deploy(session: Session, student: nn.Module) -> None:
    """Raise OptionError if --deploy does not apply."""
    if not isinstance(student, SpikingModule):
        raise OptionError(f"--deploy: '{session.args.model}' does not spike.")
    if session.accelerator.device.type != 'cpu':
        raise OptionError(f'--deploy: int8 inference is for the CPU, and the device is {session.accelerator.device}; '
                          f'add --device cpu.')


def evaluate_deployed(session: Session, student: SpikingModule, loader: Any) -> Dict[str, float]:
    """Return metrics of the deployed student on a prepared validation loader, and its images per second.

    The time is that of the model's calls in this process, without reading images.
    """
    cast = partial(prepare_input, session.args)
    timed = _Timed(deploy(student, cast(next(iter(loader))[0][:1])))
    metrics = evaluate(session, timed, loader, cast)
    return {**metrics, 'images_per_second': timed.images / timed.seconds}
