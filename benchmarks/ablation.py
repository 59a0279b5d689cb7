#!/usr/bin/env python3
"""Run the paper's ablation (Table 3): baseline, distillation, contrastive and SSCL with one data set, network and
teacher.

    python benchmarks/ablation.py --data-dir CIFAR100 --output DIR --phase select    # settings, on held-out images
    python benchmarks/ablation.py --data-dir CIFAR100 --output DIR --phase primary   # the comparison
    python benchmarks/ablation.py --output DIR --phase diagnose                      # gradients of the terms
    python benchmarks/ablation.py --report                                           # figure and results page

The small scale trains in bfloat16 or float32, whichever is faster on this CPU; DIR/precision.json has the measurement.
Every run is a separate train.py in its own folder. When started again, the script skips finished runs and resumes
interrupted ones. Two instances with the same --output share the work. CIFAR100 is a folder of images: train/CLASS,
validation/CLASS.
"""
import argparse
import math
import os
import subprocess
import sys
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from ablation_gradients import diagnose_all
from ablation_results import PAGE, Facts, collect, comparison_lines, report, selection_lines, write_results
from ablation_runs import Run, Runner, is_done

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / 'benchmarks' / 'results'

HELD_OUT = 0.1  # fraction of the training set used to select the settings
SPLIT_SEED = 0


class Scale(NamedTuple):
    """A size at which the ablation can be run."""
    description: str
    classes: Optional[int]  # number of classes, evenly spaced; None takes all
    images_per_class: Optional[int]  # training images per class; None takes all
    width: int
    recipe: Dict[str, Any]  # options of students and teacher
    student: Dict[str, Any]
    teacher: Dict[str, Any]


SCALES = {
    'small': Scale(
        'what two cores do', 20, 250, 16,
        dict(img_size=32, batch_size=100, sched_on_updates=True, warmup_epochs=1, scale=(0.6, 1.), ratio=(0.9, 1.1),
             color_jitter=0., smoothing=0., train_interpolation='bicubic', workers=0, checkpoint_hist=1,
             log_interval=25),
        dict(epochs=8, opt='adamw', lr=2e-3, weight_decay=0.02, amp=True, amp_dtype='bfloat16'),
        dict(epochs=40, opt='sgd', lr=0.1, weight_decay=5e-4)),
    'paper': Scale(
        'the full recipe: all images, full width, 400 epochs', None, None, 64,
        dict(img_size=32, batch_size=128, opt='sgd', lr=0.1, weight_decay=1e-4, warmup_epochs=0, crop_padding=4,
             aa='cifar10', cutout=16, smoothing=0., train_interpolation='bicubic', checkpoint_hist=1, log_interval=100),
        dict(epochs=400), dict(epochs=400)),
}

# settings of the loss at which the selection starts
BASE = dict(critic='infonce', weight=0.1, temperature=0.1, cka_floor=0.1, cka_momentum=0.1, projection='pooled',
            weighting='cka')

# settings that the selection on held-out images chose, used in the comparison
CHOSEN = dict(BASE, temperature=0.2)

KD_STEP_WEIGHT = 0.2  # the value of TWSNN

# values tried from the base, one coordinate at a time; critic and weight vary together
COORDINATES: Dict[str, List[Dict[str, Any]]] = OrderedDict(
    critic=[dict(critic=c, weight=w) for c in ('normalized', 'infonce', 'literal') for w in (0.03, 0.1, 0.3, 1.)],
    temperature=[dict(temperature=t) for t in (0.07, 0.1, 0.2, 0.5)],
    cka_floor=[dict(cka_floor=f) for f in (0.05, 0.1, 0.3)],
    cka_momentum=[dict(cka_momentum=m) for m in (0.1, 1.)],
    projection=[dict(projection=p) for p in ('pooled', 'flattened')],
    weighting=[dict(weighting=w) for w in ('cka', 'cka_mean1', 'uniform_matched', 'uniform')],
    kd=[dict(kd_weight=w) for w in (0.1, 0.3, 1.)],  # distillation alone, independent of sscl's settings
)


