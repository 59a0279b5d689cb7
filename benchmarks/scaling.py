#!/usr/bin/env python3
"""Measure how a training step grows with T, batch and resolution: time and peak memory of a spiking ResNet-18 and its
ANN.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --part memory  # a piece of it

Prints the slope over T beside the ANN's cost per additional image, and draws both.
"""
import json
import time
from typing import Any, Dict, List, Sequence

import torch
from harness import create_parser, interleave, measure_peak, output_of_fresh_process, save, show
from train_step import Variant, create_step

TIMESTEPS = 1, 2, 4, 8, 16, 32
BATCHES = 1, 2, 4
SIZES = 64, 112, 160
BATCH, SIZE, BASE_T = 2, 112, 4
KINDS = {'spiking': Variant(channels_last=True), 'spiking, packed': Variant(channels_last=True, packed=True),
         'ANN': Variant(spiking=False, channels_last=True)}
PARTS = 'time', 'memory'


def cases() -> Dict[str, Dict[str, Any]]:
    points = [(t, BATCH, SIZE) for t in TIMESTEPS] + [(BASE_T, b, SIZE) for b in BATCHES] + [
        (BASE_T, BATCH, s) for s in SIZES]
    return {f'{kind}:{t}:{b}:{s}': dict(kind=kind, timesteps=t, batch=b, size=s)
            for t, b, s in dict.fromkeys(points) for kind in KINDS}


def step_of(case: Dict[str, Any]):
    return create_step(KINDS[case['kind']], case['batch'], case['size'], case['timesteps'])


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the least squares slope."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / sum((a - mean_x) ** 2 for a in x)


def linearity(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the largest deviation from the fitted line, relative to the largest value."""
    k = slope(x, y)
    offset = sum(y) / len(y) - k * sum(x) / len(x)
    return max(abs(b - offset - k * a) for a, b in zip(x, y)) / max(y)


def draw(rows: List[Dict[str, Any]], file: str) -> None:
    try:
        import matplotlib
    except ImportError:
        print('absent: matplotlib, no figure')
        return
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(2, 3, figsize=(10, 5.5), constrained_layout=True, sharey='row')
    series = (('timesteps', 'time steps T', lambda r: (r['batch'], r['size']) == (BATCH, SIZE)),
              ('batch', 'batch (T = 4)', lambda r: (r['timesteps'], r['size']) == (BASE_T, SIZE)),
              ('size', 'height = width (T = 4)', lambda r: (r['timesteps'], r['batch']) == (BASE_T, BATCH)))
    for column, (key, label, chosen) in enumerate(series):
        for row, (value, name) in enumerate((('seconds', 'step, s'), ('MiB', 'peak memory, MiB'))):
            axis = axes[row][column]
            for kind, style in zip(KINDS, ('s-', '^-', 'o--')):
                points = sorted((r[key], r[value]) for r in rows if r['kind'] == kind and chosen(r) and r[value])
                axis.plot(*zip(*points), style, label='ANN, as many images' if kind == 'ANN' else kind)
            axis.grid(alpha=.3)
            ticks = sorted({r[key] for r in rows if chosen(r)})
            axis.set_xticks([tick for tick in ticks if tick >= ticks[-1] / 10 or tick == ticks[0]])  # no labels overlap
            if column == 0:
                axis.set_ylabel(name)
            if row == 1:
                axis.set_xlabel(label)
    axes[0][0].legend()
    for row in axes:
        row[0].set_ylim(bottom=0)  # after drawing, since the rows share the axis
    figure.suptitle('ResNet-18 training step, channels_last')
    figure.savefig(file, dpi=110)
    print(f'figure: {file}')


def growth(rows: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """Return the cost of a further step of T by kind, and relative to the ANN's cost of as many further images."""
    found: List[Dict[str, Any]] = []
    for value in ('seconds', 'MiB'):
        one = 1.
        for kind in reversed(list(KINDS)):  # the ANN first
            points = [r for r in rows if r['kind'] == kind and (r['batch'], r['size']) == (BATCH, SIZE)]
            t, y = [r['timesteps'] for r in points], [r[value] for r in points]
            per_step = slope(t, y)
            if kind == 'ANN':
                one = per_step
            found.append(dict(what=f'{kind}, {value}', ratio=per_step / one, per_step_of_T=per_step,
                              off_the_line_percent=100 * linearity(t, y)))
    return found


def measure(part: str, args: Any) -> None:
    """Measure times or peaks of all cases and save them."""
    all_cases = cases()
    if part == 'time':
        clock = time.process_time if args.threads == 1 else time.perf_counter
        timings = interleave({name: step_of(case) for name, case in all_cases.items()}, args.rounds, clock=clock)
        rows = [dict(**case, seconds=timings[name].median, low=timings[name].low, high=timings[name].high)
                for name, case in all_cases.items()]
    else:
        memory = json.loads(output_of_fresh_process(__file__, 'all', '--threads', str(args.threads)))
        rows = [dict(**case, MiB=memory[name]) for name, case in all_cases.items()]
    save(args.output, f'scaling_{part}', {'steps': rows})


def main() -> None:
    parser = create_parser(__doc__, rounds=5)
    parser.add_argument('--part', choices=PARTS, help='only times or only memory')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.worker:
        print(json.dumps({name: measure_peak(step_of(case)) for name, case in cases().items()}))
        return
    for part in [args.part] if args.part else PARTS:
        measure(part, args)
    files = [args.output / f'scaling_{part}.json' for part in PARTS]
    if not all(file.is_file() for file in files):
        return
    times, memory = (json.loads(file.read_text())[0]['tables']['steps'] for file in files)
    rows = [{**a, **b} for a, b in zip(times, memory)]
    show('training step', rows)
    slopes = growth(rows)
    show(f'growth with T, batch {BATCH}; the ANN = 1', slopes)
    draw(rows, str(args.output / 'scaling.png'))
    save(args.output, 'scaling', {'steps': rows, 'growth': slopes}, batch=BATCH)


if __name__ == '__main__':
    main()
