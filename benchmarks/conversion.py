#!/usr/bin/env python3
"""Measure the accuracy over T of trained ANNs that are converted by every threshold rule.

    python benchmarks/conversion.py --data-dir CIFAR100 --output DIR    # trains what is missing, measures, reports
    python benchmarks/conversion.py --report                            # figure and page from the results

Networks are resnet20_cifar of width 16 with ReLU and with QCFS (8 levels), trained with equal budgets on the bundled
digits and on CIFAR-100 (20 classes with 250 training images each, chosen as in the ablation). Nothing is selected on
validation images: all options are fixed below, and the last weights are taken. Thresholds come from training images.

A network without leak has no memory of T: its mean output over the first T timesteps of a long run is its output at T.
So one run at the largest T gives all. The script skips what is done and resumes interrupted trainings. CIFAR100 is a
folder of images: train/CLASS, validation/CLASS.
"""
import argparse
import csv
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Sequence, Tuple

import numpy as np
import torch
import torch.nn as nn
from torch.utils.data import Subset

from ablation import SCALES, link_data
from ablation_runs import is_done, start_arguments
from pages import FIGURES, PAGES, write_section
from pretrained import create_ann, create_set, loader
from timm_sscl import convert_ann

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / 'benchmarks' / 'results'
PAGE = PAGES / 'trained-ann.md'
BEGIN, END = '<!-- conversion: written by benchmarks/conversion.py -->', '<!-- end of conversion -->'

TIMESTEPS = 1, 2, 4, 8, 16, 32, 64
DATA = {'digits': 'digits', 'cifar': 'CIFAR-100, 20 classes'}
QCFS = {'qcfs': dict(qcfs=8), 'qcfs2': dict(qcfs=8, qcfs_threshold=2.)}  # activation -> options of train.py
OPTIONS: Dict[str, Dict[str, Any]] = {  # of train.py, besides its defaults
    'digits': {},
    'cifar': dict(SCALES['small'].recipe, epochs=15, opt='sgd', lr=0.1, weight_decay=5e-4),
}


class Rule(NamedTuple):
    """How a network is converted."""
    options: Dict[str, Any]  # of convert_ann
    images: int = 1024  # training images for the thresholds; if there are fewer, some are used several times
    activation: str = 'relu'
    timesteps: int = 32  # of the spiking network that is measured


RULES = {
    'maximum': Rule(dict(percentile=100.)),
    'percentile 99.9': Rule(dict(percentile=99.9)),
    'LTB': Rule(dict(rule='ltb'), images=5000),  # its thresholds grow from batch to batch
    'SpikeNorm': Rule(dict(rule='spike_norm', per_channel=False), images=64),
    'Hybrid (factor 0.7)': Rule(dict(rule='spike_norm', per_channel=False, factor=0.7), images=64),
    'QCFS': Rule({}, images=64, activation='qcfs'),
    'QCFS from threshold 2': Rule({}, images=64, activation='qcfs2'),
}


class Row(NamedTuple):
    """Accuracy of one network at one T; T = 0 is the ANN."""
    data: str
    seed: int
    rule: str
    timesteps: int
    top1: float
    images: int


# ---- trainings

def folder(output: Path, data: str, activation: str, seed: int) -> Path:
    return output / 'runs' / f'{data}-{activation}-s{seed}'


def arguments(args: argparse.Namespace, data: str, activation: str, seed: int) -> List[str]:
    """Return the arguments of train.py for an ANN."""
    run = folder(args.output, data, activation, seed)
    options = dict(OPTIONS[data], model='resnet20_cifar', model_kwargs='width=16', distill='none', seed=seed, workers=0,
                   threads=args.threads, output=run.parent, experiment=run.name)
    if data == 'cifar':
        options['data_dir'] = link_data(args.data_dir, args.output / 'data', SCALES['small'], 'primary')
    options.update(QCFS.get(activation, {}))
    words = []
    for name, value in options.items():
        values = [] if value is True else value if isinstance(value, (list, tuple)) else [value]
        words += [f'--{name.replace("_", "-")}', *map(str, values)]
    return words


