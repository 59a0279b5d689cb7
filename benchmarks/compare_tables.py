"""Tables of a comparison in Markdown."""
import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from compare_answers import Comparison, Plan, by_seed, difference_text, first_line
from compare_data import Row, setting
from compare_statistics import MARGIN, pairs_for_power, sd_interval, t_interval

# settings of a trial that may differ between the configurations of an arm
CONFIG = 'model', 'losses', 'loss_options', 'criterion', 'step_ce', 'task_weight', 'optimizer', 'teacher'


def table(headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> List[str]:
    """Return a Markdown table; None is an empty cell."""
    lines = ['| ' + ' | '.join(headings) + ' |', '|---' * len(headings) + '|']
    return lines + ['| ' + ' | '.join('' if cell is None else str(cell) for cell in row) + ' |' for row in rows]


def arms_of(rows: Sequence[Row]) -> List[str]:
    return list(dict.fromkeys(row['arm'] for row in rows))


def mean_of(rows: Sequence[Row], name: str, key: str, per_trial: bool = False) -> Optional[float]:
    """Return the mean of a value over an arm's finished runs; per_trial divides it by the trials side by side."""
    values = [row[key] / (row.get('replicas') or 1 if per_trial else 1) for row in rows
              if row['arm'] == name and row['status'] == 'ok' and row.get(key) is not None]
    return float(np.mean(values)) if values else None


def number(value: Optional[float], spec: str = '.2f') -> Optional[str]:
    return None if value is None else format(value, spec)


def accuracy_text(values: Sequence[float]) -> str:
    interval = t_interval(values)
    if interval is not None:
        return f'{interval.mean:.2f} ± {interval.half:.2f}'
    return f'{values[0]:.2f} (one run)' if len(values) else '-'


def p_text(p: Optional[float]) -> Optional[str]:
    return None if p is None else '<0.001' if p < .001 else f'{p:.3f}'


def comparison_table(comparisons: Sequence[Comparison], plan: Plan) -> List[str]:
    """Return one line per comparison: pairs, difference, both intervals, SD, p values and the detectable difference."""
    lines = []
    for c in comparisons:
        b, sd = c.bootstrap, c.sd
        primary = (c.arm, c.control) == plan.primary
        lines.append([
            f'{plan.label(c.arm)} minus {plan.label(c.control)}' + (' (primary)' if primary else ''), c.pairs,
            difference_text(c.interval), b and f'{b.low:+.2f} to {b.high:+.2f}',
            sd and f'{sd.mean:.2f} ({sd.low:.2f} to {sd.high:.2f})', p_text(c.p), p_text(c.adjusted),
            p_text(c.equivalence), number(c.detectable)])
    return table(['difference', 'pairs', 'points (95 %)', 'seeds and images resampled (95 %)', 'SD of pairs (95 %)',
                  'p', 'p, Holm', f'p of ± {MARGIN:g}', 'found in 80 %'], lines)


def arm_table(
        rows: Sequence[Row],
        plan: Plan,
        comparisons: Sequence[Comparison],
        tried: Mapping[str, int],
        names: Sequence[str],
) -> List[str]:
    """Return one line per arm: runs, accuracy, difference to the control, tried configurations, rates and costs.

    Args:
        rows: Runs of one phase and one setting.
        plan: The plan.
        comparisons: The arms' differences to one control; none leaves the column out.
        tried: Number of tried configurations by arm; none leaves the column out.
        names: The arms. Costs are relative to the first one's.
    """
    against = {c.arm: c for c in comparisons}
    several = len(set(map(setting, rows))) > 1
    lines = []
    for name in names:
        values = list(by_seed(rows, name).values())
        failed = sum(row['arm'] == name and row['status'] != 'ok' for row in rows)
        cells = [plan.label(name), *([where_of(rows, name)] if several else []), len(values), failed,
                 accuracy_text(values)]
        if against:
            c = against.get(name)
            cells += [c and difference_text(c.interval), c and p_text(c.p if c.adjusted is None else c.adjusted)]
        if tried:
            cells.append(tried.get(name, 0))
        lines.append([*cells, number(mean_of(rows, name, 'firing_rate'), '.3f'),
                      number(mean_of(rows, name, 'energy'), '.3f'),
                      number(mean_of(rows, name, 'ms_per_step', True)),
                      number(relative(rows, names, name, 'ms_per_step')),
                      number(mean_of(rows, name, 'peak_memory', True), '.0f'),
                      number(relative(rows, names, name, 'peak_memory')), replicas_text(rows, name)])
    difference = [f'minus {plan.label(comparisons[0].control)} (95 %)', 'p, Holm'] if against else []
    headings = ['arm', *(['where'] if several else []), 'runs', 'failed', 'top-1 (95 %)', *difference,
                *(['configurations tried'] if tried else []), 'firing rate', 'energy, ANN = 1', 'ms per step',
                'relative', 'MiB', 'relative', 'side by side']
    return table(headings, lines)


def relative(rows: Sequence[Row], names: Sequence[str], name: str, key: str) -> Optional[float]:
    """Return an arm's cost relative to that of the first arm; None if their settings differ, or trials of several arms
    trained side by side, whose costs are known only together.
    """
    if where_of(rows, name) != where_of(rows, names[0]) or {replicas_text(rows, n) for n in (name, names[0])} != {'1'}:
        return None
    own, first = (mean_of(rows, n, key, True) for n in (name, names[0]))
    return own / first if own and first else None


def replicas_text(rows: Sequence[Row], name: str) -> str:
    """Return how many trials trained side by side: '8' or '4, 8'."""
    return ', '.join(str(n) for n in sorted({row.get('replicas') or 1 for row in rows
                                              if row['arm'] == name and row['status'] == 'ok'}))


def costs_table(file: Path, plan: Plan) -> List[str]:
    """Return the costs of the arms, each alone, that benchmarks/trial_costs.py measured; nothing without its file."""
    if not file.is_file():
        return []
    with open(file, newline='') as text:
        rows = list(csv.DictReader(text))
    lines = [[plan.label(row['arm']), f"{float(row['ms']):.0f} ({float(row['low']):.0f} to {float(row['high']):.0f})",
              f"{float(row['relative']):.2f}", f"{float(row['mib']):.0f}", f"{float(row['relative_mib']):.2f}"]
             for row in rows]
    where = f"{rows[0]['device']}, {rows[0]['threads']} thread{'' if rows[0]['threads'] == '1' else 's'}, torch " \
            f"{rows[0]['torch']}, {rows[0]['rounds']} rounds"
    return ['', f'Costs of a step, each arm alone ({where}); memory is that of the tensors kept for the backward:', '',
            *table(['arm', 'ms (quartiles)', 'relative', 'MiB', 'relative'], lines)]


# ---- what was tried

def config_of(row: Row) -> Dict[str, Any]:
    return {key: row[key] for key in CONFIG if row.get(key) not in (None, {}, '', False) and
            (key, row[key]) not in (('teacher', 'same'), ('task_weight', 1))}


def config_text(row: Row) -> str:
    """Return the settings of a run in one line."""
    texts = []
    for key, value in config_of(row).items():
        if key == 'losses':
            texts += [f'{name} {weight:g}' for name, weight in value.items()]
        elif isinstance(value, Mapping):
            texts += [_option(f'{key}.{name}' if key == 'loss_options' else name, v) for name, v in value.items()]
        else:
            texts.append(_option(key, value))
    return ', '.join(texts).replace('|', '/') or 'defaults'


def _option(name: str, value: Any) -> str:
    if isinstance(value, Mapping):
        return ', '.join(f'{name.removeprefix("loss_options.")}.{k} {_plain(v)}' for k, v in value.items())
    return f'{name} {_plain(value)}'


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def tried_configurations(rows: Sequence[Row]) -> Dict[str, int]:
    """Return the number of different configurations of every arm in the phases before the comparison."""
    seen = {(row['arm'], config_text(row)) for row in rows if row['phase'] in ('tune', 'screen')}
    return dict(Counter(name for name, _ in seen))


def selection_table(rows: Sequence[Row], plan: Plan, phase: str) -> List[str]:
    """Return every configuration of a phase with its accuracy by seed."""
    groups: Dict[Any, List[Row]] = {}
    for row in rows:
        if row['phase'] == phase:
            groups.setdefault((setting(row), row['arm'], row.get('config', 0), config_text(row)), []).append(row)
    lines, arms = [], arms_of(rows)
    for (where, name, config, text), group in sorted(groups.items(), key=lambda i: (arms.index(i[0][1]), i[0][2])):
        values = [row['top1'] for row in sorted(group, key=lambda r: r['seed']) if row['status'] == 'ok']
        errors = [first_line(row.get('error', 'failed')) for row in group if row['status'] != 'ok']
        lines.append([plan.label(name), config, text, where_text(where), len(values),
                      number(float(np.mean(values))) if values else None,
                      ', '.join(f'{v:.1f}' for v in values), '; '.join(errors)])
    return table(['arm', 'no.', 'settings', 'where', 'runs', 'mean top-1', 'by seed', 'failed'], lines)


def where_of(rows: Sequence[Row], name: str) -> str:
    """Return where an arm ran."""
    return '; '.join(dict.fromkeys(where_text(setting(row)) for row in rows if row['arm'] == name))


def where_text(where: Tuple[str, int, str]) -> str:
    scale, timesteps, arch = where
    return f'{scale}, T = {timesteps}, {arch}'


def failure_table(rows: Sequence[Row], plan: Plan) -> List[str]:
    """Return every failed run of any phase with its error."""
    lines = [[plan.label(row['arm']), row['phase'], row['seed'], where_text(setting(row)),
              first_line(row.get('error', 'failed'), 160)] for row in rows if row['status'] != 'ok']
    return table(['arm', 'phase', 'seed', 'where', 'error'], lines) if lines else []


# ---- the pilot

def pilot_table(rows: Sequence[Row], plan: Plan, differences: Callable[[Sequence[Row]], Sequence[float]]) -> List[str]:
    """Return the spread of the pilot's paired differences by setting, without their sign or mean."""
    lines = []
    for where in dict.fromkeys(map(setting, rows)):
        values = differences([row for row in rows if setting(row) == where])
        sd = sd_interval(values)
        if sd is not None and sd.mean > 0:
            lines.append([where_text(where), len(values), f'{sd.mean:.2f} ({sd.low:.2f} to {sd.high:.2f})',
                          pairs_for_power(sd.mean, .5), pairs_for_power(sd.mean, 1.)])
    return table(['where', 'pairs', 'SD of the difference (95 %)', 'pairs for 0.5 points', 'for 1 point'], lines)


# ---- CKA

def layer_table(rows: Sequence[Row], plan: Plan, key: str) -> List[str]:
    """Return a statistic per arm and layer at the first and the last epoch, as means over the runs."""
    names = list(dict.fromkeys(layer for row in rows for layer in (row.get('layers') or {}).get('last', {})))
    lines = []
    for name in arms_of(rows):
        runs = [row['layers'] for row in rows if row['arm'] == name and row.get('layers')]
        cells = [_first_and_last(runs, layer, key) for layer in names]
        if any(cells):
            lines.append([plan.label(name), *cells])
    return table(['arm', *names], lines) if lines else []


def _first_and_last(runs: Sequence[Mapping[str, Any]], layer: str, key: str) -> Optional[str]:
    values = [[run[when][layer][key] for run in runs if run.get(when, {}).get(layer, {}).get(key) is not None]
              for when in ('first', 'last')]
    return ', '.join(f'{np.mean(v):.2f}' for v in values) if all(values) else None
