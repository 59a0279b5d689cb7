"""Trials: many small trainings, made of the library's public parts, and the file of their results.

A trial is one training of a small spiking network: model, losses, optimizer and data by value, so that it has a name
of its own. train.py isn't used: the images lie on the device, and on CUDA several trials train side by side in one
captured graph. Trials of one seed see the same images in the same order with the same crops, and begin with the same
weights if their networks have the same parameters.

`runs.jsonl` has one JSON object per line, appended when a trial ends. A trial that has a line is not run again, unless
the line says 'failed' and the trial is asked for again with retry. All accuracies are percentages.

    name            unique: plan-phase-arm-scale-T-seed and 6 hexadecimal digits of all settings
    plan, phase, arm, seed, timesteps, split, config, arch, teacher, scale (object with name, data, classes, width,
    epochs, batch_size, teacher_epochs), model, losses, loss_options, criterion, step_ce,
                    task_weight, optimizer:
                    the fields of `Trial`, see there
    status          'ok' or 'failed'; a failed trial has `error` (str) and none of the numbers below
    top1            accuracy after the last epoch on all images of the split
    top1_epochs     [[epoch, accuracy], ...], some epochs, the last one included; epochs count from 1
    val_loss        cross-entropy after the last epoch on the same images, without smoothing
    correct         base64 of numpy.packbits of one bit per image of the split, in the order of the data file
    num_images      number of these images, since packbits pads with zeros
    train_loss      whole loss, mean over the steps of the last epoch
    train_terms     {'task': classification loss, NAME: each loss, unweighted}, means over the last epoch
    layers          {'first': {LAYER: {'cka', 'cka_running', 'weight', 'nce', 'mi_bound'}}, 'last': the same}: values of
                    the last step of the first and of the last epoch; {} for losses without statistics
    firing_rate     mean over the neuron layers of their firing rates, on the first 100 validation images
    energy          estimated energy relative to the ANN's on one image (45 nm figures), by the firing rates of the
                    first 8 validation images
    teacher_top1    accuracy of the teacher on the same split; null without a teacher
    seconds         wall-clock seconds of the group of trials that trained side by side
    replicas        number of trials in this group, 1 if it trained alone
    ms_per_step     milliseconds of one step of the whole group (all replicas); of processor time on the CPU
    peak_memory     MiB of tensors of the whole group at the peak on CUDA, null on the CPU
    graph           whether the steps were replayed from a captured CUDA graph
    precision       'float32, TF32 in convolutions' on CUDA, else 'float32' or 'bfloat16 autocast, channels_last'
    device, cpu, torch, timm, revision, finished
                    name of the device; capability of the CPU; versions; git's name of the code; time (ISO 8601)

Teachers have lines with phase 'teacher', arm 'ann', timesteps 0 and the fields above that an ANN has.
"""
import base64
import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Mapping

import numpy as np

__all__ = ['Scale', 'Trial', 'read_results', 'decode_correct', 'encode_correct']

SPLITS = 'validation', 'heldout'


@dataclass(frozen=True)
class Scale:
    """Size of a trial.

    Args:
        name: Name in the results.
        data: Data set in the file of images: '20x250', '100x50' or '100x500'.
        classes: Number of classes.
        width: Channels of the first stage.
        epochs: Epochs of a student.
        batch_size: Images per step.
        teacher_epochs: Epochs of the teacher.
    """
    name: str
    data: str
    classes: int
    width: int = 16
    epochs: int = 20
    batch_size: int = 100
    teacher_epochs: int = 40


@dataclass(frozen=True, eq=False)
class Trial:
    """One training. Two trials are equal if all their settings are.

    Args:
        plan: Name of the plan.
        phase: Phase of the plan: pilot, tune, screen, primary, confirm.
        arm: Name of the arm.
        seed: Seed of initial weights, order of the images and crops.
        timesteps: T; 0 trains the ANN.
        scale: Data, width and epochs.
        config: Number of the configuration of this arm, counted from 0, in phase 'tune'.
        arch: Network, a timm name without 'spiking_'.
        teacher: Which teacher: 'same' is fitted to the student's training images, 'strong' is trained on them with
            strong augmentation (cutout and mixup); '' for none.
        model: Arguments of create_model: neuron, norm, residual, neuron_kwargs ...
        losses: {registered loss: weight}.
        loss_options: {loss: {option: value}}.
        criterion: Arguments of the classification loss: smoothing.
        step_ce: Whether the classification loss is that of every timestep instead of that of the mean logits.
        task_weight: Weight of the classification loss; 0 with a loss that classifies by itself.
        optimizer: opt, lr, weight_decay and momentum, where they differ from the defaults.
        split: Images that it is evaluated on: 'validation', trained on all training images, or 'heldout', a tenth of
            the training images that it isn't trained on.
    """
    plan: str
    phase: str
    arm: str
    seed: int
    timesteps: int
    scale: Scale
    config: int = 0
    arch: str = 'resnet20_cifar'
    teacher: str = 'same'
    model: Mapping[str, Any] = field(default_factory=dict)
    losses: Mapping[str, float] = field(default_factory=dict)
    loss_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    criterion: Mapping[str, Any] = field(default_factory=dict)
    step_ce: bool = False
    task_weight: float = 1.
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    split: str = 'validation'

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"split='{self.split}': must be one of {', '.join(SPLITS)}.")
        if self.timesteps < 0 or self.scale.epochs < 1:
            raise ValueError(f'timesteps={self.timesteps}, epochs={self.scale.epochs}: must be 0 or more, 1 or more.')

    @property
    def digest(self) -> str:
        """Return 6 hexadecimal digits that depend on every setting."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:6]

    @property
    def name(self) -> str:
        config = f'-c{self.config}' if self.phase == 'tune' else ''
        return (f'{self.plan}-{self.phase}-{self.arm}{config}-{self.scale.name}-T{self.timesteps}-s{self.seed}'
                f'-{self.digest}')

    def __hash__(self) -> int:
        return hash(self.name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Trial) and asdict(self) == asdict(other)


def encode_correct(correct: np.ndarray) -> str:
    """Return base64 text of one bit per image."""
    return base64.b64encode(np.packbits(np.asarray(correct, dtype=bool))).decode()


def decode_correct(line: Mapping[str, Any]) -> np.ndarray:
    """Return the booleans of a result's 'correct', shape (num_images,)."""
    bits = np.unpackbits(np.frombuffer(base64.b64decode(line['correct']), dtype=np.uint8))
    return bits[:line['num_images']].astype(bool)


def read_results(folder: Path) -> List[Dict[str, Any]]:
    """Return the lines of runs.jsonl, the last of every name. A line cut off by an interruption is left out."""
    file = folder / 'runs.jsonl'
    lines: Dict[str, Dict[str, Any]] = {}
    for text in file.read_text().splitlines() if file.is_file() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        lines[line['name']] = line
    return list(lines.values())
