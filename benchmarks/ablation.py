#!/usr/bin/env python3
"""The paper's ablation (Table 3): baseline, distillation, contrastive and SSCL on one data set, net and teacher.

    python benchmarks/ablation.py --data-dir CIFAR100 --output DIR --phase select    # defaults, on held-out images
    python benchmarks/ablation.py --data-dir CIFAR100 --output DIR --phase primary   # the comparison
    python benchmarks/ablation.py --output DIR --phase diagnose                      # gradients of the terms
    python benchmarks/ablation.py --report                                           # figure, table, README

Every run is a train.py of its own in a folder of its own. Started again, the script skips what is done and resumes what
was cut off; two of them on one --output share the work. CIFAR100 is a folder of images: train/CLASS, validation/CLASS.
"""
import argparse
import csv
import fcntl
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections import Counter, OrderedDict
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / 'benchmarks' / 'results'
RUNS_CSV, LAYERS_CSV, GRADIENTS_CSV = 'ablation_runs.csv', 'ablation_layers.csv', 'ablation_gradients.csv'
FIGURE = 'ablation.png'
README = ROOT / 'README.md'
BEGIN, END = '<!-- results: written by benchmarks/ablation.py -->', '<!-- end of results -->'
NEXT_SECTION = '## Options that matter'

HELD_OUT = 0.1  # of the training set, for the selection of defaults
SPLIT_SEED = 0

# Table 3 of the paper: CIFAR-100, ResNet20, top-1 % by T
PAPER = {
    'none': {2: 68.27, 4: 71.45}, 'kd': {2: 68.74, 4: 71.72}, 'contrastive': {2: 69.25, 4: 72.16},
    'sscl': {2: 69.81, 4: 72.86},
}


class Scale(NamedTuple):
    """A size at which the ablation can be run."""
    description: str
    classes: Optional[int]  # evenly spaced ones; None takes all
    images_per_class: Optional[int]  # for training
    width: int
    recipe: Dict[str, Any]  # of students and teacher
    student: Dict[str, Any]
    teacher: Dict[str, Any]


SCALES = {
    'small': Scale(
        'what two cores do', 20, 250, 16,
        dict(img_size=32, batch_size=100, sched_on_updates=True, warmup_epochs=1, scale=(0.6, 1.), ratio=(0.9, 1.1),
             color_jitter=0., smoothing=0., train_interpolation='bicubic', workers=0, checkpoint_hist=1,
             log_interval=25),
        dict(epochs=8, opt='adamw', lr=2e-3, weight_decay=0.02),
        dict(epochs=40, opt='sgd', lr=0.1, weight_decay=5e-4)),
    'paper': Scale(
        'the full recipe: all images, full width, 400 epochs', None, None, 64,
        dict(img_size=32, batch_size=128, opt='sgd', lr=0.1, weight_decay=1e-4, warmup_epochs=0, scale=(0.6, 1.),
             ratio=(0.9, 1.1), color_jitter=0., smoothing=0., aa='original', reprob=0.25,
             train_interpolation='bicubic', checkpoint_hist=1, log_interval=100),
        dict(epochs=400), dict(epochs=400)),
}

# settings of the loss before anything was selected; --base changes them for the selection
BASE = dict(critic='infonce', weight=0.1, temperature=0.1, cka_floor=0.1, cka_momentum=0.1, projection='pooled',
            weighting='cka')

KD_STEP_WEIGHT = 0.2  # TWSNN's

# what is tried from the base, one coordinate at a time; critic and weight together
COORDINATES: Dict[str, List[Dict[str, Any]]] = OrderedDict(
    critic=[dict(critic=c, weight=w) for c in ('normalized', 'infonce', 'literal') for w in (0.03, 0.1, 0.3, 1.)],
    temperature=[dict(temperature=t) for t in (0.07, 0.1, 0.2, 0.5)],
    cka_floor=[dict(cka_floor=f) for f in (0.05, 0.1, 0.3)],
    cka_momentum=[dict(cka_momentum=m) for m in (0.1, 1.)],
    projection=[dict(projection=p) for p in ('pooled', 'flattened')],
    weighting=[dict(weighting=w) for w in ('cka', 'cka_mean1', 'uniform_matched', 'uniform')],
)


class Run(NamedTuple):
    """One training: what sets it apart from the others of its phase."""
    phase: str
    variant: str
    seed: int
    timesteps: int  # 0: the teacher
    options: Dict[str, Any]  # of train.py, by name

    @property
    def name(self) -> str:
        return f'{self.phase}-{self.variant}-T{self.timesteps}-s{self.seed}'


# ---- what is run

def sscl_options(**settings: Any) -> Dict[str, Any]:
    """Options of train.py for settings of the contrastive loss."""
    return {f'sscl_{name}': value for name, value in settings.items()}


def setting_name(settings: Mapping[str, Any]) -> str:
    """'infonce-w0.1-t0.1-f0.1-m0.1-pooled-cka' for a whole set of settings."""
    return '{critic}-w{weight:g}-t{temperature:g}-f{cka_floor:g}-m{cka_momentum:g}-{projection}-{weighting}'.format(
        **settings)


