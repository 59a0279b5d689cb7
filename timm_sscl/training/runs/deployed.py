"""--deploy: accuracy and speed of the deployed model."""
import time
from functools import partial
from typing import Any, Dict, List

import torch
import torch.nn as nn

from timm_sscl.conversion.model import SpikingModule
from timm_sscl.export import deploy

from ..errors import OptionError
from ..session import Session
from ..saving.state import prepare_input
from ..steps.validation import evaluate

__all__ = ['Predictions', 'check_deploy', 'evaluate_deployed']


class Predictions:
    """Context manager that collects the classes that a model predicts, in the order of its forwards.

    Args:
        model: Model whose output is logits, or a sequence that starts with them.
    """

    def __init__(self, model: nn.Module):
        self.classes: List[torch.Tensor] = []
        self._handle = model.register_forward_hook(self._collect)

    def _collect(self, model: nn.Module, args: Any, out: Any) -> None:
        out = out[0] if isinstance(out, (tuple, list)) else out
        self.classes.append(out.argmax(1))

    def __enter__(self) -> 'Predictions':
        return self

    def __exit__(self, *error: Any) -> None:
        self._handle.remove()


class _Timed(nn.Module):
    """A model in float32 that measures the time of its calls."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.images = 0
        self.seconds = 0.

    def forward(self, x: torch.Tensor) -> Any:
        started = time.perf_counter()
        with torch.autocast('cpu', enabled=False):
            out = self.model(x.float())
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


def evaluate_deployed(session: Session, student: SpikingModule, loader: Any, own: Predictions) -> Dict[str, float]:
    """Return metrics of the deployed student on a prepared validation loader, its agreement with the student in percent
    of the images, and its images per second.

    The time is that of the model's calls in this process, without reading images. A batch that is not counted comes
    first: it packs weights and compiles neurons.

    Args:
        session: Session.
        student: Spiking model.
        loader: Loader, which gives the same batches every time.
        own: The student's predictions, of which those for the loader's batches come first.
    """
    cast = partial(prepare_input, session.args)
    first = cast(next(iter(loader))[0])
    deployed = deploy(student, first[:1])
    with torch.no_grad():
        deployed(first.float())
    timed = _Timed(deployed)
    with Predictions(timed) as predictions:
        metrics = evaluate(session, timed, loader, cast)
    same = [a.eq(b.to(a.device)) for a, b in zip(predictions.classes, own.classes)]
    counts = torch.tensor([sum(int(s.sum()) for s in same), sum(len(s) for s in same)], dtype=torch.float64)
    counts = session.accelerator.reduce(counts)
    return {**metrics, 'agreement': 100 * (counts[0] / counts[1]).item(),
            'images_per_second': timed.images / timed.seconds}
