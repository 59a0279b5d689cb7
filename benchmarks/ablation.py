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
        dict(img_size=32, batch_size=100, opt='sgd', lr=0.1, weight_decay=5e-4, sched_on_updates=True, warmup_epochs=1,
             scale=(0.6, 1.), ratio=(0.9, 1.1), color_jitter=0., smoothing=0., train_interpolation='bicubic', workers=0,
             checkpoint_hist=1, log_interval=25),
        dict(epochs=10), dict(epochs=40)),
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
        contrastive_matched=dict(sscl, sscl_weighting='uniform_matched'))


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
    """

    def __init__(self, output: Path, parallel: int, deadline: Optional[float], revision: str, train: Sequence[str]):
        self.output, self.parallel, self.deadline, self.revision = output, parallel, deadline, revision
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
                while waiting and len(active) < self.parallel:
                    started = self._start(waiting.pop(0), arguments, len(waiting))
                    active += [started] if started else []
                time.sleep(0.5 if active else 0)
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
    parser.add_argument('--phase', default='all', choices=['select', 'primary', 'all'],
                        help='choose settings on held-out training images, compare the modes, or both')
    parser.add_argument('--modes', nargs='+', default=list(primary_variants({})), metavar='MODE', help='of the comparison')
    parser.add_argument('--seeds', type=int, nargs='+', default=[1, 2, 3, 4, 5])
    parser.add_argument('--timesteps', '-T', type=int, nargs='+', default=[2])
    parser.add_argument('--coordinates', nargs='*', default=list(COORDINATES), metavar='NAME', choices=list(COORDINATES),
                        help='what the selection tries: ' + ', '.join(COORDINATES))
    parser.add_argument('--base', nargs='*', default=[], type=parse_setting, metavar='NAME=VALUE',
                        help='settings of the loss that differ from '
                             + ' '.join(f'{name}={value}' for name, value in BASE.items()))
    parser.add_argument('--workers-parallel', type=int, default=1, metavar='N', help='trainings at a time')
    parser.add_argument('--threads', type=int, default=None, help='CPU threads of a training')
    parser.add_argument('--deadline', type=float, default=None, metavar='MINUTES',
                        help='start nothing that would not be done in this time')
    parser.add_argument('--revision', default=None, help="code revision to note (git's)")
    parser.add_argument('--report', action='store_true', help='no training: figure, table and README from the results')
    return parser


def run_phase(args: argparse.Namespace, phase: str, base: Mapping[str, Any], deadline: Optional[float]) -> None:
    scale = SCALES[args.scale]
    data = link_data(args.data_dir, args.output / 'data', scale, phase)
    runner = Runner(args.output, args.workers_parallel, deadline, args.revision or code_revision(),
                    [sys.executable, str(ROOT / 'train.py')])
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
    parser = create_parser()
    args = parser.parse_args()
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


if __name__ == '__main__':
    main()