def select_runs(
        base: Mapping[str, Any],
        coordinates: Sequence[str],
        seeds: Sequence[int],
        timesteps: Sequence[int],
) -> List[Run]:
    """sscl with every value of these coordinates, the others as in base; the base itself and cross-entropy beside it."""
    options = OrderedDict()
    options['none'] = dict(distill='none')
    for changes in [{}, *(c for name in coordinates for c in COORDINATES[name])]:
        settings = {**base, **changes}
        options[setting_name(settings)] = dict(distill='sscl', **sscl_options(**settings))
    return [Run('select', variant, seed, t, o) for t in timesteps for seed in seeds for variant, o in options.items()]


def primary_variants(chosen: Mapping[str, Any]) -> Dict[str, Dict[str, Any]]:
    """Modes of Table 3 and what stands beside them, at the chosen settings."""
    sscl = dict(distill='sscl', **sscl_options(**chosen))
    contrastive = {name: value for name, value in sscl.items() if name != 'sscl_weighting'}
    return OrderedDict(
        none=dict(distill='none'), sscl=sscl, kd=dict(distill='kd'),
        contrastive=dict(contrastive, distill='contrastive'),
        contrastive_matched=dict(sscl, sscl_weighting='uniform_matched'),
        sscl_kd_step={**{k: v for k, v in sscl.items() if k not in ('distill', 'sscl_weight')},
                      'loss': f'sscl={chosen["weight"]:g},kd_step={KD_STEP_WEIGHT:g}'})


def primary_runs(
        chosen: Mapping[str, Any],
        modes: Sequence[str],
        seeds: Sequence[int],
        timesteps: Sequence[int],
) -> List[Run]:
    """Modes by seeds by T, seed after seed, so that what is done at any time is paired."""
    variants = primary_variants(chosen)
    unknown = [mode for mode in modes if mode not in variants]
    if unknown:
        raise SystemExit(f"--modes: unknown '{unknown[0]}'; there are {', '.join(variants)}.")
    return [Run('primary', mode, seed, t, variants[mode]) for t in timesteps for seed in seeds for mode in modes]


def teacher_run(phase: str) -> Run:
    return Run(phase, 'teacher', 0, 0, dict(distill='none'))


def command(run: Run, scale: Scale, data: Path, folder: Path, threads: Optional[int], teacher: Optional[Path]) -> List[str]:
    """Arguments of train.py for a run from its start."""
    is_teacher = run.timesteps == 0
    options = {**scale.recipe, **(scale.teacher if is_teacher else scale.student), **run.options}
    options.update(
        data_dir=data, model_kwargs=f'width={scale.width}', seed=run.seed, output=folder.parent, experiment=folder.name,
        model='resnet20_cifar' if is_teacher else 'spiking_resnet20_cifar')
    if threads is not None:
        options['threads'] = threads
    if not is_teacher:
        options.update(timesteps=run.timesteps, teacher_checkpoint=teacher)
    words = []
    for name, value in options.items():
        values = [] if value is True else value if isinstance(value, (list, tuple)) else [value]
        words += [f'--{name.replace("_", "-")}', *map(str, values)]
    return words


# ---- data