# ---- runs

def sscl_options(**settings: Any) -> Dict[str, Any]:
    """Return train.py's options for settings of the contrastive loss."""
    return {f'sscl_{name}': value for name, value in settings.items()}


def setting_name(settings: Mapping[str, Any]) -> str:
    """Return a name for a complete set of settings: 'infonce-w0.1-t0.1-f0.1-m0.1-pooled-cka'."""
    return '{critic}-w{weight:g}-t{temperature:g}-f{cka_floor:g}-m{cka_momentum:g}-{projection}-{weighting}'.format(
        **settings)


def select_runs(
        base: Mapping[str, Any],
        coordinates: Sequence[str],
        seeds: Sequence[int],
        timesteps: Sequence[int],
) -> List[Run]:
    """Return the runs of the selection: cross-entropy alone, the base, and each value of these coordinates with others
    as in base.
    """
    options = OrderedDict()
    options['none'] = dict(distill='none')
    for changes in [{}, *(c for name in coordinates for c in COORDINATES[name])]:
        if 'kd_weight' in changes:
            options[f'kd-w{changes["kd_weight"]:g}'] = dict(distill='kd', **changes)
            continue
        settings = {**base, **changes}
        options[setting_name(settings)] = dict(distill='sscl', **sscl_options(**settings))
    return [Run('select', variant, seed, t, o) for t in timesteps for seed in seeds for variant, o in options.items()]


def primary_variants(chosen: Mapping[str, Any]) -> Dict[str, Dict[str, Any]]:
    """Return the options of the modes of Table 3 and of further modes, at the chosen settings."""
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
    """Return the runs of the comparison, ordered by seed, so that finished runs are always paired."""
    variants = primary_variants(chosen)
    unknown = [mode for mode in modes if mode not in variants]
    if unknown:
        raise SystemExit(f"--modes: unknown '{unknown[0]}'; there are {', '.join(variants)}.")
    return [Run('primary', mode, seed, t, variants[mode]) for t in timesteps for seed in seeds for mode in modes]


def teacher_run(phase: str, scale: Scale) -> Run:
    """Return the run of the ANN that all runs of a phase share. Both phases share it if they use the same training
    images.
    """
    return Run('select' if scale.images_per_class is not None else phase, 'teacher', 0, 0, dict(distill='none'))


