"""Networks and losses of a trial on the CPU: initial states, firing rates and energy, in worker processes or here."""
from typing import Any, Dict, Optional, Tuple

import numpy as np
import timm
import torch
import torch.nn as nn

import timm_sscl
from timm_sscl import SSCLTask
from timm_sscl.neurons import lif_backend

from trials import Trial

__all__ = ['as_arrays', 'create_task', 'initial_state', 'measure', 'named_tensors', 'teacher_model', 'create_student']

State = Dict[str, np.ndarray]  # arrays, since tensors would pass between processes as files


def create_student(trial: Trial, classes: int) -> nn.Module:
    """Create the trial's network with initial weights of its seed; the ANN with timesteps=0."""
    torch.manual_seed(trial.seed)
    arguments: Dict[str, Any] = dict(num_classes=classes, width=trial.scale.width)
    if trial.timesteps == 0:
        return timm.create_model(trial.arch, **arguments, **trial.model)
    return timm.create_model(f'spiking_{trial.arch}', timesteps=trial.timesteps, **arguments, **trial.model)


def teacher_model(trial: Trial, classes: int) -> nn.Module:
    """Create the ANN of the trial's architecture, whose weights are still random."""
    return timm.create_model(trial.arch, num_classes=classes, width=trial.scale.width)


def create_task(
        trial: Trial,
        student: nn.Module,
        teacher: Optional[nn.Module],
        size: int,
        device: Any,
        samples: int,
) -> SSCLTask:
    """Create the trial's losses for training images of this size and number. Random parts depend on the seed alone."""
    torch.manual_seed(trial.seed)
    losses, options = dict(trial.losses), {name: dict(given) for name, given in trial.loss_options.items()}
    if trial.step_ce:
        losses['tet'] = 1.
        options['tet'] = dict(mse_share=0., smoothing=float(trial.criterion.get('smoothing', 0.)))
    return SSCLTask(
        student, teacher if losses else None, losses=losses, loss_options=options,
        criterion=nn.CrossEntropyLoss(label_smoothing=float(trial.criterion.get('smoothing', 0.))),
        task_loss_weight=0. if trial.step_ce else trial.task_weight, input_size=(3, size, size), device=device,
        verbose=False, num_samples=samples)


def named_tensors(module: nn.Module) -> Dict[str, torch.Tensor]:
    """Return all parameters and buffers of a module by name, those outside its state dict, too."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def as_arrays(module: nn.Module) -> State:
    """Return copies of all parameters and buffers."""
    return {name: tensor.detach().cpu().numpy().copy() for name, tensor in named_tensors(module).items()}


@lif_backend('eager')  # a few images: compiling would take longer
def initial_state(trial: Trial, classes: int, images: np.ndarray, samples: int) -> State:
    """Return everything that a training on so many samples starts with: weights, gains calibrated on these images, and
    states of the losses.
    """
    student = create_student(trial, classes)
    if trial.timesteps:
        timm_sscl.calibrate(student, torch.from_numpy(images))
    teacher = teacher_model(trial, classes) if trial.teacher else None
    task = create_task(trial, student, teacher, images.shape[-1], torch.device('cpu'), samples)
    return as_arrays(task.trainable_module)


@lif_backend('eager')  # a few images: compiling would take longer
def measure(trial: Trial, classes: int, state: State, images: np.ndarray) -> Tuple[Optional[float], Optional[float]]:
    """Return the firing rate, mean over layers, and the energy relative to the ANN's, of a trained student.

    Args:
        trial: The trial.
        classes: Number of classes.
        state: Parameters and buffers of its student.
        images: Normalised images.
    """
    if trial.timesteps == 0:
        return None, None
    student, batch = create_student(trial, classes).eval(), torch.from_numpy(images)
    timm_sscl.calibrate(student, batch[:4])  # creates the gains that the state sets
    own = named_tensors(student)
    with torch.no_grad():
        for name, values in state.items():
            own[name].copy_(torch.from_numpy(values))
    with torch.no_grad(), timm_sscl.FiringRates(student) as rates:
        student(batch)
    per_layer = rates.per_layer().values()
    return sum(per_layer) / len(per_layer), timm_sscl.estimate_energy(student, batch[:8]).ratio
