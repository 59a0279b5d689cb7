"""Figures of a comparison, in colours that are told apart without red and green (Okabe and Ito)."""
from pathlib import Path
from typing import Any, List, Mapping, Optional, Sequence, Tuple

import matplotlib
import numpy as np

from compare_answers import Comparison, Plan, by_seed
from compare_data import Row
from compare_statistics import MARGIN, t_interval

matplotlib.use('Agg')
import matplotlib.pyplot as plt

BLUE, ORANGE, GREEN, PURPLE, BLACK, GREY = '#0072B2', '#D55E00', '#009E73', '#CC79A7', '#000000', '#888888'
_WRAP = 24  # characters of a label's line


def wrap(text: str, width: int = _WRAP) -> str:
    """Break a label at spaces."""
    lines: List[str] = ['']
    for word in text.split(' '):
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append(word)
        else:
            lines[-1] = f'{lines[-1]} {word}'.strip()
    return '\n'.join(lines)


def _save(figure: Any, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110, bbox_inches='tight', metadata=dict(Software=None))
    plt.close(figure)


def draw_differences(comparisons: Sequence[Comparison], plan: Plan, file: Path, title: str) -> None:
    """Draw the paired difference of every seed with mean and 95 % interval, one row per comparison."""
    shown = [c for c in comparisons if c.pairs]
    figure, axis = plt.subplots(figsize=(8.5, 1.3 + .85 * len(shown)))
    _differences(axis, shown, [
        wrap(f'{plan.label(c.arm)} minus {plan.label(c.control)}', 34) + f'\n({c.pairs} pairs)' for c in shown])
    axis.set_title(title, fontsize=11)
    axis.set_xlabel('difference in top-1, same seed (points)')
    _save(figure, file)


def _differences(axis: Any, shown: Sequence[Comparison], labels: Sequence[str]) -> None:
    axis.axvspan(-MARGIN, MARGIN, color=GREY, alpha=.15, lw=0, label=f'± {MARGIN:g} points')
    axis.axvline(0, color=BLACK, lw=.8)
    for i, c in enumerate(shown):
        _row(axis, i, c.values, _color(c))
    axis.plot([], [], 'o', color=GREY, ms=4, alpha=.6, label='one seed')
    for color, meaning in ((BLUE, 'one is better'), (GREEN, f'within ± {MARGIN:g}'), (ORANGE, 'undecided')):
        axis.errorbar([], [], xerr=1, fmt='D', color=color, capsize=4, ms=6, label=f'mean, 95 %: {meaning}')
    axis.set_yticks(range(len(shown)), labels, fontsize=9)
    axis.set_ylim(len(shown) - .5, -.5)
    axis.grid(axis='x', alpha=.3)
    axis.legend(fontsize=8, loc='upper center', bbox_to_anchor=(.5, -.32 / max(1, len(shown)) - .12), ncol=3,
                frameon=False)


def _color(c: Comparison) -> str:
    if c.decided:
        return BLUE
    return GREEN if c.interval is not None and c.interval.within(MARGIN) else ORANGE


def _row(axis: Any, y: float, values: Sequence[float], color: str) -> None:
    """Draw values as dots around a line, with their mean and interval above."""
    order = np.argsort(values)
    offsets = np.empty(len(values))
    offsets[order] = .12 + .14 * (np.arange(len(values)) % 3) / 2  # three lines, so that equal values stay visible
    axis.plot(values, y + offsets, 'o', color=GREY, ms=4, alpha=.6)
    interval = t_interval(values)
    if interval is None:
        axis.plot(np.mean(values), y - .12, 'D', color=color, ms=6)
    else:
        axis.errorbar(interval.mean, y - .12, xerr=interval.half, fmt='D', color=color, capsize=4, ms=6, lw=1.8)


def draw_arms(
        rows: Sequence[Row],
        names: Sequence[str],
        comparisons: Sequence[Comparison],
        plan: Plan,
        file: Path,
        title: str,
        costs: Optional[Mapping[str, Sequence[Optional[float]]]] = None,
) -> None:
    """Draw the accuracy of every arm with its 95 % interval, the paired difference to the control, and costs as bars.

    Args:
        rows: Runs of one phase and one setting.
        names: The arms, from top to bottom.
        comparisons: Differences to one control.
        plan: The plan.
        file: File to write.
        title: Title.
        costs: {label: cost of every arm, relative to the first one}.
    """
    against = {c.arm: c for c in comparisons}
    panels = 2 + bool(costs)
    figure, axes = plt.subplots(1, panels, figsize=(4.6 * panels, 1.6 + .55 * len(names)), sharey=True)
    for i, name in enumerate(names):
        values = list(by_seed(rows, name).values())
        if values:
            _row(axes[0], i, values, BLACK)
        else:
            axes[0].text(.5, i, 'no finished run', transform=axes[0].get_yaxis_transform(), ha='center', va='center',
                         fontsize=9, color=GREY)
        c = against.get(name)
        if c is not None and c.pairs:
            _row(axes[1], i, c.values, _color(c))
    axes[0].set_yticks(range(len(names)), [wrap(plan.label(name)) for name in names], fontsize=9)
    axes[0].set_ylim(len(names) - .5, -.5)
    axes[0].set_xlabel('top-1 of the last epoch (%)')
    control = plan.label(comparisons[0].control) if comparisons else 'control'
    axes[1].axvspan(-MARGIN, MARGIN, color=GREY, alpha=.15, lw=0)
    axes[1].axvline(0, color=BLACK, lw=.8)
    axes[1].set_xlabel(f'minus {control}, same seed (points)')
    for axis in axes:
        axis.grid(axis='x', alpha=.3)
    if costs:
        _costs(axes[2], costs)
    figure.suptitle(title, fontsize=11, y=.99)
    figure.text(.5, 0, 'dots: one seed each; diamonds: mean and 95 % interval, blue if one is better, green if '
                       f'within the grey band of ± {MARGIN:g} points, orange if undecided',
                ha='center', va='top', fontsize=8)
    figure.tight_layout()
    _save(figure, file)


def _costs(axis: Any, costs: Mapping[str, Sequence[Optional[float]]]) -> None:
    height = .8 / len(costs)
    looks: Sequence[Tuple[str, str]] = [(BLUE, ''), (ORANGE, '///'), (GREEN, '...'), (PURPLE, 'xx')]
    for k, ((label, values), (color, hatch)) in enumerate(zip(costs.items(), looks)):
        at = [i - .4 + (k + .5) * height for i in range(len(values))]
        axis.barh(at, [v or 0. for v in values], height, color=color, alpha=.75, hatch=hatch, label=label,
                  edgecolor='white')
    axis.axvline(1, color=BLACK, lw=.8)
    axis.set_xlabel('cost relative to ' + 'the first arm')
    axis.legend(fontsize=8, loc='lower right')