def command(
        run: Run,
        scale: Scale,
        data: Path,
        folder: Path,
        threads: Optional[int],
        teacher: Optional[Path],
) -> List[str]:
    """Return the arguments of train.py that start a run."""
    is_teacher = run.timesteps == 0
    options = {**scale.recipe, **(scale.teacher if is_teacher else scale.student), **run.options}
    options.update(
        data_dir=data, model_kwargs=f'width={scale.width}', seed=run.seed, output=folder.parent, experiment=folder.name,
        no_report=True,
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
    """Return `count` evenly spaced names of the sorted class names; None returns all."""
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if count is None or count >= len(names):
        return names
    return [names[i * len(names) // count] for i in range(count)]


def split_class(files: Sequence[str], held_out: bool, count: Optional[int], seed: int) -> Tuple[List[str], List[str]]:
    """Return (training files, held-out files) of one class.

    With held_out, a tenth of the files is held out. If `count` limits the training images so that the other files
    suffice, the tenth is not used without held_out either. The training images, and so the teacher, are then the same
    in both phases.
    """
    order, files = np.random.RandomState(seed).permutation(len(files)), sorted(files)
    shuffled = [files[i] for i in order]
    n = round(HELD_OUT * len(files))
    if held_out:
        return shuffled[n:][:count], shuffled[:n]
    return (shuffled[n:] if count is not None and count <= len(files) - n else shuffled)[:count], []


def link_data(data_dir: Path, folder: Path, scale: Scale, phase: str) -> Path:
    """Create an image folder of symbolic links for a phase. The selection validates on held-out training images."""
    target = folder / phase
    for name in class_names(data_dir / 'train', scale.classes):
        files = os.listdir(data_dir / 'train' / name)
        train, held = split_class(files, phase == 'select', scale.images_per_class, SPLIT_SEED)
        _link(data_dir / 'train' / name, target / 'train' / name, train)
        if phase == 'select':
            _link(data_dir / 'train' / name, target / 'validation' / name, held)
        else:
            validation = data_dir / 'validation' / name
            _link(validation, target / 'validation' / name, os.listdir(validation))
    return target


def _link(source: Path, target: Path, names: Sequence[str]) -> None:
    """Create symbolic links in a folder, by plain strings: a path object for each of 60,000 files takes minutes."""
    target.mkdir(parents=True, exist_ok=True)
    there, folder = set(os.listdir(target)), os.fspath(source.resolve())
    for name in names:
        if name not in there:
            os.symlink(os.path.join(folder, name), os.path.join(target, name))


# ---- the script

def code_revision() -> str:
    """Return git's name of the current code."""
    result = subprocess.run(['git', 'describe', '--always', '--dirty'], cwd=ROOT, capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else 'unknown'


def parse_setting(text: str) -> Tuple[str, Any]:
    """Parse a setting of the loss such as 'weight=0.3'."""
    name, _, value = text.partition('=')
    try:
        return name, float(value)
    except ValueError:
        return name, value


def _words(settings: Mapping[str, Any]) -> str:
    return ' '.join(f'{name}={value}' for name, value in settings.items())


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data-dir', type=Path, help='image folder of CIFAR-100: train/CLASS and validation/CLASS')
    parser.add_argument('--output', type=Path, help='root of all runs')
    parser.add_argument('--scale', default='small', choices=list(SCALES),
                        help='; '.join(f'{name}: {scale.description}' for name, scale in SCALES.items()))
    parser.add_argument('--phase', default='all', choices=['select', 'primary', 'all', 'diagnose'],
                        help='choose settings on held-out training images, compare the modes, or both; diagnose: '
                             'gradients of the terms in finished runs')
    parser.add_argument('--modes', nargs='+', default=list(primary_variants(BASE)), metavar='MODE',
                        help='of the comparison: ' + ', '.join(primary_variants(BASE)))
    parser.add_argument('--seeds', type=int, nargs='+', default=[1, 2, 3, 4, 5])
    parser.add_argument('--timesteps', '-T', type=int, nargs='+', default=[2])
    parser.add_argument('--coordinates', nargs='*', default=list(COORDINATES), metavar='NAME',
                        help='what the selection tries: ' + ', '.join(COORDINATES))
    parser.add_argument('--base', nargs='*', default=[], type=parse_setting, metavar='NAME=VALUE',
                        help='other settings of the loss than ' + _words(BASE) + ' (selection) or '
                             + _words(CHOSEN) + ' (comparison)')
    parser.add_argument('--workers-parallel', type=int, default=1, metavar='N', help='trainings at a time')
    parser.add_argument('--max-load', type=float, default=math.inf, metavar='L',
                        help="start a training only while the machine's load is below this: to run beside other work")
    parser.add_argument('--threads', type=int, default=None, help='CPU threads of a training')
    parser.add_argument('--deadline', type=float, default=None, metavar='MINUTES',
                        help='start nothing that would not be done in this time')
    parser.add_argument('--revision', default=None, help="code revision to note (git's)")
    parser.add_argument('--report', action='store_true',
                        help='no training: figure and results page from the results (of --output, if given)')
    return parser


def in_faster_precision(scale: Scale, output: Path) -> Scale:
    """Return the scale; its students in float32 if they ask for bfloat16 and this CPU is slower with it."""
    if not scale.student.get('amp'):
        return scale
    from ablation_precision import student_precision  # torch, which the other phases need not wait for
    if student_precision(output, scale.width) == 'bfloat16':
        return scale
    return scale._replace(student={k: v for k, v in scale.student.items() if not k.startswith('amp')})


def run_phase(args: argparse.Namespace, phase: str, base: Mapping[str, Any], deadline: Optional[float]) -> None:
    """Run the teacher and all runs of a phase."""
    scale = in_faster_precision(SCALES[args.scale], args.output)
    from ablation_precision import device_name
    data = link_data(args.data_dir, args.output / 'data', scale, phase)
    runner = Runner(args.output, args.workers_parallel, deadline, args.revision or code_revision(),
                    [sys.executable, str(ROOT / 'train.py')], args.max_load, device_name())
    for option, names, known in (('--base', base, BASE), ('--coordinates', args.coordinates, COORDINATES)):
        unknown = sorted(set(names) - set(known))
        if unknown:
            raise SystemExit(f"{option}: unknown '{unknown[0]}'; there are {', '.join(known)}.")
    if phase == 'select':
        runs = select_runs(base, args.coordinates, args.seeds, args.timesteps)
    else:
        runs = primary_runs(base, args.modes, args.seeds, args.timesteps)
    teacher = teacher_run(phase, scale)
    weights = runner.folder(teacher) / 'last.pth.tar'
    arguments = {run.name: command(run, scale, data, runner.folder(run), args.threads, weights) for run in runs}
    data = link_data(args.data_dir, args.output / 'data', scale, teacher.phase)
    arguments[teacher.name] = command(teacher, scale, data, runner.folder(teacher), args.threads, None)
    runner.show_plan([teacher, *runs])
    runner([teacher], arguments)
    if is_done(runner.folder(teacher)):
        runner(runs, arguments)


def main() -> None:
    """Train what the options ask for, or write the report."""
    parser = create_parser()
    args = parser.parse_args()
    if args.report:
        if args.output is not None:
            runs, layers = collect(args.output, args.scale)
            if not runs:
                raise SystemExit(f'--output {args.output} has no finished run; the files in {RESULTS} are kept.')
            write_results(RESULTS, runs, layers)
        return report(RESULTS, PAGE, facts(args.scale))
    if args.output is None:
        parser.error('--output is needed')
    if args.phase == 'diagnose':
        return diagnose_all(args.output, args.modes, RESULTS)
    if args.data_dir is None:
        parser.error('--data-dir is needed to train')
    deadline = None if args.deadline is None else time.time() + 60 * args.deadline
    for phase in ('select', 'primary') if args.phase == 'all' else (args.phase,):
        run_phase(args, phase, {**(BASE if phase == 'select' else CHOSEN), **dict(args.base)}, deadline)
    show_results(*collect(args.output, args.scale))


def facts(scale: str) -> Facts:
    """Return the facts about a scale that the report states."""
    size = SCALES[scale]
    options = {**size.recipe, **size.student}
    recipe = f'{options["opt"]} at {options["lr"]:g}, batch {options["batch_size"]}'
    return Facts(size.classes, size.images_per_class, size.width, options['epochs'], size.teacher['epochs'], recipe,
                 options['amp_dtype'] if options.get('amp') else None)


def show_results(runs: Sequence[Mapping[str, Any]], layers: Sequence[Mapping[str, Any]]) -> None:
    """Print the tables of all finished runs. --report writes them."""
    for timesteps in sorted({run['timesteps'] for run in runs if run['phase'] == 'primary' and run['timesteps']}):
        print('\n'.join(['', f'T = {timesteps}', *comparison_lines(runs, timesteps)]))
    if any(run['phase'] == 'select' for run in runs):
        print('\n'.join(['', *selection_lines(runs)]))


if __name__ == '__main__':
    main()
