"""Tables and a figure from the results of gpu.py."""
import json
from pathlib import Path
from typing import Any, Dict, List, Mapping, Sequence

from gpu_cases import Ledger
from performance import markdown

__all__ = ['print_tests', 'print_bench', 'sections', 'draw']


def print_tests(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print how many checks passed, and those that failed."""
    failed = [row for row in rows if not row['ok']]
    print(f'\n{len(rows) - len(failed)} of {len(rows)} checks passed, in {sum(r["seconds"] for r in rows):.0f} s.')
    for row in failed[:50]:
        print(f'FAIL {row["case"]}: {row["error"].splitlines()[-1][:150]}')


def print_bench(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the ratios: neurons, steps, synchronisations, and what failed."""
    print()
    for row in rows:
        if not row['ok']:
            print(f'FAIL {row["case"]}: {row["error"].splitlines()[-1][:150]}')
        elif row.get('kind') == 'neuron':
            print(f'{row["case"]}: ' + ', '.join(f'{r["layer"]} {r["ratio"]:.2f}' for r in row['rows'][1:]))
        elif row.get('kind') == 'step':
            print(f'{row["case"]}: ANN {row["rows"][0]["ms"]:.1f} ms; ' + ', '.join(
                f'{r["step"]} {r["ratio"]:.2f}' + (f' (memory {r["memory"]:.2f})' if r['memory'] else '')
                for r in row['rows'][1:]))
        else:
            print(f'{row["case"]}: {row["ours_per_step"]:.1f} ours, {row["others_per_step"]:.1f} others per step; '
                  f'{row["places"]}')


def sections(folder: Path) -> List[str]:
    """Return the lines of a page's section from gpu_bench.jsonl and gpu_tests.jsonl of a folder."""
    bench = [row for row in Ledger(folder / 'gpu_bench.jsonl').rows() if row['ok']]
    tests = Ledger(folder / 'gpu_tests.jsonl').rows()
    return ['## On a GPU', '', _machine(folder), '', *_neuron_table(bench), *_step_table(bench), *_syncs(bench),
            *_tests(tests)]


def _machine(folder: Path) -> str:
    machine = json.loads((folder / 'gpu_machine.json').read_text())
    return (f'One {machine["gpu"] or machine["cpu"]}, PyTorch {machine["torch"]}, Triton {machine["triton"]}, timm '
            f'{machine["timm"]}; `python benchmarks/gpu.py --phase bench`. float32 is PyTorch\'s default: TF32 in '
            'convolutions, float32 in matrix products. bfloat16 is autocast. Ratios of medians, taken in turn.')


def _neuron_table(bench: Sequence[Mapping[str, Any]]) -> List[str]:
    cases = [row for row in bench if row.get('kind') == 'neuron']
    if not cases:
        return []
    rows: Dict[str, Dict[str, Any]] = {}
    for case in cases:
        for r in case['rows']:
            rows.setdefault(r['layer'], dict(layer=r['layer']))[case['case']] = r['ratio']
    columns = [(case['case'], case['case'].removeprefix('neuron, '), '.2f') for case in cases]
    shape = ' x '.join(map(str, cases[0]['shape']))
    return [f'Forward and backward of one layer on {shape} (T = 4 in the first axis); ReLU on the same tensor is 1:',
            '', *markdown(list(rows.values()), [('layer', 'layer', ''), *columns]), '']


def _step_table(bench: Sequence[Mapping[str, Any]]) -> List[str]:
    rows = []
    for case in (row for row in bench if row.get('kind') == 'step'):
        by = {r['step']: r for r in case['rows']}
        ann, spiking, packed = (by.get(kind, {}) for kind in ('ANN', 'spiking', 'spiking, packed'))
        rows.append(dict(
            case=case['case'].removeprefix('step '), time=spiking['ratio'], packed=packed.get('ratio'),
            memory=spiking['memory'], packed_memory=packed.get('memory'), ms=spiking['ms'], ann=ann['ms'],
            spread=(spiking['high'] - spiking['low']) / spiking['ms'] * 100))
    if not rows:
        return []
    return ['Training step (forward, cross-entropy, backward, SGD), T = 4; the ANN on four times as many images is 1:',
            '', *markdown(rows, [
                ('case', 'network', ''), ('time', 'time', '.2f'), ('memory', 'memory', '.2f'),
                ('packed', 'time, packed spikes', '.2f'), ('packed_memory', 'memory, packed spikes', '.2f'),
                ('ms', 'ms', '.1f'), ('ann', 'ms of the ANN', '.1f'), ('spread', 'quartiles apart, %', '.0f')]), '']


def _syncs(bench: Sequence[Mapping[str, Any]]) -> List[str]:
    return [f'{row["case"].capitalize()}: {row["ours_per_step"]:.1f} per step in this project\'s code, '
            f'{row["others_per_step"]:.1f} in other packages.\n' for row in bench if 'ours_per_step' in row]


def _tests(tests: Sequence[Mapping[str, Any]]) -> List[str]:
    if not tests:
        return []
    failed = [row['case'] for row in tests if not row['ok']]
    return [f'{len(tests) - len(failed)} of {len(tests)} checks against the CPU passed'
            + (f'; failed: {", ".join(failed)}.' if failed else '.')]


def draw(folder: Path, file: Path) -> None:
    """Draw time and memory of the steps relative to the ANN."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    cases = [row for row in Ledger(folder / 'gpu_bench.jsonl').rows() if row['ok'] and row.get('kind') == 'step']
    figure, axes = plt.subplots(1, 2, figsize=(11, 1 + .3 * len(cases)), sharey=True, layout='constrained')
    for axis, key, title in zip(axes, ('ratio', 'memory'), ('time', 'peak memory')):
        for offset, kind in ((-.2, 'spiking'), (.2, 'spiking, packed')):
            points = [(i + offset, r[key]) for i, case in enumerate(cases) for r in case['rows']
                      if r['step'] == kind and r[key] is not None]
            axis.barh([y for y, _ in points], [v for _, v in points], height=.38, label=kind)
        axis.axvline(1, color='black', linewidth=.8)
        axis.set_title(f'{title}, ANN on T times the images = 1')
    axes[0].set_yticks(range(len(cases)), [case['case'].removeprefix('step ') for case in cases])
    axes[0].invert_yaxis()
    axes[0].legend()
    figure.savefig(file)
    plt.close(figure)
