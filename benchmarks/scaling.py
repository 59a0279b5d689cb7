#!/usr/bin/env python3
"""Measure how a training step grows with T, batch and resolution: time and peak memory of a spiking ResNet-18 and its
ANN.

    python benchmarks/scaling.py

Prints the slope over T beside the ANN's cost per additional image, and draws both.
"""
from typing import Any, Dict, List, Sequence

import torch
from harness import create_parser, interleave, measure_peak, peak_in_fresh_process, save, show
from train_step import Variant, create_step

TIMESTEPS = 1, 2, 4, 8
BATCHES = 2, 4, 8
SIZES = 64, 112, 160
BATCH, SIZE, BASE_T = 4, 112, 4


def cases() -> Dict[str, Dict[str, Any]]:
    points = [(t, BATCH, SIZE) for t in TIMESTEPS] + [(BASE_T, b, SIZE) for b in BATCHES] + [
        (BASE_T, BATCH, s) for s in SIZES]
    return {f'{kind}:{t}:{b}:{s}': dict(kind=kind, timesteps=t, batch=b, size=s)
            for t, b, s in dict.fromkeys(points) for kind in ('spiking', 'ANN')}


def step_of(case: Dict[str, Any]):
    variant = Variant(spiking=case['kind'] == 'spiking', channels_last=True)
    return create_step(variant, case['batch'], case['size'], case['timesteps'])


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
            for kind, style in (('ANN', 'o--'), ('spiking', 's-')):
                points = sorted((r[key], r[value]) for r in rows if r['kind'] == kind and chosen(r) and r[value])
                axis.plot(*zip(*points), style, label={'ANN': 'ANN, as many images', 'spiking': 'spiking'}[kind])
            axis.grid(alpha=.3)
            axis.set_xticks(sorted({r[key] for r in rows if chosen(r)}))
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


def main() -> None:
    parser = create_parser(__doc__, rounds=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    all_cases = cases()
    if args.worker:
        print(measure_peak(step_of(all_cases[args.worker])))
        return
    timings = interleave({name: step_of(case) for name, case in all_cases.items()}, args.rounds)
    rows = []
    for name, case in all_cases.items():
        memory = peak_in_fresh_process(__file__, name, '--threads', str(args.threads))
        median, low, high = timings[name]
        rows.append(dict(**case, seconds=median, low=low, high=high, MiB=memory))
    show('training step', rows)
    growth = []
    for kind in ('spiking', 'ANN'):
        points = [r for r in rows if r['kind'] == kind and (r['batch'], r['size']) == (BATCH, SIZE)]
        t = [r['timesteps'] for r in points]
        for value in ('seconds', 'MiB'):
            y = [r[value] for r in points]
            growth.append(dict(
                what=f'{kind}, {value}', per_step_of_T=slope(t, y), off_the_line_percent=100 * linearity(t, y)))
    for value, i in (('seconds', 0), ('MiB', 1)):
        growth.append(dict(what=f'slope, spiking / ANN, {value}',
                           per_step_of_T=growth[i]['per_step_of_T'] / growth[i + 2]['per_step_of_T']))
    show(f'growth with T, batch {BATCH}', growth)
    args.output.mkdir(parents=True, exist_ok=True)
    draw(rows, str(args.output / 'scaling.png'))
    save(args.output, 'scaling', {'steps': rows, 'growth': growth})


if __name__ == '__main__':
    main()
