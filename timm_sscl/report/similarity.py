"""Compare every layer of a student with every layer of its teacher by mini-batch CKA."""
from collections import Counter
from contextlib import ExitStack
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Sequence

import torch
import torch.nn as nn

from timm_sscl.losses.cka import gram_matrix, hsic_matrix, hsic_terms
from timm_sscl.neurons import SpikingNeuron
from timm_sscl.untouched import untouched

__all__ = ['CKAMap', 'cka_map']

LOGITS = 'logits'  # name of a model's output
_ACTIVATIONS = 'torch.nn.modules.activation', 'timm.layers.activations'  # modules that define activations
_LEAST = 4  # samples that the unbiased HSIC needs


class CKAMap(NamedTuple):
    """CKA of all layers of a student with all layers of a teacher."""
    values: torch.Tensor  # (S, A) float64 on the CPU; nan where a layer's output is the same for all images
    student: List[str]  # names of the S layers, in the order of their calls
    teacher: List[str]  # names of the A layers
    batches: int  # number of batches that were averaged
    left_out: Dict[str, str]  # layer -> why it is not in the map


def cka_map(
        student: nn.Module,
        teacher: nn.Module,
        loader: Iterable[Any],
        student_layers: Optional[Sequence[str]] = None,
        teacher_layers: Optional[Sequence[str]] = None,
        teacher_input: Optional[Callable[[torch.Tensor], torch.Tensor]] = None,
) -> CKAMap:
    """Return the CKA of every layer of the student with every layer of the teacher, across mini-batches.

        CKA(S, A) = mean HSIC(S, A) / sqrt(mean HSIC(S, S) * mean HSIC(A, A))

    The means are over the batches, of the unbiased HSIC with a linear kernel (Nguyen et al. 2021, Eq. 3). The features
    of an image are a layer's whole output, of all timesteps. Both models run in evaluation mode and are left as they
    were. Batches of fewer than 4 images are skipped, since the unbiased HSIC needs 4.

    Args:
        student: Model, usually spiking.
        teacher: Model to compare with, spiking or not.
        loader: Batches: images (B, C, H, W) or frames (B, T, C, H, W), alone or first in a tuple, in the student's
            input format. They are moved to the models' devices.
        student_layers: Names of modules. By default all neurons and activations, or, in a model without any, all layers
            with parameters; and the output, 'logits'.
        teacher_layers: The same for the teacher.
        teacher_input: Function that turns a batch of images into the teacher's.

    Returns:
        CKAMap. A module that runs again in a forward appears again, as 'act#2'.

    Raises:
        ValueError: A layer does not exist, or no batch has 4 images.

    Examples:
        ```python
        similarity = cka_map(student, teacher, val_loader)
        plot_cka_map(similarity)
        ```
    """
    layers = [_layers(model, names, side) for model, names, side in (
        (student, student_layers, 'student'), (teacher, teacher_layers, 'teacher'))]
    sums: List[torch.Tensor] = []
    names: List[List[str]] = []
    left_out: Dict[str, str] = {}
    batches = 0
    with untouched(student), untouched(teacher), torch.compiler.set_stance('force_eager'):
        for batch in loader:
            images = batch if isinstance(batch, torch.Tensor) else batch[0]
            if len(images) < _LEAST:
                continue
            seen = teacher_input(images) if teacher_input is not None else images
            grams = [_grams(model, chosen, x, left_out, side) for model, chosen, x, side in (
                (student, layers[0], images, 'student'), (teacher, layers[1], seen, 'teacher'))]
            names = names or [list(side) for side in grams]
            stacks = [[side[name] for name in order] for side, order in zip(grams, names)]
            terms = _terms(*stacks)
            sums = [total + term for total, term in zip(sums, terms)] if sums else terms
            batches += 1
    if not batches:
        raise ValueError(f'loader: no batch has {_LEAST} images or more, which the unbiased HSIC needs.')
    cross, own_student, own_teacher = (total / batches for total in sums)
    scale = own_student.sqrt().unsqueeze(1) * own_teacher.sqrt()
    values = torch.where(scale > 0, cross / scale, torch.full_like(scale, torch.nan))
    return CKAMap(values, names[0], names[1], batches, left_out)


def _layers(model: nn.Module, names: Optional[Sequence[str]], side: str) -> Dict[str, nn.Module]:
    """Return the layers to compare by name, without the '_orig_mod.' of a compiled model."""
    modules = {name.replace('_orig_mod.', ''): module for name, module in model.named_modules()
               if name.replace('_orig_mod', '')}
    if names is not None:
        unknown = [name for name in names if name not in modules and name != LOGITS]
        if unknown:
            raise ValueError(f"{side}_layers: {type(model).__name__} has no module '{unknown[0]}'.")
        return {name: modules[name] if name != LOGITS else model for name in names}
    leaves = {name: module for name, module in modules.items() if not any(True for _ in module.children())}
    chosen = {name: module for name, module in modules.items() if isinstance(module, SpikingNeuron)
              or (name in leaves and type(module).__module__.startswith(_ACTIVATIONS))}
    chosen = chosen or {name: module for name, module in leaves.items() if any(True for _ in module.parameters())}
    return {**chosen, LOGITS: model}


def _grams(
        model: nn.Module,
        layers: Dict[str, nn.Module],
        images: torch.Tensor,
        left_out: Dict[str, str],
        side: str,
) -> Dict[str, torch.Tensor]:
    """Return the Gram matrix of every layer's output, in the order of the calls, on the CPU."""
    device = next((p.device for p in model.parameters()), images.device)
    frames = images.shape[1] if images.ndim == 5 else 1
    steps = {1, frames, getattr(model, 'timesteps', 1)}
    grams: Dict[str, torch.Tensor] = {}
    calls: Counter = Counter()

    def add(name: str, out: Any) -> None:
        calls[name] += 1
        name = name if calls[name] == 1 else f'{name}#{calls[name]}'
        out = out[0] if isinstance(out, (tuple, list)) and out else out
        rows = len(out) if isinstance(out, torch.Tensor) and out.ndim else 0
        if not rows or rows % len(images) or rows // len(images) not in steps:
            left_out.setdefault(f'{side} {name}', f'its output has {rows} rows for {len(images)} images')
            return
        grams[name] = gram_matrix(out.detach().unflatten(0, (-1, len(images)))).cpu()

    with ExitStack() as hooks:
        for name, module in layers.items():
            hooks.callback(module.register_forward_hook(lambda m, args, out, name=name: add(name, out)).remove)
        model(images.to(device))
    return grams


def _terms(student: List[torch.Tensor], teacher: List[torch.Tensor]) -> List[torch.Tensor]:
    """Return HSIC of all pairs (S, A) and of every layer with itself, (S,) and (A,), in float64."""
    cross = hsic_matrix(torch.stack([K.double() for K in student]), torch.stack([L.double() for L in teacher]))
    own = [torch.stack([hsic_terms(K.double(), K.double())[1] for K in side]) for side in (student, teacher)]
    return [cross, *own]