def train(args: argparse.Namespace, data: str, activation: str, seed: int) -> bool:
    """Train an ANN that is not trained yet. Return whether it is trained."""
    run = folder(args.output, data, activation, seed)
    if is_done(run) or args.no_training:
        return is_done(run)
    run.parent.mkdir(parents=True, exist_ok=True)
    print(f'{run.name}: trains', flush=True)
    with open(run.with_suffix('.log'), 'a') as log:
        words = start_arguments(run, arguments(args, data, activation, seed))
        if subprocess.run([sys.executable, str(ROOT / 'train.py'), *words], stdout=log, stderr=log).returncode:
            raise SystemExit(f'{run.name}: train.py failed; see {run.with_suffix(".log")}')
    return True


# ---- measurements

@torch.no_grad()
def top1_over_time(
        model: nn.Module,
        batches: Sequence[Tuple[torch.Tensor, torch.Tensor]],
        timesteps: Sequence[int],
) -> List[float]:
    """Return the top-1 accuracy of a spiking model at each T, from one run at the largest."""
    model.eval().set_timesteps(max(timesteps))
    right = [0] * len(timesteps)
    for x, y in batches:
        total = model(x, per_step=True).cumsum(0)
        for i, t in enumerate(timesteps):
            right[i] += (total[t - 1].argmax(1) == y).sum().item()
    return [100 * r / sum(len(y) for _, y in batches) for r in right]


@torch.no_grad()
def top1(model: nn.Module, batches: Sequence[Tuple[torch.Tensor, torch.Tensor]]) -> float:
    return 100 * sum((model(x).argmax(1) == y).sum().item() for x, y in batches) / sum(len(y) for _, y in batches)


