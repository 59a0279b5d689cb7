#!/usr/bin/env python3
"""Write the performance page's tables from the JSON files of the speed benchmarks, and run what is missing of them.

    python benchmarks/performance.py --run              # all pieces not measured on this machine, then the page
    python benchmarks/performance.py --run --only NAME  # pieces whose name contains NAME
    python benchmarks/performance.py --list
    python benchmarks/performance.py                    # the page alone

A piece takes some minutes on two cores and has its own file in benchmarks/results, so that a run may be interrupted.
--wrap names a command that runs each piece, for example one that waits until the machine is quiet.
"""
import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Sequence, Tuple

from harness import RESULTS, machine
from pages import FIGURES, PAGES, write_section
from train_step import ANN, NETS, OPTIONS, PARTS, T, layouts, load_table, name_of

PAGE = PAGES / 'performance.md'
BEGIN, END = '<!-- performance: written by benchmarks/performance.py -->', '<!-- end of performance -->'


class Piece(NamedTuple):
    """A part of the measurements: the file that it leaves, and the command."""
    name: str
    command: Tuple[str, ...]


def pieces() -> List[Piece]:
    """Return all pieces in the order of the page."""
    steps = [Piece(name_of(net, layout, part), ('train_step.py', net, '--layout', layout, '--part', part))
             for net in NETS for layout in layouts(net) for part in PARTS]
    return [Piece('neuron', ('neuron.py',)), *steps, Piece('loss', ('loss.py',)),
            *(Piece(f'scaling_{part}', ('scaling.py', '--part', part)) for part in ('time', 'memory')),
            Piece('first_steps', ('first_steps.py',)), Piece('deploy', ('deploy.py',))]


def measured_here(name: str) -> bool:
    """Return whether the newest file of a piece is of this machine with these versions."""
    file = RESULTS / f'{name}.json'
    return file.is_file() and json.loads(file.read_text())[0]['machine'] == machine()


def run_missing(only: str, wrap: str) -> None:
    """Run the pieces that were not measured on this machine. A piece that fails ends the run.

    Args:
        only: Part of a piece's name.
        wrap: Command that runs a piece's command.
    """
    for piece in pieces():
        if only in piece.name and not measured_here(piece.name):
            print(f'---- {piece.name}', flush=True)
            script, *options = piece.command
            subprocess.run([*shlex.split(wrap), sys.executable, str(Path(__file__).parent / script), *options],
                           check=True)


def runs(name: str) -> List[Dict[str, Any]]:
    file = RESULTS / f'{name}.json'
    if not file.is_file():
        raise SystemExit(f'{file} is missing: run python benchmarks/{name}.py first.')
    return json.loads(file.read_text())


def markdown(rows: Sequence[Mapping[str, Any]], columns: Sequence[Tuple[str, str, str]]) -> List[str]:
    """Return rows as a Markdown table. Columns are (key, heading, format)."""
    lines = ['| ' + ' | '.join(heading for _, heading, _ in columns) + ' |', '|---' * len(columns) + '|']
    for row in rows:
        cells = ['-' if row.get(key) is None else format(row[key], spec) for key, _, spec in columns]
        lines.append('| ' + ' | '.join(cells) + ' |')
    return lines


def both(name: str, table: str, key: str, value: str) -> Dict[str, List[float]]:
    """Return the values of both runs by row."""
    values: Dict[str, List[float]] = {}
    for run in runs(name):
        for row in run['tables'][table]:
            if row.get(value) is not None:
                values.setdefault(row[key], []).append(row[value])
    return values


def agreement(name: str, table: str, key: str, value: str) -> str:
    """Return a sentence on the difference between two runs' ratios, in the median and at most."""
    return apart([(v[0], v[1]) for v in both(name, table, key, value).values() if len(v) == 2])


def apart(pairs: Iterable[Tuple[float, float]]) -> str:
    """Return a sentence on the difference between two runs' ratios; '' if there are none."""
    shares = sorted(abs(a - b) / min(a, b) for a, b in pairs)
    return '' if not shares else (
        f' Two runs differ by {100 * shares[len(shares) // 2]:.0f} % in the median row and {100 * shares[-1]:.0f} % in '
        f'the worst.')


def measured_on(newest: Mapping[str, Any]) -> str:
    """Return a sentence that names the machine of a run."""
    here = newest['machine']
    versions = ', '.join(f'{k} {here[k]}' for k in ('torch', 'timm') if here.get(k))
    capability = here.get('cpu_capability', 'instructions not recorded')
    return f' On {here["cpu"]} ({capability}), threads: {newest["threads"]}, {versions}.'


def spread(row: Mapping[str, Any], low: str = 'low', high: str = 'high') -> str:
    return '-' if row.get(low) is None else f'{row[low]:.2f} to {row[high]:.2f}'


