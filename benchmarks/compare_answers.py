"""Answers of a comparison: what its plan asks, the pairs of runs, and the reading of their interval by fixed rules."""
from pathlib import Path
from typing import Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from compare_data import Row, setting
from compare_plan import ComparisonPlan
from compare_statistics import (
    CONFIDENCE, MARGIN, Interval, bootstrap_difference, detectable_difference, equivalence_test, holm,
    paired_differences, sd_interval, t_interval, t_test)
from trials import decode_correct

LEVEL = 1 - CONFIDENCE

RULES = (
    f'An interval that excludes 0 (and, for the comparisons corrected together, an adjusted p below {LEVEL:.2f}): the '
    f'one is better, by the interval. Else an interval within ± {MARGIN:g}: no difference of more than half a point. '
    f'Else: undecided, with the difference that so many pairs would find in 80 % of cases, at the SD they have.')


class Plan(NamedTuple):
    """What a plan's file says about its comparison."""
    name: str
    question: str
    primary: Tuple[str, str]  # arm and control
    comparisons: Sequence[Tuple[str, str]]  # further ones, corrected together
    seeds: int  # planned pairs of the primary comparison, or the least number where a pilot decides
    compared: Sequence[str]  # arms that the comparison has from the start
    file: ComparisonPlan
    stopping: str
    labels: Mapping[str, str]

    def label(self, name: str) -> str:
        return self.labels.get(name, name)

    def planned(self, rows: Sequence[Row]) -> int:
        """Return the planned pairs of the primary comparison, by the pilot's SD if the plan says so."""
        powered = 'power' in self.file.content and self.file.pilot_sd(rows)
        return self.file.pairs(rows) if powered else self.seeds


class Comparison(NamedTuple):
    """Differences arm - control of runs with the same seed."""
    arm: str
    control: str
    differences: Mapping[int, float]
    missing: Sequence[str]  # why seeds have no pair
    interval: Optional[Interval]
    p: Optional[float]
    adjusted: Optional[float]  # p after Holm's correction; None for the primary comparison
    family: int  # number of comparisons that are corrected together
    bootstrap: Optional[Interval]

    @property
    def pairs(self) -> int:
        return len(self.differences)

    @property
    def values(self) -> List[float]:
        return list(self.differences.values())

    @property
    def sd(self) -> Optional[Interval]:
        return sd_interval(self.values)

    @property
    def detectable(self) -> Optional[float]:
        return None if self.sd is None or self.sd.mean == 0 else detectable_difference(self.pairs, self.sd.mean)

    @property
    def decided(self) -> bool:
        """Whether one of both is better: the interval excludes 0, and so does the corrected test, if there is one."""
        return self.interval is not None and self.interval.excludes(0.) and (
            self.adjusted is None or self.adjusted < LEVEL)

    @property
    def equivalence(self) -> Optional[float]:
        return equivalence_test(self.values)


# ---- pairs

def primary_rows(rows: Sequence[Row], phase: str = 'primary') -> List[Row]:
    return [row for row in rows if row['phase'] == phase]


def groups(rows: Sequence[Row]) -> List[List[Row]]:
    """Return the runs of a phase, all together if every arm has one setting, else by setting."""
    settings: Dict[str, set] = {}
    for row in rows:
        settings.setdefault(row['arm'], set()).add(setting(row))
    if all(len(of) == 1 for of in settings.values()):
        return [list(rows)] if rows else []
    return [[row for row in rows if setting(row) == where] for where in dict.fromkeys(map(setting, rows))]


def by_seed(rows: Sequence[Row], name: str, key: str = 'top1') -> Dict[int, float]:
    """Return a value of an arm's finished runs by seed."""
    return {row['seed']: row[key] for row in rows if row['arm'] == name and row['status'] == 'ok'}


def missing_pairs(rows: Sequence[Row], names: Tuple[str, str], label: Callable[[str], str] = str) -> List[str]:
    """Return a text for each reason why seeds that one of two arms has, or tried, are no pair: which arm has no run, or
    failed with which error.
    """
    found = [by_seed(rows, name) for name in names]
    errors = {(row['arm'], row['seed']): row.get('error') or 'no error is noted'
              for row in rows if row['status'] != 'ok'}
    seeds = sorted(set(found[0]) | set(found[1]) | {seed for name, seed in errors if name in names})
    reasons: Dict[str, List[int]] = {}
    for seed in seeds:
        for name, values in zip(names, found):
            if seed not in values:
                error = errors.get((name, seed))
                why = 'has no run' if error is None else f'failed ({first_line(error)})'
                reasons.setdefault(f'{label(name)} {why}', []).append(seed)
    return [f'{why}: seed{"s" if len(of) > 1 else ""} {ranges(of)}' for why, of in reasons.items()]


