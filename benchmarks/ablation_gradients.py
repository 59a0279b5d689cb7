"""Compare the gradients of the loss terms in finished runs of the ablation, to explain the modes' results."""
import sys
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

import torch

from timm.data import resolve_data_config
from timm.utils import random_seed

from ablation_precision import device_name
from ablation_results import GRADIENTS_CSV, gradient_lines, read_csv, write_csv
from ablation_runs import finished_runs
from timm_sscl.training.datasets import create_datasets, resolve_num_classes
from timm_sscl.training.loaders import create_loaders
from timm_sscl.training.neuron_init import prepare_neurons
from timm_sscl.training.processes import create_accelerator, set_threads
from timm_sscl.training.saving.resume import restore
from timm_sscl.training.student import create_student
from timm_sscl.training.task import create_task
from timm_sscl.training.teachers.teacher import create_teacher
from timm_sscl.training.saving.weights import load_weights

ROOT = Path(__file__).resolve().parent.parent
_DIAGNOSIS_BATCHES = 4


def stage_of(parameter: str) -> str:
    """Return the stage of a student's parameter: 'stem', 'layer1', ..., 'fc'."""
    first = parameter.split('.')[0]
    return 'stem' if first in ('conv1', 'bn1', 'act1') else first


def term_gradients(task: Any, batches: Sequence[Tuple[Any, Any]]) -> List[Dict[str, Any]]:
    """Compare the gradient of the added losses (weighted, as trained) with that of cross-entropy, by stage.

    Args:
        task: An SSCLTask in training mode.
        batches: (images, labels).

    Returns:
        Per stage the two norms, their ratio and the cosine, averaged over the batches.
    """
    names, parameters = zip(*((n, p) for n, p in task.student.named_parameters() if p.requires_grad))
    sums: Dict[str, Counter] = OrderedDict()
    for images, labels in batches:
        result = task(images, labels)
        added = sum(weight * result[f'{name}_loss'] for name, weight in task.weights.items())
        pairs = [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
                 for loss in (task.task_loss_weight * result['task_loss'], added)]
        by_stage: Dict[str, List[Tuple[torch.Tensor, torch.Tensor]]] = OrderedDict()
        for name, p, task_grad, added_grad in zip(names, parameters, *pairs):
            grads = [torch.zeros_like(p) if g is None else g for g in (task_grad, added_grad)]
            by_stage.setdefault(stage_of(name), []).append(tuple(g.flatten().double() for g in grads))
        for stage, grads in by_stage.items():
            task_grad, added_grad = (torch.cat([pair[i] for pair in grads]) for i in (0, 1))
            norms = float(task_grad.norm()), float(added_grad.norm())
            cosine = float(task_grad @ added_grad) / (norms[0] * norms[1]) if min(norms) > 0 else 0.
            sums.setdefault(stage, Counter()).update(
                dict(task_norm=norms[0], added_norm=norms[1], ratio=norms[1] / norms[0], cosine=cosine))
    return [dict(stage=stage, **{k: round(v / len(batches), 5) for k, v in total.items()})
            for stage, total in sums.items()]


def diagnose(folder: Path, at_start: bool) -> List[Dict[str, Any]]:
    """Return term_gradients of a finished run with its last weights or, rebuilt, with its initial weights."""
    sys.path.insert(0, str(ROOT))  # train.py is a script in the parent folder
    from timm_sscl.training.command_line.options import parse_args
    args, _ = parse_args(['--config', str(folder / 'args.yaml')])
    accelerator = create_accelerator(args)
    set_threads(args, accelerator)
    random_seed(args.seed, 0)
    datasets = create_datasets(args)
    classes = resolve_num_classes(args, datasets[0])
    student = create_student(args, classes)
    data_config = resolve_data_config(vars(args), model=student)
    teacher, teacher_input = create_teacher(args, classes, data_config)
    load_weights(teacher, args.teacher_checkpoint, '--teacher-checkpoint')
    loaders = create_loaders(args, datasets, data_config, classes)
    task = create_task(args, student, teacher, teacher_input, data_config, accelerator.device, False)
    if at_start:
        prepare_neurons(args, accelerator, student, loaders.train, resumed=False)
    else:
        restore(task, str(folder / 'last.pth.tar'))
    task.train()
    batches = [batch for batch, _ in zip(loaders.train, range(_DIAGNOSIS_BATCHES))]
    precision = str(next(student.parameters()).dtype).removeprefix('torch.')
    return [dict(row, precision=precision) for row in term_gradients(task, batches)]


def diagnose_all(output: Path, modes: Sequence[str], results: Path) -> None:
    """Write the gradients of the first seed of every mode with added losses, at its start and its end."""
    rows, seen = [], set()
    for run, _, folder in finished_runs(output):
        if run.phase != 'primary' or run.variant not in modes or run.variant in ('none', 'teacher') or (
                run.variant, run.timesteps) in seen:
            continue
        seen.add((run.variant, run.timesteps))
        for when in ('start', 'end'):
            rows += [dict(run=f'{run.variant}, T={run.timesteps}, {when}', seed=run.seed, **row, device=device_name())
                     for row in diagnose(folder, when == 'start')]
    write_csv(results / GRADIENTS_CSV, rows)
    print('\n'.join(gradient_lines(read_csv(results / GRADIENTS_CSV))))