def neuron() -> List[str]:
    newest = runs('neuron')[0]
    rows = newest['tables']['ratios']
    cases = [key for key in rows[0] if key != 'neuron']
    spread_percent = quartiles_apart(newest['tables']['milliseconds'])
    return ['## One neuron layer', '',
            'Forward and backward of one layer, T = 4 on a batch of 32 maps of 64 x 32 x 32, memory kept between '
            'calls; ReLU on the same tensor is 1:', '',
            *markdown(rows, [('neuron', 'layer', ''), *((case, case, '.2f') for case in cases)]), '',
            f'Half of the rounds lie within {spread_percent:.0f} % in the median cell. `python benchmarks/neuron.py`.'
            f'{measured_on(newest)}{agreement("neuron", "ratios", "neuron", cases[0])}']


def quartiles_apart(rows: Sequence[Mapping[str, Any]]) -> float:
    """Return how far the quartiles of times are apart in the median row, in percent of the median."""
    apart = sorted(100 * (row['high'] - row['low']) / row['median'] for row in rows if row.get('median'))
    return apart[len(apart) // 2]


def train_step() -> List[str]:
    lines = ['## A training step', '',
             f'Time and peak memory of tensors, T = {T}; the ANN sees {T} times as many images, in the same memory '
             f'format, and is 1. Memory is measured with glibc giving every freed block back. The option "stem once" '
             f'is `share_stem`. The best points of every network:', '']
    tables = {(net, layout): load_table(RESULTS, net.name, layout) for net in NETS.values()
              for layout in layouts(net.name)}
    missing = [f'{net.name} ({layout})' for (net, layout), rows in tables.items() if rows is None]
    lines += [*markdown([best_points(net.name, layout, rows) for (net, layout), rows in tables.items() if rows], [
        ('net', 'network', ''), ('layout', 'memory format', ''), ('plain', 'spiking: time, memory', ''),
        ('fastest', 'least time', ''), ('smallest', 'least memory', '')]), '',
        'All options; "best" are those that no other one beats in both:', '']
    for (net, layout), rows in tables.items():
        if rows is None:
            continue
        newest = runs(name_of(net.name, layout, 'time'))[0]
        lines += [f'{net.name}, {layout}, {net.batch} images of {net.size} x {net.size}:', '',
                  *markdown([{**row, 'spread': spread(row)} for row in rows], [
                      ('step', 'step', ''), ('time', 'time', '.2f'), ('spread', 'quartiles', ''),
                      ('memory', 'memory', '.2f'), ('best', 'best', ''), ('seconds', 's', '.2f'),
                      ('MiB', 'MiB', '.0f')]), '', measured_on(newest).strip(), '']
    if missing:
        lines += [f'Not measured yet: {", ".join(missing)}.', '']
    return [*lines, f'`python benchmarks/train_step.py`.{apart(step_ratios())}']


def best_points(net: str, layout: str, rows: Sequence[Mapping[str, Any]]) -> Dict[str, str]:
    """Return a network's points of least time and of least memory, and that without options, as texts."""
    options = {row['step']: row for row in rows if row['step'] in OPTIONS and not row['step'].startswith(ANN)}

    def text(name: str) -> str:
        return f'{options[name]["time"]:.2f}, {options[name]["memory"]:.2f}'

    fastest, smallest = (min(options, key=lambda name: options[name][key]) for key in ('time', 'memory'))
    return dict(net=net, layout=layout, plain=text('spiking'), fastest=f'{text(fastest)} ({fastest})',
                smallest=f'{text(smallest)} ({smallest})')


def step_ratios() -> Iterator[Tuple[float, float]]:
    """Yield the times beside the ANN in the newest and the previous run of all steps."""
    for net in NETS.values():
        for layout in layouts(net.name):
            file = RESULTS / f'{name_of(net.name, layout, "time")}.json'
            found = [run['tables']['time'] for run in (json.loads(file.read_text()) if file.is_file() else [])]
            if len(found) == 2:
                newest, previous = ({row['variant']: row['median'] / rows[0]['median'] for row in rows[1:]}
                                    for rows in found)
                yield from ((ratio, previous[name]) for name, ratio in newest.items() if name in previous)


def deploy_ratios() -> Iterator[Tuple[float, float]]:
    """Yield the times beside the ANN in the newest and the previous run of the deployed networks."""
    newest, *older = [{(row.get('isa'), row['net'], row['what']): row['time'] for row in run['tables']['times']}
                      for run in runs('deploy')]
    for previous in older:
        yield from ((ratio, previous[key]) for key, ratio in newest.items() if key in previous)


def loss() -> List[str]:
    newest = runs('loss')[0]
    return ['## The losses', '',
            f'What the losses add to a step (ResNet-18, T = 4, batch {newest["batch_size"]}, {newest["size"]} x '
            f'{newest["size"]}), in percent of the step with cross-entropy alone:', '',
            *markdown(newest['tables']['parts'], [
                ('part', 'part', ''), ('percent_of_step', '% of the step', '.1f'), ('seconds', 's', '.3f')]), '',
            f'`python benchmarks/loss.py`.{measured_on(newest)}']


def deployed() -> List[str]:
    newest = runs('deploy')[0]
    cpu, tables = newest['machine'], newest['tables']
    shares = [key for key in tables['profiles'][0] if key not in ('isa', 'net', 'bits')]
    avx2 = ('With AVX2 alone there are no int8 dot products (VNNI, AMX)' if any(
        row['isa'] == 'AVX2' for row in tables['times']) else 'The run has no rows for AVX2 alone')
    lines = ['## Int8 inference', '',
             f'A forward of the [deployed](deploy.md) model, T = {newest["timesteps"]}, on one thread of {cpu["cpu"]}, '
             f'torch {cpu["torch"]}: 8 images of 112 x 112 for the ResNet-18, 16 of 32 x 32 for the VGG-16. The ANN '
             f'gets T times as many images; in float32, in its faster memory format, it is 1. CPU times, medians of '
             f'interleaved rounds. {avx2}:',
             '', *markdown(tables['times'], [
                 ('net', 'network', ''), ('isa', 'instructions', ''), ('what', 'model', ''), ('time', 'time', '.2f'),
                 ('low', 'lower quartile', '.2f'), ('high', 'upper quartile', '.2f'), ('ms', 'ms', '.0f')]), '',
             'Where the deployed model\'s time goes, as shares of its operations under the profiler:', '',
             *markdown(tables['profiles'], [('net', 'network', ''), ('isa', 'instructions', ''), ('bits', 'bits', ''),
                                            *((key, key, '.2f') for key in shares)]), '']
    if tables['accuracy']:
        lines += ['Trained networks on validation images; agreement is the share of images for which the prediction is '
                  'that of the network in float32:',
                  '', *markdown(tables['accuracy'], [
                      ('data', 'data', ''), ('model', 'model', ''), ('T', 'T', ''), ('images', 'images', ''),
                      ('what', 'computed', ''), ('top1', 'top-1', '.2f'), ('agreement', 'agreement, %', '.2f')]), '']
    return [*lines, f'`python benchmarks/deploy.py`.{apart(deploy_ratios())}']


def first_steps() -> List[str]:
    newest = runs('first_steps')[0]
    return ['## First steps', '',
            f'From the command to the end of the tenth step, ResNet-18, T = {newest["timesteps"]}, batch '
            f'{newest["batch_size"]}, {newest["size"]} x {newest["size"]}; "cold" has an empty compile cache, "warm" '
            f'one that an earlier run has filled. The ANN under `accelerate launch`, on T times as many images, is 1:',
            '',
            *markdown([{**row, 'spread': spread(row)} for row in newest['tables']['steps']], [
                ('what', 'command', ''), ('time', 'time', '.2f'), ('spread', 'quartiles', ''), ('seconds', 's', '.1f'),
                ('processor_time', 'processor time', '.2f'), ('processor_seconds', 'processor s', '.1f')]), '',
            f'`python benchmarks/first_steps.py`.{measured_on(newest)}']


def scaling() -> List[str]:
    newest = runs('scaling')[0]
    return ['## Growth with T', '',
            f'Step of a ResNet-18, T = 1 to 32, batch {newest["batch"]}, 112 x 112, channels_last: the cost of a '
            f'further timestep; the ANN\'s cost of as many further images is 1:', '',
            *markdown(newest['tables']['growth'], [
                ('what', 'slope', ''), ('ratio', 'ratio', '.2f'), ('off_the_line_percent', 'off the line, %', '.1f'),
                ('per_step_of_T', 'per timestep', '.3g')]), '',
            f'`python benchmarks/scaling.py`, which draws it over T, batch and resolution.{measured_on(newest)}', '',
            f'![Time and memory over T, batch and resolution]({FIGURES}/scaling.png)']


def write_page() -> None:
    lines = ['Medians of interleaved runs, as ratios. Another machine has other ratios.', '']
    for section in (neuron, train_step, loss, first_steps, scaling, deployed):
        lines += [*section(), '']
    write_section(PAGE, BEGIN, END, lines)
    print(f'{PAGE}: tables written')


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--run', action='store_true', help='measure what was not measured on this machine')
    parser.add_argument('--only', default='', metavar='NAME', help='--run: pieces whose name contains NAME')
    parser.add_argument('--wrap', default='', metavar='COMMAND', help='--run: command that runs each piece')
    parser.add_argument('--list', action='store_true', help='name the pieces, and which were measured here')
    return parser


def main() -> None:
    args = create_parser().parse_args()
    if args.list:
        for piece in pieces():
            print(f'{"measured" if measured_here(piece.name) else "missing "}  {piece.name}')
        return
    if args.run:
        run_missing(args.only, args.wrap)
    write_page()


if __name__ == '__main__':
    main()
