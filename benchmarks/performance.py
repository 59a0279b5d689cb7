#!/usr/bin/env python3
r"""Write the performance page's tables from the JSON files of the speed benchmarks.

    python benchmarks/neuron.py && python benchmarks/train_step.py && python benchmarks/loss.py && \
        python benchmarks/scaling.py && python benchmarks/deploy.py && python benchmarks/performance.py
"""
import json
from typing import Any, Dict, List, Mapping, Sequence, Tuple

from harness import RESULTS
from pages import FIGURES, PAGES, write_section

PAGE = PAGES / 'performance.md'
BEGIN, END = '<!-- performance: written by benchmarks/performance.py -->', '<!-- end of performance -->'


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
    pairs = [v for v in both(name, table, key, value).values() if len(v) == 2]
    if not pairs:
        return ''
    apart = sorted(abs(a - b) / min(a, b) for a, b in pairs)
    return (f' Two runs differ by {100 * apart[len(apart) // 2]:.0f} % in the median row and {100 * apart[-1]:.0f} % '
            f'in the worst.')


def neuron() -> List[str]:
    newest = runs('neuron')[0]
    rows = newest['tables']['ratios']
    cases = [key for key in rows[0] if key != 'neuron']
    return ['## One neuron layer', '',
            'Forward and backward of one layer, T = 4 on a batch of 32 maps of 64 x 32 x 32, memory kept between '
            'calls; ReLU on the same tensor is 1:', '',
            *markdown(rows, [('neuron', 'layer', ''), *((case, case, '.2f') for case in cases)]), '',
            f'`python benchmarks/neuron.py`.{agreement("neuron", "ratios", "neuron", cases[0])}']


def train_step() -> List[str]:
    newest = runs('train_step')[0]
    batch = newest['batch_size']
    return ['## A training step', '',
            f'Training step of a ResNet-18, T = 4, 112 x 112: time on {batch} images, peak memory on {2 * batch}; the '
            f'ANN sees four times as many images and is 1:', '',
            *markdown(newest['tables']['steps'], [
                ('step', 'step', ''), ('time', 'time', '.2f'), ('memory', 'memory', '.2f'),
                ('process_memory', 'memory of the process', '.2f'), ('seconds', 's', '.2f'),
                ('MiB', 'MiB', '.0f')]), '',
            '"Memory" is that of tensors, measured with glibc giving every freed block back; "of the process" '
            'includes the holes that it keeps by default. Under torch.compile the compiler\'s own memory would count, '
            'so it is left out. '
            f'`python benchmarks/train_step.py`.{agreement("train_step", "steps", "step", "time")}']


def loss() -> List[str]:
    newest = runs('loss')[0]
    return ['## The losses', '',
            f'What the losses add to a step (ResNet-18, T = 4, batch {newest["batch_size"]}, {newest["size"]} x '
            f'{newest["size"]}), in percent of the step with cross-entropy alone:', '',
            *markdown(newest['tables']['parts'], [
                ('part', 'part', ''), ('percent_of_step', '% of the step', '.1f'), ('seconds', 's', '.3f')]), '',
            '`python benchmarks/loss.py`.']


def deployed() -> List[str]:
    newest = runs('deploy')[0]
    cpu, tables = newest['machine'], newest['tables']
    shares = [key for key in tables['profiles'][0] if key not in ('isa', 'net', 'bits')]
    lines = ['## Int8 inference', '',
             f'A forward of the [deployed](deploy.md) model, T = {newest["timesteps"]}, on one thread of {cpu["cpu"]}, '
             f'torch {cpu["torch"]}: 8 images of 112 x 112 for the ResNet-18, 16 of 32 x 32 for the VGG-16. The ANN '
             f'gets T times as many images; in float32, in its faster memory format, it is 1. CPU times, medians of '
             f'interleaved rounds; the machine was shared. With AVX2 alone there are no int8 dot products (VNNI, AMX):',
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
    return [*lines, '`python benchmarks/deploy.py`.']


def scaling() -> List[str]:
    newest = runs('scaling')[0]
    return ['## Growth with T', '',
            'Growth with T (batch 4, 112 x 112, channels_last), per further step beside the ANN\'s cost of as many '
            'further images:', '',
            *markdown(newest['tables']['growth'], [
                ('what', 'slope', ''), ('per_step_of_T', 'per step of T', '.3g'),
                ('off_the_line_percent', 'off the line, %', '.1f')]), '',
            '`python benchmarks/scaling.py`, which draws it over T, batch and resolution:', '',
            f'![Time and memory over T, batch and resolution]({FIGURES}/scaling.png)']


def main() -> None:
    machine, threads = runs('neuron')[0]['machine'], runs('neuron')[0]['threads']
    versions = ', '.join(f'{k} {machine[k]}' for k in ('torch', 'timm', 'spikingjelly', 'snntorch') if machine[k])
    capability = machine.get('cpu_capability', 'instructions not recorded')
    lines = [f'Measured on {machine["cores"]} cores of {machine["cpu"]} ({capability}; {threads} threads), '
             f'{machine["memory_gib"]} GiB, Python {machine["python"]}, {versions}; medians of interleaved '
             f'runs, as ratios.', '']
    for section in (neuron, train_step, loss, scaling, deployed):
        lines += [*section(), '']
    write_section(PAGE, BEGIN, END, lines)
    print(f'{PAGE}: tables written')


if __name__ == '__main__':
    main()