def class_names(folder: Path, count: Optional[int]) -> List[str]:
    """Evenly spaced ones of the sorted class names."""
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if count is None or count >= len(names):
        return names
    return [names[i * len(names) // count] for i in range(count)]


def split_class(files: Sequence[str], held_out: bool, count: Optional[int], seed: int) -> Tuple[List[str], List[str]]:
    """(training files, held-out files) of one class; a tenth is held out, or nothing."""
    order = np.random.RandomState(seed).permutation(len(files))
    shuffled = [sorted(files)[i] for i in order]
    n = round(HELD_OUT * len(files)) if held_out else 0
    return shuffled[n:][:count], shuffled[:n]


def link_data(data_dir: Path, folder: Path, scale: Scale, phase: str) -> Path:
    """Image folder of symbolic links for a phase: the selection validates on held-out training images."""
    target = folder / phase
    for name in class_names(data_dir / 'train', scale.classes):
        files = [f.name for f in (data_dir / 'train' / name).iterdir()]
        train, held = split_class(files, phase == 'select', scale.images_per_class, SPLIT_SEED)
        _link(data_dir / 'train' / name, target / 'train' / name, train)
        if phase == 'select':
            _link(data_dir / 'train' / name, target / 'validation' / name, held)
        else:
            validation = data_dir / 'validation' / name
            _link(validation, target / 'validation' / name, [f.name for f in validation.iterdir()])
    return target


def _link(source: Path, target: Path, names: Sequence[str]) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        link = target / name
        if not link.is_symlink():
            link.symlink_to((source / name).resolve())


# ---- running

def is_done(folder: Path) -> bool:
    return (folder / 'summary.json').is_file() and (folder / 'summary.csv').is_file()


def start_arguments(folder: Path, arguments: Sequence[str]) -> List[str]:
    """What train.py is started with: the run's arguments, or --resume where it left a checkpoint."""
    if (folder / 'last.pth.tar').is_file() and (folder / 'args.yaml').is_file():
        return ['--resume', str(folder)]
    if folder.exists():
        shutil.rmtree(folder)  # cut off before its first checkpoint
    return list(arguments)


class Runner:
    """Runs trainings, some at a time, each in a process of its own that holds the run's lock file.

    Args:
        output: Root of all runs.
        parallel: How many run at a time.
        deadline: time.time() by which the last one is to be done; None for no limit.
        revision: Code revision to note.
        train: Command that starts a training.
        max_load: Start nothing while the machine's load (1 minute) is not below this.
    """

    def __init__(
            self,
            output: Path,
            parallel: int,
            deadline: Optional[float],
            revision: str,
            train: Sequence[str],
            max_load: float = math.inf,
    ):
        self.output, self.parallel, self.deadline, self.revision = output, parallel, deadline, revision
        self.max_load = max_load
        self.train = list(train)
        self.seconds: List[Tuple[int, float]] = []  # timesteps and seconds of what this process ran

    def folder(self, run: Run) -> Path:
        return self.output / 'runs' / run.name

    def estimate(self, run: Run) -> Optional[float]:
        """Seconds that a run takes, from the finished ones, in proportion to T; None before the first."""
        known = self.seconds or [
            (run.timesteps, json.loads((folder / 'summary.json').read_text())['seconds'])
            for run, _, folder in finished_runs(self.output)]
        known = [(t, s) for t, s in known if t > 0]
        if run.timesteps == 0 or not known:
            return None
        return float(np.mean([s / t for t, s in known])) * run.timesteps

    def show_plan(self, runs: Sequence[Run]) -> None:
        """All runs, and when they will be done."""
        left = [run for run in runs if not is_done(self.folder(run))]
        print(f'{len(runs)} runs, {len(runs) - len(left)} of them done; {self.parallel} at a time:')
        for run in runs:
            folder = self.folder(run)
            state = 'done' if is_done(folder) else 'resumes' if (folder / 'last.pth.tar').is_file() else 'new'
            print(f'  {state:<8} {run.name}')
        print(f'ETA {self._eta(left)}', flush=True)

    def _eta(self, left: Sequence[Run]) -> str:
        seconds = [self.estimate(run) for run in left]
        if not left:
            return '0:00:00'
        if None in seconds:
            return 'unknown before the first run is done'
        return str(timedelta(seconds=round(sum(seconds) / self.parallel)))

    def __call__(self, runs: Sequence[Run], arguments: Mapping[str, Sequence[str]]) -> None:
        """Run what is not done, in this order.

        Args:
            runs: The runs.
            arguments: Of train.py, by the name of the run.

        Raises:
            SystemExit: A training failed; its log is named.
        """
        waiting = [run for run in runs if not is_done(self.folder(run))]
        active: List[Tuple[Run, subprocess.Popen, float]] = []
        try:
            while waiting or active:
                while waiting and len(active) < self.parallel and os.getloadavg()[0] < self.max_load:
                    started = self._start(waiting.pop(0), arguments, len(waiting))
                    active += [started] if started else []
                if waiting or active:
                    time.sleep(0.5)
                for item in [item for item in active if item[1].poll() is not None]:
                    active.remove(item)
                    self._finish(*item, waiting)
        finally:
            for _, process, _ in active:
                process.terminate()

    def _start(self, run: Run, arguments: Mapping[str, Sequence[str]], left: int):
        folder = self.folder(run)
        estimate = self.estimate(run)
        if self.deadline is not None and time.time() + (estimate or 0) > self.deadline:
            print(f'{run.name}: not started, it would not be done by the deadline.', flush=True)
            return None
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = open(folder.parent / f'{folder.name}.lock', 'w')
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f'{run.name}: another process runs it.', flush=True)
            return None
        if is_done(folder):  # by another process, meanwhile
            return None
        words = start_arguments(folder, arguments[run.name])
        facts = {**run._asdict(), 'revision': self.revision}
        (folder.parent / f'{folder.name}.json').write_text(json.dumps(facts, indent=1) + '\n')
        with open(folder.parent / f'{folder.name}.log', 'a') as log:
            # the child inherits the lock: it holds as long as the training lives, whatever becomes of this process
            process = subprocess.Popen([*self.train, *words], stdout=log, stderr=log, pass_fds=[lock.fileno()])
        lock.close()
        print(f'{datetime.now():%H:%M:%S} {run.name}: started{" again" if words[0] == "--resume" else ""}, '
              f'{left} behind it', flush=True)
        return run, process, time.time()

    def _finish(self, run: Run, process: subprocess.Popen, started: float, waiting: Sequence[Run]) -> None:
        folder = self.folder(run)
        if process.returncode or not is_done(folder):
            raise SystemExit(f'{run.name}: train.py failed; see {folder.parent / (folder.name + ".log")}')
        summary = json.loads((folder / 'summary.json').read_text())
        self.seconds.append((run.timesteps, time.time() - started))
        print(f'{datetime.now():%H:%M:%S} {run.name}: {summary["student"]["top1"]:.2f} top-1 after '
              f'{time.time() - started:.0f} s; ETA {self._eta(waiting)}', flush=True)


def finished_runs(output: Path) -> Iterator[Tuple[Run, str, Path]]:
    """(run, code revision, folder) of all that is done."""
    for file in sorted((output / 'runs').glob('*.json')):
        folder = file.with_suffix('')
        if is_done(folder):
            facts = json.loads(file.read_text())
            yield Run(*(facts[field] for field in Run._fields)), facts['revision'], folder


def code_revision() -> str:
    """git's name of the code that runs."""
    result = subprocess.run(['git', 'describe', '--always', '--dirty'], cwd=ROOT, capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else 'unknown'


# ---- results

_LAYER_KEYS = ('cka', 'cka_running', 'weight', 'nce', 'mi_bound')


def collect(output: Path, scale: str) -> Tuple[List[Dict[str, Any]], List[Dict[str, Any]]]:
    """(a row per run, a row per run, epoch and layer) of all finished runs."""
    runs, layers = [], []
    for run, revision, folder in finished_runs(output):
        summary = json.loads((folder / 'summary.json').read_text())
        with open(folder / 'summary.csv') as epochs_file:
            epochs = list(csv.DictReader(epochs_file))
        runs.append(run_row(run, scale, summary, epochs, revision))
        layers += layer_rows(run, epochs)
    return runs, layers


def run_row(
        run: Run,
        scale: str,
        summary: Mapping[str, Any],
        epochs: Sequence[Mapping[str, str]],
        revision: str,
) -> Dict[str, Any]:
    """One line of the results: what was run, and what came out after the last epoch (and at the best, labelled)."""
    rates = list(summary['firing_rates'].values())
    return dict(
        scale=scale, phase=run.phase, variant=run.variant, seed=run.seed, timesteps=run.timesteps, **run.options,
        epochs=len(epochs), top1_last=round(summary['student']['top1'], 2), top1_best=round(summary['best']['top1'], 2),
        best_epoch=summary['best']['epoch'] + 1, train_loss=round(float(epochs[-1]['train_loss']), 4),
        train_task_loss=_number(epochs[-1].get('train_task_loss')), val_loss=round(summary['student']['loss'], 4),
        teacher_top1=round(summary['teacher']['top1'], 2) if summary['teacher'] else None,
        firing_rate=round(float(np.mean(rates)), 4) if rates else None, seconds=summary['seconds'], revision=revision)


def _number(text: Optional[str]) -> Optional[float]:
    return None if text in (None, '') else round(float(text), 4)


def layer_rows(run: Run, epochs: Sequence[Mapping[str, str]]) -> List[Dict[str, Any]]:
    """CKA, NCE, weight and MI bound per epoch and layer, as means over the epoch's training steps."""
    prefix = 'train_mi_bound_'
    rows = []
    for epoch in epochs:
        for layer in (name[len(prefix):] for name in epoch if name.startswith(prefix)):
            values = {key: _short(epoch.get(f'train_{key}_{layer}')) for key in _LAYER_KEYS}
            rows.append(dict(
                phase=run.phase, variant=run.variant, seed=run.seed, timesteps=run.timesteps,
                epoch=int(epoch['epoch']) + 1, layer=layer, **values))
    return rows


def _short(text: Optional[str]) -> Optional[str]:
    return None if text in (None, '') else f'{float(text):.4g}'


def write_csv(file: Path, rows: Sequence[Mapping[str, Any]], last: Sequence[str] = ()) -> None:
    """All keys of all rows as columns; these ones last."""
    columns = list(dict.fromkeys(key for row in rows for key in row if key not in last))
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, 'w', newline='') as out:
        writer = csv.DictWriter(out, [*columns, *last], lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)


def read_csv(file: Path) -> List[Dict[str, str]]:
    if not file.is_file():
        return []
    with open(file) as rows:
        return list(csv.DictReader(rows))


class Paired(NamedTuple):
    """Mean difference over pairs, and half the width of its 95 % interval (None with one pair)."""
    mean: float
    half: Optional[float]
    n: int


def paired_interval(a: Mapping[int, float], b: Mapping[int, float]) -> Optional[Paired]:
    """a - b over the seeds that both have: mean and 95 % interval by the t distribution.

    Args:
        a: Value by seed.
        b: Value by seed.

    Returns:
        None where no seed is common.
    """
    differences = np.array([a[seed] - b[seed] for seed in a if seed in b])
    n = len(differences)
    if n == 0:
        return None
    half = None
    if n > 1:
        half = float(stats.t.ppf(0.975, n - 1) * differences.std(ddof=1) / math.sqrt(n))
    return Paired(float(differences.mean()), half, n)


def by_seed(rows: Sequence[Mapping[str, str]], phase: str, variant: str, timesteps: int) -> Dict[int, float]:
    return {int(row['seed']): float(row['top1_last']) for row in rows
            if (row['phase'], row['variant'], int(row['timesteps'])) == (phase, variant, timesteps)}


# ---- diagnosis

_DIAGNOSIS_BATCHES = 4


def stage_of(parameter: str) -> str:
    """'stem', 'layer1', ..., 'fc' for a parameter of the student."""
    first = parameter.split('.')[0]
    return 'stem' if first in ('conv1', 'bn1', 'act1') else first


def term_gradients(task: Any, batches: Sequence[Tuple[Any, Any]]) -> List[Dict[str, Any]]:
    """Gradient of what is added to cross-entropy (weighted, as trained) beside cross-entropy's own, by stage.

    Args:
        task: An SSCLTask in training mode.
        batches: (images, labels).

    Returns:
        Per stage the two norms, their ratio and cosine, the means over the batches.
    """
    import torch
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
    return [dict(stage=stage, **{k: round(v / len(batches), 5) for k, v in total.items()}) for stage, total in sums.items()]


def diagnose(folder: Path, at_start: bool) -> List[Dict[str, Any]]:
    """term_gradients of a finished run, with its last weights or, rebuilt, with those that it started from."""
    sys.path.insert(0, str(ROOT))  # train.py is a script beside this folder
    import train
    from timm.data import resolve_data_config
    from timm.utils import random_seed
    from timm_sscl.options import parse_args
    args, _ = parse_args(['--config', str(folder / 'args.yaml')])
    accelerator = train.create_accelerator(args)
    train.set_threads(args, accelerator)
    random_seed(args.seed, 0)
    datasets = train.create_datasets(args)
    classes = train.resolve_num_classes(args, datasets[0])
    student = train.create_student(args, classes)
    data_config = resolve_data_config(vars(args), model=student)
    teacher, teacher_input = train.create_teacher(args, classes, data_config)
    train.load_weights(teacher, args.teacher_checkpoint, '--teacher-checkpoint')
    loaders = train.create_loaders(args, datasets, data_config, classes)
    task = train.create_task(args, student, teacher, teacher_input, data_config, accelerator.device, False)
    if at_start:
        train.prepare_neurons(args, accelerator, student, loaders.train, resumed=False)
    else:
        train.restore(task, str(folder / 'last.pth.tar'))
    task.train()
    batches = [batch for batch, _ in zip(loaders.train, range(_DIAGNOSIS_BATCHES))]
    return term_gradients(task, batches)


def diagnose_all(output: Path, modes: Sequence[str]) -> None:
    """Gradients of the first seed of every mode that adds something to cross-entropy, at its start and its end."""
    rows, seen = [], set()
    for run, _, folder in finished_runs(output):
        if run.phase != 'primary' or run.variant not in modes or run.variant in ('none', 'teacher') or (
                run.variant, run.timesteps) in seen:
            continue
        seen.add((run.variant, run.timesteps))
        for when in ('start', 'end'):
            rows += [dict(run=f'{run.variant}, T={run.timesteps}, {when}', seed=run.seed, **row)
                     for row in diagnose(folder, when == 'start')]
    write_csv(RESULTS / GRADIENTS_CSV, rows)
    print('\n'.join(gradient_lines(read_csv(RESULTS / GRADIENTS_CSV))))


# ---- report

LABELS = OrderedDict(
    none='baseline (cross-entropy)', kd='distillation (logits)', contrastive='contrastive, uniform weights',
    contrastive_matched="contrastive, uniform at SSCL's total weight", sscl='SSCL', sscl_kd_step='SSCL + KL per step')


def comparison(rows: Sequence[Mapping[str, str]], timesteps: int) -> List[Dict[str, Any]]:
    """A row per mode of the primary comparison: accuracy, paired difference to the baseline, the paper's."""
    base = by_seed(rows, 'primary', 'none', timesteps)
    table = []
    for mode, label in LABELS.items():
        values = by_seed(rows, 'primary', mode, timesteps)
        if not values:
            continue
        best = [float(r['top1_best']) for r in rows if (r['phase'], r['variant'], r['timesteps']) == (
            'primary', mode, str(timesteps))]
        paper = PAPER.get(mode, {}).get(timesteps)
        table.append(dict(
            mode=mode, label=label, seeds=len(values), top1=float(np.mean(list(values.values()))), best=float(np.mean(best)),
            spread=float(np.std(list(values.values()), ddof=1)) if len(values) > 1 else None,
            difference=None if mode == 'none' else paired_interval(values, base), paper=paper,
            paper_difference=None if paper is None or mode == 'none' else paper - PAPER['none'][timesteps]))
    return table


def _paired_text(paired: Optional[Paired]) -> str:
    if paired is None:
        return ''
    return f'{paired.mean:+.2f}' + (f' ± {paired.half:.2f}' if paired.half is not None else ' (one seed)')


def _signed(value: Optional[float]) -> str:
    return '' if value is None else f'{value:+.2f}'


def comparison_lines(rows: Sequence[Mapping[str, str]], timesteps: int) -> List[str]:
    """The comparison as a Markdown table."""
    lines = ['| mode | seeds | top-1, last epoch | best epoch | difference to the baseline (95 %) | paper | paper, difference |',
             '|---|---|---|---|---|---|---|']
    for r in comparison(rows, timesteps):
        paper = '' if r['paper'] is None else f'{r["paper"]:.2f}'
        lines.append(f'| {r["label"]} | {r["seeds"]} | {r["top1"]:.2f} | {r["best"]:.2f} | {_paired_text(r["difference"])} | '
                     f'{paper} | {_signed(r["paper_difference"])} |')
    return lines


def pair_lines(rows: Sequence[Mapping[str, str]], timesteps: int) -> List[str]:
    """SSCL against what shares its total weight, and against distillation, paired."""
    sscl = by_seed(rows, 'primary', 'sscl', timesteps)
    parts = []
    for mode in ('kd', 'contrastive', 'contrastive_matched', 'sscl_kd_step'):
        paired = paired_interval(sscl, by_seed(rows, 'primary', mode, timesteps))
        if paired is not None:
            parts.append(f'{LABELS[mode]} {_paired_text(paired)} ({paired.n} seeds)')
    return [f'SSCL minus, T={timesteps}: ' + '; '.join(parts) + '.'] if parts else []


_SETTINGS = ('critic', 'weight', 'temperature', 'cka_floor', 'cka_momentum', 'projection', 'weighting')


def selection_lines(rows: Sequence[Mapping[str, str]]) -> List[str]:
    """Every configuration that was tried on the held-out images, with the difference to cross-entropy."""
    rows = [r for r in rows if r['phase'] == 'select' and r['variant'] != 'teacher']
    base = by_seed(rows, 'select', 'none', 2)
    lines = ['| ' + ' | '.join(name.replace('_', ' ') for name in _SETTINGS) + ' | top-1, by seed | difference |',
             '|---' * (len(_SETTINGS) + 2) + '|']
    for variant in dict.fromkeys(r['variant'] for r in rows):
        values = by_seed(rows, 'select', variant, 2)
        first = next(r for r in rows if r['variant'] == variant)
        cells = ['cross-entropy alone', *[''] * (len(_SETTINGS) - 1)] if variant == 'none' else [
            first.get(f'sscl_{name}', '') for name in _SETTINGS]
        accuracy = ', '.join(f'{values[seed]:.1f}' for seed in sorted(values))
        paired = paired_interval(values, base)
        difference = '' if variant == 'none' or paired is None else f'{paired.mean:+.1f}'
        lines.append('| ' + ' | '.join([*cells, accuracy, difference]) + ' |')
    return lines


def gradient_lines(rows: Sequence[Mapping[str, str]]) -> List[str]:
    """Norm of the contrastive terms' gradient over cross-entropy's, by checkpoint and stage."""
    stages = list(dict.fromkeys(r['stage'] for r in rows))
    lines = ['| checkpoint | ' + ' | '.join(stages) + ' |', '|---' * (len(stages) + 1) + '|']
    for run in dict.fromkeys(r['run'] for r in rows):
        cells = []
        for stage in stages:
            row = next((r for r in rows if (r['run'], r['stage']) == (run, stage)), None)
            cells.append('' if row is None else f'{float(row["ratio"]):.2f} ({float(row["cosine"]):+.2f})')
        lines.append(f'| {run} | ' + ' | '.join(cells) + ' |')
    return lines


def readme_lines(rows: Sequence[Mapping[str, str]], gradients: Sequence[Mapping[str, str]]) -> List[str]:
    """README's results section."""
    primary = [r for r in rows if r['phase'] == 'primary']
    scale = SCALES[rows[0]['scale']]
    teachers = {r['phase']: float(r['top1_last']) for r in rows if r['variant'] == 'teacher'}
    what = 'all' if scale.classes is None else f'{scale.classes} of 100'
    count = 'all their' if scale.images_per_class is None else f'{scale.images_per_class} of 500'
    lines = [
        BEGIN, '## Results', '',
        f'The ablation of the paper\'s Table 3 at a scale that two CPU cores carry: real CIFAR-100, {what} classes, {count} '
        f'training images per class, `resnet20_cifar` at width {scale.width}, {scale.student["epochs"]} epochs (the paper: '
        'all classes and images, width 64, 400 epochs). The teacher is the ANN of the same width, trained '
        f'for {scale.teacher["epochs"]} epochs on the same images: {teachers.get("primary", float("nan")):.2f} top-1; all '
        'runs share it. **Nothing here reproduces the paper\'s numbers**: they stand beside ours so that the order '
        'and the size of the differences can be compared.', '']
    for timesteps in sorted({int(r['timesteps']) for r in primary if int(r['timesteps'])}):
        lines += [f'T = {timesteps}, validation set ({_validation_images(scale)} images):', '',
                  *comparison_lines(rows, timesteps), '', *pair_lines(rows, timesteps), '']
    lines += [
        'Differences are paired by seed; ± is the half width of the 95 % interval (t distribution). "Best epoch" is what '
        'public code of this line reports; it is chosen on the validation set.', '',
        f'![Accuracy by mode, CKA and NCE per layer](benchmarks/results/{FIGURE})', '',
        'Defaults were chosen before, on a tenth of the training set held out (1,000 images, so that one run is about '
        f'± 1.5 points; teacher {teachers.get("select", float("nan")):.2f} there). Every configuration tried, sscl, T = 2:', '',
        *selection_lines(rows), '']
    if gradients:
        lines += ['Gradient of the contrastive term over that of cross-entropy, norms by stage, with the cosine between the '
                  'two (`--phase diagnose`):', '', *gradient_lines(gradients), '']
    return [*lines, '```bash', 'python benchmarks/ablation.py --data-dir CIFAR100 --output output/ablation --phase select',
            'python benchmarks/ablation.py --data-dir CIFAR100 --output output/ablation --phase primary',
            'python benchmarks/ablation.py --report  # figure, tables and this section from benchmarks/results/ablation_*.csv',
            '```', '', END]


def _validation_images(scale: Scale) -> str:
    return f'{100 * (scale.classes or 100):,}'


def write_readme(lines: Sequence[str], file: Path = README) -> None:
    """Put the section between its markers, or, the first time, before NEXT_SECTION."""
    text = file.read_text()
    section = '\n'.join(lines)
    if BEGIN in text:
        before, rest = text.split(BEGIN)
        text = before + section + rest.split(END)[1]
    else:
        before, rest = text.split(NEXT_SECTION)
        text = before + section + '\n\n' + NEXT_SECTION + rest
    file.write_text(text)


COLORS = dict(none='#7f7f7f', kd='#1f77b4', contrastive='#ff7f0e', contrastive_matched='#8c564b', sscl='#d62728',
              sscl_kd_step='#9467bd')


def draw(rows: Sequence[Mapping[str, str]], layers: Sequence[Mapping[str, str]], file: Path) -> None:
    """Accuracy by mode with error bars, the paper's beside it; CKA and NCE per layer over the epochs of sscl at T=2."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), gridspec_kw=dict(width_ratios=(1.5, 1, 1)))
    _draw_accuracy(axes[0], rows)
    for axis, key, label in ((axes[1], 'cka_running', 'CKA, student and teacher'),
                             (axes[2], 'nce', 'contrastive loss $-L_{NCE}$ (nats)')):
        _draw_layers(axis, layers, key)
        axis.set(xlabel='epoch', ylabel=label, title='SSCL, T = 2')
        axis.grid(alpha=.3)
    axes[2].legend(title='layer', fontsize=8, title_fontsize=8)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)
    plt.close(figure)


def _draw_accuracy(axis: Any, rows: Sequence[Mapping[str, str]]) -> None:
    """Difference to the baseline, paired, per mode and T; the paper's as open circles."""
    modes = [mode for mode in LABELS if mode != 'none']
    marks = {2: 'o', 4: 's'}
    for t, offset in ((2, -.12), (4, .12)):
        table = {r['mode']: r for r in comparison(rows, t)}
        if 'none' not in table:
            continue
        for i, mode in enumerate(modes):
            row = table.get(mode)
            if row is None or row['difference'] is None:
                continue
            paired = row['difference']
            axis.errorbar(i + offset, paired.mean, yerr=paired.half, fmt=marks[t], color=COLORS[mode], capsize=4,
                          label=None)
            axis.annotate(f'{row["top1"]:.1f}', (i + offset, paired.mean), xytext=(7, 0), textcoords='offset points',
                          fontsize=8, va='center')
            if row['paper_difference'] is not None:
                axis.plot(i + offset, row['paper_difference'], marks[t], mfc='none', mec='black', ms=8)
    axis.axhline(0, color=COLORS['none'], lw=1)
    axis.set_xticks(range(len(modes)), [_short_label(mode) for mode in modes], fontsize=8)
    axis.set_xlim(-.6, len(modes) - .4)
    axis.set_ylabel('top-1 minus the baseline (points)')
    base = ', '.join(f'{r["top1"]:.1f} at T = {t}' for t in (2, 4) for r in comparison(rows, t) if r['mode'] == 'none')
    axis.set_title(f'baseline: {base}', fontsize=10)
    for t, mark in marks.items():
        axis.plot([], [], mark, color='#555555', label=f'here, T = {t}, 95 % interval')
        axis.plot([], [], mark, mfc='none', mec='black', label=f'paper, T = {t} (full scale)')
    axis.legend(fontsize=8)
    axis.grid(axis='y', alpha=.3)


def _short_label(mode: str) -> str:
    return {'kd': 'distillation', 'contrastive': 'contrastive,\nuniform',
            'contrastive_matched': "uniform at\nSSCL's total", 'sscl': 'SSCL', 'sscl_kd_step': 'SSCL +\nKL per step'}[mode]


def _draw_layers(axis: Any, layers: Sequence[Mapping[str, str]], key: str) -> None:
    """One line per layer: the mean over the seeds of the primary sscl runs."""
    chosen = [r for r in layers if (r['phase'], r['variant'], r['timesteps']) == ('primary', 'sscl', '2') and r[key]]
    for layer in dict.fromkeys(r['layer'] for r in chosen):
        epochs = sorted({int(r['epoch']) for r in chosen})
        means = [np.mean([float(r[key]) for r in chosen if r['layer'] == layer and int(r['epoch']) == e]) for e in epochs]
        axis.plot(epochs, means, marker='.', label=layer)


def report() -> None:
    rows, layers = read_csv(RESULTS / RUNS_CSV), read_csv(RESULTS / LAYERS_CSV)
    if not rows:
        raise SystemExit(f'{RESULTS / RUNS_CSV} is missing: run the ablation first.')
    draw(rows, layers, RESULTS / FIGURE)
    lines = readme_lines(rows, read_csv(RESULTS / GRADIENTS_CSV))
    write_readme(lines)
    print('\n'.join(lines))


# ---- the script

def parse_setting(text: str) -> Tuple[str, Any]:
    """'weight=0.3' as a setting of the loss."""
    name, _, value = text.partition('=')
    try:
        return name, float(value)
    except ValueError:
        return name, value


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data-dir', type=Path, help='image folder of CIFAR-100: train/CLASS and validation/CLASS')
    parser.add_argument('--output', type=Path, help='root of all runs')
    parser.add_argument('--scale', default='small', choices=list(SCALES),
                        help='; '.join(f'{name}: {scale.description}' for name, scale in SCALES.items()))
    parser.add_argument('--phase', default='all', choices=['select', 'primary', 'all', 'diagnose'],
                        help='choose settings on held-out training images, compare the modes, or both; diagnose: '
                             'gradients of the terms in finished runs')
    parser.add_argument('--modes', nargs='+', default=list(primary_variants(BASE)), metavar='MODE', help='of the comparison')
    parser.add_argument('--seeds', type=int, nargs='+', default=[1, 2, 3, 4, 5])
    parser.add_argument('--timesteps', '-T', type=int, nargs='+', default=[2])
    parser.add_argument('--coordinates', nargs='*', default=list(COORDINATES), metavar='NAME', choices=list(COORDINATES),
                        help='what the selection tries: ' + ', '.join(COORDINATES))
    parser.add_argument('--base', nargs='*', default=[], type=parse_setting, metavar='NAME=VALUE',
                        help='settings of the loss that differ from '
                             + ' '.join(f'{name}={value}' for name, value in BASE.items()))
    parser.add_argument('--workers-parallel', type=int, default=1, metavar='N', help='trainings at a time')
    parser.add_argument('--max-load', type=float, default=math.inf, metavar='L',
                        help="start a training only while the machine's load is below this: to run beside other work")
    parser.add_argument('--threads', type=int, default=None, help='CPU threads of a training')
    parser.add_argument('--deadline', type=float, default=None, metavar='MINUTES',
                        help='start nothing that would not be done in this time')
    parser.add_argument('--revision', default=None, help="code revision to note (git's)")
    parser.add_argument('--report', action='store_true', help='no training: figure, tables and README from the results (--output: of these runs)')
    return parser


def run_phase(args: argparse.Namespace, phase: str, base: Mapping[str, Any], deadline: Optional[float]) -> None:
    scale = SCALES[args.scale]
    data = link_data(args.data_dir, args.output / 'data', scale, phase)
    runner = Runner(args.output, args.workers_parallel, deadline, args.revision or code_revision(),
                    [sys.executable, str(ROOT / 'train.py')], args.max_load)
    if phase == 'select':
        runs = select_runs(base, args.coordinates, args.seeds, args.timesteps)
    else:
        runs = primary_runs(base, args.modes, args.seeds, args.timesteps)
    teacher = teacher_run(phase)
    weights = runner.folder(teacher) / 'last.pth.tar'
    arguments = {run.name: command(run, scale, data, runner.folder(run), args.threads, weights)
                 for run in [teacher, *runs]}
    runner.show_plan([teacher, *runs])
    runner([teacher], arguments)
    if is_done(runner.folder(teacher)):
        runner(runs, arguments)


def main() -> None:
    """Train what the options ask for, or report."""
    parser = create_parser()
    args = parser.parse_args()
    if args.report:
        if args.output is not None:
            write_results(args.output, args.scale)
        return report()
    if args.phase == 'diagnose' and args.output is not None:
        return diagnose_all(args.output, args.modes)
    if args.data_dir is None or args.output is None:
        parser.error('--data-dir and --output are needed to train')
    deadline = None if args.deadline is None else time.time() + 60 * args.deadline
    for phase in ('select', 'primary') if args.phase == 'all' else (args.phase,):
        run_phase(args, phase, {**BASE, **dict(args.base)}, deadline)
    write_results(args.output, args.scale)


def write_results(output: Path, scale: str) -> None:
    runs, layers = collect(output, scale)
    outcome = ('epochs', 'top1_last', 'top1_best', 'best_epoch', 'train_loss', 'train_task_loss', 'val_loss',
               'teacher_top1', 'firing_rate', 'seconds', 'revision')
    write_csv(RESULTS / RUNS_CSV, runs, outcome)
    write_csv(RESULTS / LAYERS_CSV, layers)
    rows = read_csv(RESULTS / RUNS_CSV)
    for timesteps in sorted({run['timesteps'] for run in runs if run['phase'] == 'primary' and run['timesteps']}):
        print('\n'.join(['', f'T = {timesteps}', *comparison_lines(rows, timesteps), *pair_lines(rows, timesteps)]))
    if any(run['phase'] == 'select' for run in runs):
        print('\n'.join(['', *selection_lines(rows)]))


if __name__ == '__main__':
    main()
