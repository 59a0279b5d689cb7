"""Measure a rebuilt run on its validation set: predictions, firing rates, energy, spikes, similarity to the teacher."""
import logging
import warnings
from dataclasses import dataclass, field
from typing import Dict, List, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F

from timm_sscl.data.events import is_event_dataset
from timm_sscl.report import (
    CKAMap, Energy, FiringRates, SpikeRecord, cka_map, estimate_energy, mean_per_step, record_spikes)
from timm_sscl.report.figures import Picture
from timm_sscl.untouched import untouched

from .rebuild import Rebuilt

__all__ = ['Measured', 'AtT', 'measure_run']

_logger = logging.getLogger('train')

_WORST = 12  # number of worst-classified images
_MOST_CLASSES = 10  # number of classes of which an image's spikes are recorded


class AtT(NamedTuple):
    """Accuracy, firing rate and energy with one number of timesteps."""
    timesteps: int
    top1: float  # percent
    rate: float  # spikes per neuron and timestep, mean over the layers
    energy: float  # microjoules per image
    ann: float  # of one real-valued timestep


class _Image(NamedTuple):
    """An image with the model's answer."""
    image: torch.Tensor  # in the model's format
    label: int
    predicted: int
    loss: float


@dataclass
class Measured:
    """Measurements of a run on its validation set.

    Attributes:
        images: Number of images.
        top1: Accuracy in percent.
        confusion: (K, K) counts, the true class by row.
        worst: Pictures of the wrong answers with the largest cross-entropy.
        examples: Pictures of one image per class.
        rates: Layer -> firing rate at every timestep; empty for an ANN.
        energy: Energy by layer; None for an ANN.
        sweep: Results with several numbers of timesteps.
        spikes: Spikes of the examples, or None.
        similarity: CKA of all layers with the teacher's, or None.
        missing: What was not measured -> why.
    """
    images: int
    top1: float
    confusion: torch.Tensor
    worst: List[Picture]
    examples: List[Picture]
    rates: Dict[str, List[float]] = field(default_factory=dict)
    energy: Optional[Energy] = None
    sweep: List[AtT] = field(default_factory=list)
    spikes: Optional[SpikeRecord] = None
    similarity: Optional[CKAMap] = None
    missing: Dict[str, str] = field(default_factory=dict)


def measure_run(rebuilt: Rebuilt) -> Measured:
    """Measure the student of a run, and its similarity to the teacher."""
    student = rebuilt.student
    with untouched(student):
        if hasattr(student, 'set_timesteps'):
            with FiringRates(student, inputs=True) as firing:
                result, examples = _predict(rebuilt)
            _measure_spiking(rebuilt, result, examples, firing)
        else:
            result, _ = _predict(rebuilt)
            result.missing['spikes'] = 'The model does not spike.'
    if rebuilt.teacher is None:
        result.missing['similarity'] = rebuilt.no_teacher
    else:
        _logger.info('Report: compares all layers with the teacher\'s.')
        result.similarity = cka_map(student, rebuilt.teacher, rebuilt.loader, teacher_input=rebuilt.teacher_input)
    return result


def _predict(rebuilt: Rebuilt) -> Tuple[Measured, torch.Tensor]:
    """Run the student once over the images. Return what it answered, and one image of every class."""
    classes = len(rebuilt.classes)
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    worst: List[_Image] = []
    firsts: Dict[int, _Image] = {}
    shown = {i * classes // min(classes, _MOST_CLASSES) for i in range(min(classes, _MOST_CLASSES))}
    for images, labels in rebuilt.loader:
        logits = _logits(rebuilt.student(images))
        predicted, labels = logits.argmax(1), labels.cpu()
        losses = F.cross_entropy(logits, labels, reduction='none')
        confusion.index_put_((labels, predicted), torch.ones_like(labels), accumulate=True)
        answers = [_Image(*values) for values in zip(
            images.cpu(), labels.tolist(), predicted.tolist(), losses.tolist())]
        wrong = [answer for answer in answers if answer.label != answer.predicted]
        worst = sorted([*worst, *wrong], key=lambda answer: -answer.loss)[:_WORST]
        for answer in answers:
            if answer.label in shown or not firsts:  # a few images may have none of these classes
                firsts.setdefault(answer.label, answer)
    examples = [firsts[label] for label in sorted(firsts) if label in shown] or [*firsts.values()]
    names, total = rebuilt.classes, int(confusion.sum())
    return Measured(
        total, 100 * int(confusion.diagonal().sum()) / total, confusion,
        [Picture(_shown(rebuilt, a.image), f'{names[a.label]}, taken for {names[a.predicted]}\nloss {a.loss:.2f}')
         for a in worst],
        [Picture(_shown(rebuilt, a.image), names[a.label]) for a in examples],
    ), torch.stack([a.image for a in examples])


def _logits(output: object) -> torch.Tensor:
    output = output[0] if isinstance(output, (tuple, list)) else output
    assert isinstance(output, torch.Tensor)
    return output.float().cpu()


def _shown(rebuilt: Rebuilt, image: torch.Tensor) -> torch.Tensor:
    """Return an image for the eye: (H, W, 3) or (H, W) in [0, 1]; of event frames the sum of all events."""
    image = image.float()
    if image.ndim == 4:  # (T, 2, H, W)
        events = image.sum((0, 1))
        return events / events.max().clamp(min=1)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (rebuilt.mean, rebuilt.std))
    image = (image * std + mean).clamp(0, 1)
    return image.permute(1, 2, 0) if len(image) == 3 else image.mean(0)


def _measure_spiking(rebuilt: Rebuilt, result: Measured, examples: torch.Tensor, firing: FiringRates) -> None:
    """Measure what only a spiking model has. The model is in evaluation mode; `firing` counted its predictions."""
    student = rebuilt.student
    images = next(iter(rebuilt.loader))[0]
    own = student.timesteps
    result.rates, result.energy = firing.per_step(), estimate_energy(student, images, firing)
    result.sweep.append(_at_t(own, result.top1, result.rates, result.energy))
    try:
        with record_spikes(student) as record:
            student(examples.to(images.device))
        result.spikes = record
    except ValueError as error:
        result.missing['raster'] = str(error)
    others = [] if is_event_dataset(rebuilt.args.dataset) else [t for t in (1, own // 2, 2 * own) if t not in (0, own)]
    if not others:
        result.missing['sweep'] = 'The number of timesteps is that of the event frames.'
    for timesteps in sorted({*others}):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')  # a neuron that changes with T says so; the report is about that change
                student.set_timesteps(timesteps)
        except (ValueError, NotImplementedError) as error:
            result.missing['sweep'] = str(error)
            continue
        _logger.info(f'Report: measures the model with {timesteps} timesteps.')
        result.sweep.append(_measure_at(rebuilt, images))
    result.sweep.sort()


def _measure_at(rebuilt: Rebuilt, images: torch.Tensor) -> AtT:
    """Measure the student with its current number of timesteps."""
    student, right, total = rebuilt.student, 0, 0
    with FiringRates(student, inputs=True) as firing:
        for batch, labels in rebuilt.loader:
            right += int((_logits(student(batch)).argmax(1) == labels.cpu()).sum())
            total += len(labels)
    energy = estimate_energy(student, images, firing)
    return _at_t(student.timesteps, 100 * right / total, firing.per_step(), energy)


def _at_t(timesteps: int, top1: float, rates: Dict[str, List[float]], energy: Energy) -> AtT:
    steps = mean_per_step(rates)
    return AtT(timesteps, top1, sum(steps) / len(steps), energy.spiking, energy.ann)