def ranges(numbers: Sequence[int]) -> str:
    """Return ascending numbers with runs of them shortened: '1, 3 to 5'."""
    runs: List[List[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ', '.join(str(r[0]) if len(r) == 1 else f'{r[0]}{", " if len(r) == 2 else " to "}{r[-1]}' for r in runs)


def first_line(text: str, length: int = 100) -> str:
    line = (text.strip().splitlines() or [''])[0].replace('|', '/')
    return line if len(line) <= length else line[:length - 3] + '...'


def compare(rows: Sequence[Row], plan: Plan, pairs: Sequence[Tuple[str, str]], draws: int = 10_000) -> List[Comparison]:
    """Return the comparisons of these pairs of arms. All but the plan's primary one are corrected together by Holm.

    Args:
        rows: Runs of one phase and one setting.
        plan: The plan.
        pairs: (arm, control).
        draws: Draws of the bootstrap over seeds and images.
    """
    found = []
    for pair in pairs:
        differences = paired_differences(by_seed(rows, pair[0]), by_seed(rows, pair[1]))
        values = list(differences.values())
        found.append(Comparison(*pair, differences, missing_pairs(rows, pair, plan.label), t_interval(values),
                                t_test(values), None, 1, bootstrap(rows, pair, list(differences), draws)))
    family = [i for i, c in enumerate(found) if (c.arm, c.control) != plan.primary and c.p is not None]
    for i, p in zip(family, holm([found[i].p or 0. for i in family])):
        found[i] = found[i]._replace(adjusted=p, family=len(family))
    return found


def bootstrap(
        rows: Sequence[Row], pair: Tuple[str, str], seeds: Sequence[int], draws: int) -> Optional[Interval]:
    """Return the seeds-by-images bootstrap of a difference; None for fewer than two pairs with results per image."""
    bits = [{row['seed']: decode_correct(row) for row in rows
             if row['arm'] == name and row['seed'] in seeds and row.get('correct')} for name in pair]
    common = sorted(set(bits[0]) & set(bits[1]))
    if len(common) < 2 or len({len(of[seed]) for of in bits for seed in common}) != 1:
        return None
    return bootstrap_difference(*(np.stack([of[seed] for seed in common]) for of in bits), draws=draws)


# ---- words

def half_a_point(margin: float = MARGIN) -> str:
    return 'half a point' if margin == .5 else f'{margin:g} points'


def reading(c: Comparison, plan: Plan) -> str:
    """Return what a comparison says, by `RULES`."""
    a, b = plan.label(c.arm), plan.label(c.control)
    if c.interval is None:
        return f'undecided between {a} and {b}: {c.pairs} pair{"" if c.pairs == 1 else "s"}'
    if c.decided:
        better, worse = (a, b) if c.interval.mean > 0 else (b, a)
        low, high = sorted(map(abs, (c.interval.low, c.interval.high)))
        return f'{better} is better than {worse} by {low:.2f} to {high:.2f} points'
    if c.interval.within(MARGIN):
        return f'no difference of more than {half_a_point()} between {a} and {b}'
    text = f'undecided between {a} and {b}'
    if c.interval.excludes(0.):
        text += f' (the interval excludes 0, but not after correction for {c.family} comparisons)'
    if c.detectable is None:
        return text
    return f'{text}; {c.pairs} pairs would find {c.detectable:.2f} points or more in 80 % of cases'


def difference_text(interval: Optional[Interval]) -> str:
    return '-' if interval is None else f'{interval.mean:+.2f} ± {interval.half:.2f}'


def answer(c: Comparison, plan: Plan, planned: int) -> str:
    """Return the sentence on a comparison: its reading, the numbers, and whether pairs of the primary one are missing.
    """
    text = reading(c, plan)
    sentence = text[0].upper() + text[1:]
    if c.interval is not None:
        sentence += f' ({plan.label(c.arm)} minus {plan.label(c.control)}: {difference_text(c.interval)}, ' \
                    f'{c.pairs} pairs)'
    if c.pairs < planned and (c.arm, c.control) == plan.primary:
        sentence = f'Preliminary, {c.pairs} of {planned} planned pairs: {sentence}'
    return sentence + '.'


def summary_line(c: Comparison, plan: Plan, rows: Sequence[Row], planned: int) -> str:
    """Return the primary comparison in one line, for README.

    Args:
        c: The primary comparison.
        plan: The plan.
        rows: Runs of the comparison.
        planned: Planned pairs.
    """
    row = next(row for row in rows if row['arm'] in plan.primary)
    scale = row['scale']
    where = f"{row['arch']} at width {scale['width']}, {scale['classes']} classes of CIFAR-100 ({scale['data']}), " \
            f"T={row['timesteps']}, {scale['epochs']} epochs"
    return f'{answer(c, plan, planned)[:-1]}; {where}.'


# ---- the plan's file

def read_plan(file: Path) -> Plan:
    """Read a plan.

    Without `further`, every other arm is compared with the control of the primary comparison.

    Raises:
        ValueError: A field is missing, or a comparison names an arm that the plan lacks.
    """
    plan = ComparisonPlan(file)
    content = plan.content
    labels = {name: arm.get('label', name) for name, arm in plan.arms.items()}
    primary = tuple(content['primary'])
    further = [tuple(pair) for pair in content.get('further', [(arm, primary[1]) for arm in labels])]
    for name in {name for pair in (primary, *further) for name in pair} - set(labels):
        raise ValueError(f"{file}: a comparison names the arm '{name}'; there are {', '.join(labels)}.")
    further = [pair for pair in further if pair != primary and pair[0] != pair[1]]
    return Plan(plan.name, _line(content['question']), primary, further, int(content['seeds']),
                list(plan.phases.get('primary', {}).get('arms', [])), plan, _line(content['stopping']), labels)


def _line(text: str) -> str:
    return ' '.join(str(text).split())
