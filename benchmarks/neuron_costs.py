#!/usr/bin/env python3
"""Measure what every neuron, norm and residual costs, relative to the LIF.

    python benchmarks/neuron_costs.py
    python benchmarks/neuron_costs.py --part contiguous  # a piece of it; each keeps what the others measured
    python benchmarks/neuron_costs.py --page   # the page's tables from benchmarks/results/neuron_costs.json

Layers: forward and backward of one layer, T = 4 on a batch of 32 maps of 64 x 32 x 32, as in neuron.py. Steps: a
training step of a spiking ResNet-20 for CIFAR (width 16, T = 2, 100 images), as in train_step.py, and the memory of its
tensors at the peak. All variants of a table run in turn, round by round. The clock counts the processor's time of this
process, so that other work on the machine does not; it uses one thread.
"""
import json
import time
from pathlib import Path
from typing import Any, Dict, List, Mapping, Sequence

import torch
from harness import create_parser, interleave, keep_freed_memory, machine, output_of_fresh_process, save, show
from neuron import measure
from pages import PAGES, write_section
from performance import markdown
from train_step import Variant, create_step, measure_peak

from timm_sscl.neurons import create_neuron, list_neurons

PAGE = PAGES / 'neurons.md'
BEGIN, END = '<!-- costs: written by benchmarks/neuron_costs.py -->', '<!-- end of costs -->'
T_LAYER, T_STEP, BATCH, SIZE, WIDTH, CHANNELS = 4, 2, 100, 32, 16, 64
REFERENCE = 'lif'
LIMIT = 1.7  # of PLIF, KLIF and LTMD
LAYOUTS = 'contiguous', 'channels_last'
PARTS = *LAYOUTS, 'steps', 'memory'
STEPS: Dict[str, Dict[str, Any]] = {
    'lif': {},
    **{name: dict(neuron=name) for name in ('plif', 'klif', 'ltmd', 'glif', 'diet', 'ternary', 'ilif', 'psn')},
    'tebn': dict(norm='tebn'), 'sew': dict(residual='sew'), 'ms': dict(residual='ms')}


def variant(name: str) -> Variant:
    return Variant(arch='resnet20_cifar', options=dict(STEPS[name], width=WIDTH))


def ratios(timings: Mapping[str, Any], key: str) -> List[Dict[str, Any]]:
    """Return rows with the time of every variant relative to the LIF's, with quartiles, and milliseconds."""
    first = timings[REFERENCE].median
    return [{key: name, 'time': t.median / first, 'low': t.low / first, 'high': t.high / first,
             'milliseconds': 1e3 * t.median} for name, t in timings.items()]


def layers(layout: str, rounds: int) -> List[Dict[str, Any]]:
    """Return the costs of one layer of every neuron in a memory format."""
    names = [REFERENCE, *(name for name in list_neurons() if name != REFERENCE)]
    neurons = {name: create_neuron(name, timesteps=T_LAYER, channels=(CHANNELS, 1, 1)) for name in names}
    return ratios(measure(neurons, layout, torch.float32, rounds, time.process_time), 'neuron')


def steps(rounds: int) -> List[Dict[str, Any]]:
    """Return the times of a training step of every variant of the network."""
    return ratios(interleave({name: create_step(variant(name), BATCH, SIZE, T_STEP) for name in STEPS}, rounds,
                             clock=time.process_time), 'arm')


def peaks() -> Dict[str, float]:
    """Return the MiB of the tensors of a step at its peak by variant."""
    return {name: measure_peak(create_step(variant(name), BATCH, SIZE, T_STEP)) for name in STEPS}


def memory() -> List[Dict[str, Any]]:
    """Return the peaks, measured in another process, relative to the LIF's."""
    found = json.loads(output_of_fresh_process(__file__, 'memory', '--threads', '1'))
    return [dict(arm=name, MiB=mib, memory=mib / found[REFERENCE]) for name, mib in found.items()]


def known_tables(file: Path) -> Dict[str, Any]:
    """Return the newest tables of a file if they were measured on this machine with these versions, else none."""
    newest = json.loads(file.read_text())[0] if file.is_file() else {}
    return newest['tables'] if newest.get('machine') == machine() else {}


def measure_part(part: str, rounds: int) -> List[Dict[str, Any]]:
    if part == 'memory':
        return memory()
    return steps(rounds) if part == 'steps' else layers(part, rounds)


def page(newest: Mapping[str, Any]) -> List[str]:
    """Return the page's tables."""
    machine, tables = newest['machine'], newest['tables']
    by_neuron = {row['neuron']: dict(row, last=last['time']) for row, last in zip(tables['contiguous'],
                                                                                  tables['channels_last'])}
    over = [name for name in ('plif', 'klif', 'ltmd')
            if max(by_neuron[name]['time'], by_neuron[name]['last']) > LIMIT]
    said = 'PLIF, KLIF and LTMD stay within 1.7 times the LIF.' if not over else \
        f'Beyond 1.7 times the LIF: {", ".join(over)}.'
    return [
        '', f'On {machine["cpu"]}, one thread, float32, torch {machine["torch"]}, relative to the LIF with its '
            f'hand-written backward. Medians of {newest["rounds"]} interleaved rounds of processor time; the machine '
            f'did other work meanwhile. {said}', '',
        f'Forward and backward of one layer, T = {T_LAYER}, batch 32, maps of {CHANNELS} x 32 x 32:', '',
        *markdown(list(by_neuron.values()), [
            ('neuron', 'neuron', ''), ('time', 'time', '.2f'), ('low', 'lower quartile', '.2f'),
            ('high', 'upper quartile', '.2f'), ('last', 'channels_last', '.2f'), ('milliseconds', 'ms', '.1f')]), '',
        '`python benchmarks/neuron_costs.py`.', '', *(step_lines(tables) if 'steps' in tables else [])]


def step_lines(tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> List[str]:
    memory = {row['arm']: row for row in tables.get('memory', ())}
    rows = [{**row, **memory.get(row['arm'], {})} for row in tables['steps']]
    return [
        f'A training step of `spiking_resnet20_cifar`, width {WIDTH}, T = {T_STEP}, {BATCH} images; the memory is that '
        f'of tensors at the peak:', '',
        *markdown(rows, [
            ('arm', 'change', ''), ('time', 'time', '.2f'), ('low', 'lower quartile', '.2f'),
            ('high', 'upper quartile', '.2f'), ('milliseconds', 'ms', '.0f'), ('memory', 'memory', '.2f'),
            ('MiB', 'MiB', '.0f')]), '']


def main() -> None:
    parser = create_parser(__doc__, rounds=9)
    parser.add_argument('--page', action='store_true', help='no measurement: the tables from the JSON file')
    parser.add_argument('--part', choices=PARTS, help='only this part; the others stay as they were measured')
    parser.set_defaults(threads=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.worker:
        print(json.dumps(peaks()))
        return
    file = args.output / 'neuron_costs.json'
    if not args.page:
        keep_freed_memory()
        for part in [args.part] if args.part else PARTS:
            tables = {**known_tables(file), part: measure_part(part, args.rounds)}
            show(f'{part}, LIF = 1', tables[part])
            save(args.output, 'neuron_costs', {name: tables[name] for name in PARTS if name in tables},
                 rounds=args.rounds)
    newest = json.loads(file.read_text())[0]
    missing = [name for name in LAYOUTS if name not in newest['tables']]
    if missing:
        print(f'not measured yet: {", ".join(missing)}; the page stays as it is')
        return
    write_section(PAGE, BEGIN, END, page(newest))


if __name__ == '__main__':
    main()