def spread(dataset: Any, count: int) -> Subset:
    """Return `count` evenly spaced samples, or all of them as often as needed, in a fixed random order."""
    order = torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).long()
    order = order[torch.randperm(len(order), generator=torch.Generator().manual_seed(0))]
    return Subset(dataset, order.repeat(-(-count // len(order)))[:count].tolist())


def measure(args: argparse.Namespace, data: str, seed: int, name: str) -> List[Row]:
    """Convert a trained ANN by a rule and measure it."""
    rule = RULES[name]
    ann, options = create_ann(folder(args.output, data, rule.activation, seed))
    validation = create_set(options, 'val_split', False)
    validation = spread(validation, min(args.images, len(validation)))
    batches = list(loader(options, ann, validation, args.batch_size))
    train_set = spread(create_set(options, 'train_split', False), rule.images)
    images = torch.cat([x for x, _ in loader(options, ann, train_set, 100)])
    values = [top1(ann, batches)]
    model = convert_ann(ann, images, rule.timesteps, **rule.options)
    values += top1_over_time(model, batches, args.timesteps)
    return [Row(data, seed, name, t, value, len(validation)) for t, value in zip((0, *args.timesteps), values)]


def read(file: Path) -> List[Row]:
    if not file.is_file():
        return []
    with file.open() as stream:
        return [Row(r['data'], int(r['seed']), r['rule'], int(r['timesteps']), float(r['top1']), int(r['images']))
                for r in csv.DictReader(stream)]


def write(file: Path, rows: Sequence[Row]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open('w', newline='') as stream:
        writer = csv.writer(stream, lineterminator='\n')
        rows = sorted(rows, key=lambda r: (list(DATA).index(r.data), r.seed, list(RULES).index(r.rule), r.timesteps))
        writer.writerows([Row._fields, *(row._replace(top1=round(row.top1, 2)) for row in rows)])


def run_all(args: argparse.Namespace) -> None:
    """Train and measure everything, one seed after the other. Results are written after every measurement."""
    file = args.output / 'conversion.csv'
    done = {(row.data, row.seed, row.rule) for row in read(file)}
    for seed in args.seeds:
        for data in args.data:
            for name, rule in RULES.items():
                if (data, seed, name) in done or not train(args, data, rule.activation, seed):
                    continue
                began, rows = time.time(), measure(args, data, seed, name)
                write(file, [*read(file), *rows])
                print(f'{data}, seed {seed}, {name}: ' + ' '.join(f'{row.top1:.1f}' for row in rows)
                      + f' ({time.time() - began:.0f} s)', flush=True)


# ---- the report

def over_seeds(rows: Sequence[Row], data: str, rule: str) -> Iterator[Tuple[int, np.ndarray]]:
    """Yield (T, accuracies of all seeds) of a rule."""
    of = [row for row in rows if row.data == data and row.rule == rule]
    for t in sorted({row.timesteps for row in of}):
        yield t, np.array([row.top1 for row in of if row.timesteps == t])


def _cell(values: np.ndarray) -> str:
    return f'{values.mean():.1f}' + (f' ± {values.std(ddof=1):.1f}' if len(values) > 1 else '')


def table(rows: Sequence[Row]) -> List[str]:
    """Return the table of the page: a line per data and rule, mean and standard deviation over seeds."""
    steps = sorted({row.timesteps for row in rows} - {0})
    lines = ['| data | thresholds | seeds | ANN | ' + ' | '.join(f'T={t}' for t in steps) + ' |',
             '|---' * (4 + len(steps)) + '|']
    for data, text in DATA.items():
        for rule in RULES:
            cells = dict(over_seeds(rows, data, rule))
            if cells:
                words = [text, rule, str(len(cells[0])), *(_cell(cells[t]) for t in (0, *steps))]
                lines.append(f'| {" | ".join(words)} |')
                text = ''
    return lines


def figure(rows: Sequence[Row], file: Path) -> None:
    """Draw the accuracy over T: mean over seeds, and their range as a band."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    shown = [data for data in DATA if any(row.data == data for row in rows)]
    drawn, axes = plt.subplots(1, len(shown), figsize=(5.2 * len(shown), 4.6), squeeze=False)
    for axis, data in zip(axes[0], shown):
        for i, rule in enumerate(RULES):
            cells = dict(over_seeds(rows, data, rule))
            steps = [t for t in cells if t]
            if steps:
                color = f'C{i}'
                axis.plot(steps, [cells[t].mean() for t in steps], 'o-', ms=3, color=color, label=rule)
                axis.fill_between(steps, [cells[t].min() for t in steps], [cells[t].max() for t in steps], alpha=.15,
                                  color=color, lw=0)
        for rule, style in (('maximum', '--'), ('QCFS', ':')):
            cells = dict(over_seeds(rows, data, rule))
            if cells:
                axis.axhline(cells[0].mean(), color='k', lw=1, ls=style,
                             label=f'ANN with {"ReLU" if rule == "maximum" else rule}')
        axis.set_xscale('log', base=2)
        axis.set(title=DATA[data], xlabel='timesteps T', ylabel='top-1 [%]', ylim=(0, None))
        axis.set_xticks(TIMESTEPS, labels=map(str, TIMESTEPS))
        axis.grid(alpha=.3)
    drawn.tight_layout(rect=(0, .1, 1, 1))
    drawn.legend(*axes[0][-1].get_legend_handles_labels(), fontsize=8, loc='lower center', ncol=5)
    drawn.savefig(file, dpi=100)
    plt.close(drawn)


def report(results: Path, page: Path) -> None:
    """Write figure and page from the results."""
    rows = read(results / 'conversion.csv')
    figure(rows, results / 'conversion.png')
    images = {data: next((row.images for row in rows if row.data == data), 0) for data in DATA}
    facts = '; '.join(f'{text}: {images[data]} validation images' for data, text in DATA.items() if images[data])
    write_section(page, BEGIN, END, [
        '', *table(rows), '', f'Top-1, mean ± standard deviation over seeds of the training. {facts}.', '',
        f'![Accuracy over T of the converted networks]({FIGURES}/conversion.png)', ''])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data-dir', type=Path, help='image folder of CIFAR-100')
    parser.add_argument('--output', type=Path, help='root of the trainings')
    parser.add_argument('--data', nargs='+', default=list(DATA), choices=list(DATA))
    parser.add_argument('--seeds', type=int, nargs='+', default=[1, 2, 3])
    parser.add_argument('--timesteps', type=int, nargs='+', default=list(TIMESTEPS))
    parser.add_argument('--images', type=int, default=250, help='validation images, evenly spaced')
    parser.add_argument('--batch-size', type=int, default=10, help='of the measurements; small fits the caches')
    parser.add_argument('--threads', type=int, default=1, help='CPU threads')
    parser.add_argument('--no-training', action='store_true', help='measure only ANNs that are trained')
    parser.add_argument('--report', action='store_true', help='only write figure and page, from the results')
    args = parser.parse_args()
    if not args.report:
        if args.output is None or (args.data_dir is None and 'cifar' in args.data):
            parser.error('--output and, for cifar, --data-dir are needed')
        torch.set_num_threads(args.threads)
        args.output = args.output.resolve()
        run_all(args)
        write(RESULTS / 'conversion.csv', read(args.output / 'conversion.csv'))
    report(RESULTS, PAGE)


if __name__ == '__main__':
    main()
