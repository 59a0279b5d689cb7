"""--deploy: accuracy and speed of the deployed model."""
import time
from functools import partial
from typing import Any, Dict, List, NamedTuple

import torch
import torch.nn as nn

from timm_sscl.conversion.model import SpikingModule
from timm_sscl.export import deploy

from ..errors import OptionError
from ..session import Session
from ..saving.state import prepare_input
from ..steps.validation import evaluate

__all__ = ['Predictions', 'Timed', 'check_deploy', 'evaluate_deployed', 'evaluate_timed']


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


class Timed(NamedTuple):
    """A model on a validation loader."""
    metrics: Dict[str, float]
    predictions: Predictions
    images_per_second: float  # of the model's calls in this process, without reading images


class _Clock(nn.Module):
    """A model that measures the time of its calls on batches of one size; another size packs and compiles anew."""

    def __init__(self, model: nn.Module, batch: int):
        super().__init__()
        self.model = model
        self.batch = batch
        self.images = 0
        self.seconds = 0.

    def forward(self, x: torch.Tensor) -> Any:
        started = time.perf_counter()
        out = self.model(x)
        if len(x) == self.batch:
            self.images += len(x)
            self.seconds += time.perf_counter() - started
        return out


class _Float32(nn.Module):
    """A model that computes in float32 under autocast, too."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> Any:
        with torch.autocast('cpu', enabled=False):
            return self.model(x.float())


def check_deploy(session: Session, student: nn.Module) -> None:
    """Raise OptionError if --deploy does not apply."""
    if not isinstance(student, SpikingModule):
        raise OptionError(f"--deploy: '{session.args.model}' does not spike.")
    if session.accelerator.device.type != 'cpu':
        raise OptionError(f'--deploy: int8 inference is for the CPU, and the device is {session.accelerator.device}; '
                          f'add --device cpu.')


def evaluate_timed(session: Session, model: nn.Module, loader: Any) -> Timed:
    """Return metrics, predictions and speed of a model on a prepared validation loader, which gives the same batches
    every time.

    A batch that is not counted comes first: it packs weights and compiles neurons.
    """
    cast = partial(prepare_input, session.args)
    first = cast(next(iter(loader))[0])
    with torch.no_grad(), session.accelerator.autocast():
        model.eval()(first)
    clock = _Clock(model, len(first))
    with Predictions(clock) as predictions:
        metrics = evaluate(session, clock, loader, cast)
    return Timed(metrics, predictions, clock.images / clock.seconds)


def evaluate_deployed(
        session: Session,
        student: SpikingModule,
        loader: Any,
        own: Predictions,
        weight_bits: int,
) -> Dict[str, float]:
    """Return metrics of the deployed student on a prepared validation loader, its agreement with the student in percent
    of the images, and its images per second.

    Args:
        session: Session.
        student: Spiking model.
        loader: Loader, which gives the same batches every time.
        own: The student's predictions, of which those for the loader's batches come first.
        weight_bits: Bits of the deployed weights.
    """
    first = prepare_input(session.args, next(iter(loader))[0])
    deployed = _Float32(deploy(student, first[:1], weight_bits))
    timed = evaluate_timed(session, deployed, loader)
    same = [a.eq(b.to(a.device)) for a, b in zip(timed.predictions.classes, own.classes)]
    counts = torch.tensor([sum(int(s.sum()) for s in same), sum(len(s) for s in same)], dtype=torch.float64)
    counts = session.accelerator.reduce(counts)
    return {**timed.metrics, 'agreement': 100 * (counts[0] / counts[1]).item(),
            'images_per_second': timed.images_per_second}
