"""Results of the ablation: CSV files of finished runs, paired intervals, tables, the figure and the results page."""
import csv
import json
import math
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any, Dict, Iterable, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import matplotlib
import numpy as np
import yaml
from scipy import stats

from ablation_runs import Run, finished_runs, recorded_device
from pages import FIGURES, PAGES, write_section

matplotlib.use('Agg')
import matplotlib.pyplot as plt

RUNS_CSV, LAYERS_CSV, GRADIENTS_CSV = 'ablation_runs.csv', 'ablation_layers.csv', 'ablation_gradients.csv'
FIGURE = 'ablation.png'
NOTES = 'ablation_notes.md'  # remarks on the numbers, written by hand and included in the page
BEGIN, END = '<!-- results: written by benchmarks/ablation.py -->', '<!-- end of results -->'
PAGE = PAGES / 'results.md'

# Table 3 of the paper: CIFAR-100, ResNet20, top-1 in percent by T
PAPER = {
    'none': {2: 68.27, 4: 71.45}, 'kd': {2: 68.74, 4: 71.72}, 'contrastive': {2: 69.25, 4: 72.16},
    'sscl': {2: 69.81, 4: 72.86},
}


class Facts(NamedTuple):
    """Scale of the runs as stated in the report; None for all."""
    classes: Optional[int]
    images_per_class: Optional[int]
    width: int
    epochs: int
    teacher_epochs: int
    recipe: str  # optimizer and batch of the students, in words
    precision: Optional[str]  # mixed precision that the recipe asks for


_LAYER_KEYS = ('cka', 'cka_running', 'weight', 'nce', 'mi_bound')


def collect(output: Path, scale: str) -> Tuple[List[Dict[str, Any]], List[Dict[str, Any]]]:
    """Return (one row per run, one row per run, epoch and layer) of all finished runs."""
    runs, layers = [], []
    for run, revision, folder in finished_runs(output):
        summary = json.loads((folder / 'summary.json').read_text())
        with open(folder / 'summary.csv') as epochs_file:
            epochs = list(csv.DictReader(epochs_file))
        settings = yaml.safe_load((folder / 'args.yaml').read_text())
        recipe = {name: settings[name] for name in ('opt', 'lr', 'weight_decay')}
        row = run_row(run._replace(options={**recipe, **run.options}), scale, summary, epochs, revision)
        runs.append({**row, 'precision': precision_of(settings), 'device': recorded_device(folder)})
        layers += layer_rows(run, epochs)
    return runs, layers


def run_row(
        run: Run,
        scale: str,
        summary: Mapping[str, Any],
        epochs: Sequence[Mapping[str, Any]],
        revision: str,
) -> Dict[str, Any]:
    """Return one row of results: the run, its metrics after the last epoch, and those of the best epoch, labelled."""
    rates = list(summary['firing_rates'].values())
    return dict(
        scale=scale, phase=run.phase, variant=run.variant, seed=run.seed, timesteps=run.timesteps, **run.options,
        epochs=len(epochs), top1_last=round(summary['student']['top1'], 2), top1_best=round(summary['best']['top1'], 2),
        best_epoch=summary['best']['epoch'] + 1, train_loss=round(float(epochs[-1]['train_loss']), 4),
        train_task_loss=_number(epochs[-1].get('train_task_loss')), val_loss=round(summary['student']['loss'], 4),
        teacher_top1=round(summary['teacher']['top1'], 2) if summary['teacher'] else None,
        firing_rate=round(float(np.mean(rates)), 4) if rates else None, seconds=summary['seconds'], revision=revision)


def precision_of(settings: Mapping[str, Any]) -> str:
    """Return the precision of a training with these options of train.py."""
    return settings['amp_dtype'] if settings.get('amp') else settings.get('model_dtype') or 'float32'


def _number(text: Optional[str]) -> Optional[float]:
    return None if text in (None, '') else round(float(text), 4)


def layer_rows(run: Run, epochs: Sequence[Mapping[str, Any]]) -> List[Dict[str, Any]]:
    """Return CKA, NCE, weight and MI bound per epoch and layer, averaged over the epoch's training steps."""
    prefix = 'train_mi_bound_'
    rows = []
    for epoch in epochs:
        for layer in (name[len(prefix):] for name in epoch if name.startswith(prefix)):
            values = {key: _short(epoch.get(f'train_{key}_{layer}')) for key in _LAYER_KEYS}
            rows.append(dict(
                phase=run.phase, variant=run.variant, seed=run.seed, timesteps=run.timesteps,
                epoch=int(epoch['epoch']) + 1, layer=layer, **values))
    return rows


def _short(text: Optional[str]) -> Optional[str]:
    return None if text in (None, '') else f'{float(text):.4g}'


def write_results(results: Path, runs: Sequence[Mapping[str, Any]], layers: Sequence[Mapping[str, Any]]) -> None:
    """Write the two CSV files for the result of `collect`."""
    outcome = ('epochs', 'top1_last', 'top1_best', 'best_epoch', 'train_loss', 'train_task_loss', 'val_loss',
               'teacher_top1', 'firing_rate', 'seconds', 'precision', 'device', 'revision')
    write_csv(results / RUNS_CSV, runs, outcome)
    write_csv(results / LAYERS_CSV, layers)


def write_csv(file: Path, rows: Sequence[Mapping[str, Any]], last: Sequence[str] = ()) -> None:
    """Write rows with all their keys as columns; the columns `last` come last."""
    columns = list(dict.fromkeys(key for row in rows for key in row if key not in last))
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, 'w', newline='') as out:
        writer = csv.DictWriter(out, [*columns, *last], lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)


def read_csv(file: Path) -> List[Dict[str, str]]:
    if not file.is_file():
        return []
    with open(file) as rows:
        return list(csv.DictReader(rows))


class Paired(NamedTuple):
    """Mean difference over pairs, and half the width of its 95 % interval (None with one pair)."""
    mean: float
    half: Optional[float]
    n: int


def paired_interval(a: Mapping[int, float], b: Mapping[int, float]) -> Optional[Paired]:
    """Return mean and 95 % interval (t distribution) of a - b over the seeds that both have.

    Args:
        a: Value by seed.
        b: Value by seed.

    Returns:
        None if there is no common seed.
    """
    differences = np.array([a[seed] - b[seed] for seed in a if seed in b])
    n = len(differences)
    if n == 0:
        return None
    half = None
    if n > 1:
        half = float(stats.t.ppf(0.975, n - 1) * differences.std(ddof=1) / math.sqrt(n))
    return Paired(float(differences.mean()), half, n)


def by_seed(rows: Sequence[Mapping[str, Any]], phase: str, variant: str, timesteps: int) -> Dict[int, float]:
    """Return the top-1 after the last epoch of a variant's runs, by seed."""
    return {int(row['seed']): float(row['top1_last']) for row in rows
            if (row['phase'], row['variant'], int(row['timesteps'])) == (phase, variant, timesteps)}


# ---- tables and figure

LABELS = OrderedDict(
    none='baseline (cross-entropy)', kd='distillation (logits)', contrastive='contrastive, uniform weights',
    contrastive_matched="contrastive, uniform at SSCL's total weight", sscl='SSCL', sscl_kd_step='SSCL + KL per step')

_SHORT = dict(none='baseline', kd='distillation', contrastive='contrastive', sscl='SSCL')


def comparison(rows: Sequence[Mapping[str, Any]], timesteps: int) -> List[Dict[str, Any]]:
    """Return a row per mode of the comparison: accuracy, paired difference to the baseline, the paper's values."""
    base = by_seed(rows, 'primary', 'none', timesteps)
    table = []
    for mode, label in LABELS.items():
        values = by_seed(rows, 'primary', mode, timesteps)
        if not values:
            continue
        best = [float(r['top1_best']) for r in rows if (r['phase'], r['variant'], int(r['timesteps'])) == (
            'primary', mode, timesteps)]
        paper = PAPER.get(mode, {}).get(timesteps)
        table.append(dict(
            mode=mode, label=label, seeds=len(values), top1=float(np.mean(list(values.values()))),
            best=float(np.mean(best)),
            difference=None if mode == 'none' else paired_interval(values, base), paper=paper,
            paper_difference=None if paper is None or mode == 'none' else paper - PAPER['none'][timesteps]))
    return table


def _paired_text(paired: Optional[Paired]) -> str:
    if paired is None:
        return ''
    return f'{paired.mean:+.2f}' + (f' ± {paired.half:.2f}' if paired.half is not None else ' (one seed)')


def _signed(value: Optional[float]) -> str:
    return '' if value is None else f'{value:+.2f}'


def comparison_lines(rows: Sequence[Mapping[str, Any]], timesteps: int) -> List[str]:
    """Return the comparison as a Markdown table."""
    lines = ['| mode | seeds | top-1, last epoch | best epoch | minus baseline (95 %) | paper | minus its baseline |',
             '|---|---|---|---|---|---|---|']
    for r in comparison(rows, timesteps):
        paper = '' if r['paper'] is None else f'{r["paper"]:.2f}'
        cells = [r['label'], r['seeds'], f'{r["top1"]:.2f}', f'{r["best"]:.2f}', _paired_text(r['difference']), paper,
                 _signed(r['paper_difference'])]
        lines.append('| ' + ' | '.join(map(str, cells)) + ' |')
    return lines


def verdict(rows: Sequence[Mapping[str, Any]], timesteps: int) -> str:
    """Return sentences on whether the modes are ordered as in the paper over the common seeds, and on SSCL's interval.
    """
    table = {r['mode']: r for r in comparison(rows, timesteps)}
    order = [mode for mode in PAPER if mode in table]
    sentences = []
    values = {mode: by_seed(rows, 'primary', mode, timesteps) for mode in order}
    common = set.intersection(*(set(v) for v in values.values())) if values else set()
    if len(order) > 1 and common:
        found = sorted(order, key=lambda mode: np.mean([values[mode][seed] for seed in sorted(common)]))
        seeds = '1 seed' if len(common) == 1 else f'{len(common)} seeds'
        theirs = 'as in the paper' if found == order else f"the paper's order is {_order(order)}"
        sentences.append(f'By the means over the {seeds} that all of these have: {_order(found)}; {theirs}.')
    paired = table['sscl']['difference'] if 'sscl' in table else None
    if paired is not None and paired.half is not None:
        sure = abs(paired.mean) > paired.half
        sentences.append(f'SSCL against the baseline: the interval {"excludes" if sure else "includes"} 0 '
                         f'({paired.n} seeds).')
    return ' '.join(sentences)


def _order(modes: Sequence[str]) -> str:
    return ' < '.join(_SHORT[mode] for mode in modes)


def pair_lines(rows: Sequence[Mapping[str, Any]], timesteps: int) -> List[str]:
    """Return paired differences between SSCL and other modes, in words."""
    sscl = by_seed(rows, 'primary', 'sscl', timesteps)
    parts = []
    for mode in ('kd', 'contrastive', 'contrastive_matched', 'sscl_kd_step'):
        paired = paired_interval(sscl, by_seed(rows, 'primary', mode, timesteps))
        if paired is not None:
            open_ = paired.half is None or abs(paired.mean) <= paired.half
            count = 'one seed' if paired.n == 1 else f'{paired.n} seeds'
            difference = f'{paired.mean:+.2f}' + ('' if paired.half is None else f' ± {paired.half:.2f}')
            parts.append(f'{LABELS[mode]} {difference} ({count}{", not told apart" if open_ else ""})')
    return [f'SSCL minus another mode, by the seeds that both have: {"; ".join(parts)}.'] if parts else []


_SETTINGS = ('critic', 'weight', 'temperature', 'cka_floor', 'cka_momentum', 'projection', 'weighting')


def selection_lines(rows: Sequence[Mapping[str, Any]]) -> List[str]:
    """Return all configurations tried on the held-out images as a table, with the difference to cross-entropy."""
    rows = [r for r in rows if r['phase'] == 'select' and r['variant'] != 'teacher']
    base = by_seed(rows, 'select', 'none', 2)
    lines = ['| ' + ' | '.join(name.replace('_', ' ') for name in _SETTINGS) + ' | top-1, by seed | difference |',
             '|---' * (len(_SETTINGS) + 2) + '|']
    for variant in sorted({r['variant'] for r in rows}, key=lambda name: (not name.startswith('none'), name)):
        values = by_seed(rows, 'select', variant, 2)
        first = next(r for r in rows if r['variant'] == variant)
        if variant.startswith(('none', 'kd')):
            name = variant.replace('none', 'cross-entropy alone').replace('kd-w', 'distillation, weight ')
            cells = [name.replace('_', ' ').replace('-float', ', float'), *[''] * (len(_SETTINGS) - 1)]
        else:
            cells = [str(first.get(f'sscl_{name}', '')) for name in _SETTINGS]
            cells[0] += ', float32' if variant.endswith('float32') else ''
        accuracy = ', '.join(f'{values[seed]:.1f}' for seed in sorted(values))
        paired = paired_interval(values, base)
        difference = '' if variant == 'none' or paired is None else f'{paired.mean:+.1f}'
        lines.append('| ' + ' | '.join([*cells, accuracy, difference]) + ' |')
    return lines


def gradient_lines(rows: Sequence[Mapping[str, Any]]) -> List[str]:
    """Return the ratio of gradient norms of the added terms and cross-entropy, by checkpoint and stage, as a table."""
    stages = list(dict.fromkeys(r['stage'] for r in rows))
    lines = ['| checkpoint | ' + ' | '.join(stages) + ' |', '|---' * (len(stages) + 1) + '|']
    for run in dict.fromkeys(r['run'] for r in rows):
        cells = []
        for stage in stages:
            row = next((r for r in rows if (r['run'], r['stage']) == (run, stage)), None)
            cells.append('' if row is None else f'{float(row["ratio"]):.2f} ({float(row["cosine"]):+.2f})')
        lines.append(f'| {run} | ' + ' | '.join(cells) + ' |')
    return lines


def conditions(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return precision and device of the runs behind a table, in words. Older runs recorded neither."""
    rows, sentences = list(rows), []
    for column, label in (('precision', 'Precision'), ('device', 'CPU or GPU')):
        counts = Counter(row.get(column) or 'not recorded' for row in rows)
        values = [f'{value} ({count} of {len(rows)} runs)' if len(counts) > 1 else value
                  for value, count in sorted(counts.items())]
        sentences.append(f'{label}: {"; ".join(values)}.')
    return ' '.join(sentences)


def page_lines(
        rows: Sequence[Mapping[str, Any]],
        layers: Sequence[Mapping[str, Any]],
        gradients: Sequence[Mapping[str, Any]],
        facts: Facts,
        notes: str = '',
) -> List[str]:
    """Return the section of the results page."""
    primary = [r for r in rows if r['phase'] == 'primary']
    teachers = {r['phase']: float(r['teacher_top1']) for r in rows if r['teacher_top1']}
    what = 'all' if facts.classes is None else f'{facts.classes} of 100'
    count = 'all their' if facts.images_per_class is None else f'{facts.images_per_class} of 500'
    asked = '' if facts.precision is None or any(r.get('precision') for r in primary) else f', {facts.precision}'
    lines = [
        f'The ablation follows the paper\'s Table 3 at a scale that two CPU cores carry: real CIFAR-100, {what} '
        f'classes, {count} training images per class, `resnet20_cifar` at width {facts.width}, {facts.epochs} epochs '
        f'of {facts.recipe}{asked}. The paper has all classes and images, width 64 and 400 epochs. The teacher is the '
        f'ANN of the same width, trained for {facts.teacher_epochs} epochs on the same images. It reaches '
        f'{teachers.get("primary", float("nan")):.2f} top-1, and all runs share it. **Nothing here reproduces the '
        'paper\'s numbers.** They stand beside ours so that the order and the size of the differences can be compared.',
        '', f'Settings of the loss: {settings_text(primary)}.', '',
        'Differences are paired by seed; ± is the half width of the 95 % interval (t distribution). "Best epoch" is '
        'what public code of this line of work reports; it is chosen on the validation set.', '']
    if not all(r.get('precision') and r.get('device') for r in rows):
        lines += [f'"Not recorded" below a table: its runs are older than the columns `precision` and `device` of '
                  f'`benchmarks/results/{RUNS_CSV}`.', '']
    for timesteps in sorted({int(r['timesteps']) for r in primary if int(r['timesteps'])}):
        lines += [f'## T = {timesteps}', '', f'Validation set ({100 * (facts.classes or 100):,} images):', '',
                  *comparison_lines(rows, timesteps), '',
                  conditions(r for r in primary if int(r['timesteps']) == timesteps), '', verdict(rows, timesteps),
                  *pair_lines(rows, timesteps), '']
    lines += [f'![Accuracy by mode, CKA and NCE per layer]({FIGURES}/{FIGURE})', '',
              '## CKA, weight and bound per layer', '', *cka_lines(layers), '',
              conditions(r for r in primary if (r['variant'], int(r['timesteps'])) == ('sscl', 2)), '',
              '## Every configuration that was tried', '',
              'The settings were chosen on a tenth of the training set held out (1,000 images, so that one run is '
              f'about ± 1.5 points; teacher {teachers.get("select", float("nan")):.2f} there). T = 2, one seed where '
              'one number stands:', '', *selection_lines(rows), '',
              conditions(r for r in rows if r['phase'] == 'select' and r['variant'] != 'teacher'), '']
    if gradients:
        lines += ['## Gradients of the terms', '',
                  'Gradient of what is added over that of cross-entropy: ratio of the norms by stage and, in brackets, '
                  'cosine between the two (`--phase diagnose`):', '', *gradient_lines(gradients), '',
                  conditions({r['run']: r for r in gradients}.values()), '']
    if notes:
        lines += ['## What these numbers do and do not say', '', notes.strip(), '']
    run = 'python benchmarks/ablation.py --output output/ablation'
    return [*lines, '## The commands', '', '```bash', f'{run} --data-dir CIFAR100 --phase select',
            f'{run} --data-dir CIFAR100 --phase primary  # --scale paper: full size', f'{run} --phase diagnose',
            f'{run} --report  # figure, tables and this page', '```', '']


def cka_lines(layers: Sequence[Mapping[str, Any]]) -> List[str]:
    """Return CKA, weight and MI bound of the comparison's sscl runs at T=2 after the first and the last epoch, as a
    table.
    """
    rows = [r for r in layers if (r['phase'], r['variant'], str(r['timesteps'])) == ('primary', 'sscl', '2')]
    if not rows:
        return []
    last = max(int(r['epoch']) for r in rows)
    names = list(dict.fromkeys(r['layer'] for r in rows))
    lines = ['SSCL, T = 2, means over the seeds, epoch 1 and ' + f'{last}:', '', '| | ' + ' | '.join(names) + ' |',
             '|---' * (len(names) + 1) + '|']
    for key, label in (('cka_running', 'running CKA'), ('weight', 'weight 1/CKA'), ('mi_bound', 'MI bound, nats')):
        cells = []
        for name in names:
            first, end = (np.mean([float(r[key]) for r in rows if (r['layer'], int(r['epoch'])) == (name, epoch)])
                          for epoch in (1, last))
            cells.append(f'{first:.2f}, {end:.2f}')
        lines.append(f'| {label} | ' + ' | '.join(cells) + ' |')
    return lines


def settings_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the settings of the loss in the comparison's sscl runs."""
    row = next((r for r in rows if r['variant'] == 'sscl'), None)
    if row is None:
        return 'none yet'
    return ', '.join(f'{name.replace("_", " ").replace("cka", "CKA")} {row[f"sscl_{name}"]}' for name in _SETTINGS[:-1])


COLORS = dict(none='#7f7f7f', kd='#1f77b4', contrastive='#ff7f0e', contrastive_matched='#8c564b', sscl='#d62728',
              sscl_kd_step='#9467bd')


def draw(rows: Sequence[Mapping[str, Any]], layers: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draw accuracy by mode with error bars beside the paper's, and CKA and NCE per layer over the epochs of sscl at
    T=2.
    """
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.4), gridspec_kw=dict(width_ratios=(1.9, 1, 1)))
    _draw_accuracy(axes[0], rows)
    for axis, key, label in ((axes[1], 'cka_running', 'running CKA, student and teacher'),
                             (axes[2], 'nce', 'contrastive loss $-L_{NCE}$ (nats)')):
        _draw_layers(axis, layers, key)
        axis.set(xlabel='epoch', ylabel=label, title='SSCL, T = 2')
        axis.grid(alpha=.3)
    axes[2].legend(title='layer', fontsize=8, title_fontsize=8)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)
    plt.close(figure)


_MARKS = {2: 'o', 4: 's'}


def _draw_accuracy(axis: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw the difference to the baseline per mode and T: every seed, mean and interval; the paper's as open marks."""
    tables = {t: {r['mode']: r for r in comparison(rows, t)} for t in _MARKS}
    modes = [mode for mode in LABELS if mode != 'none' and any(mode in table for table in tables.values())]
    for t, offset in ((2, -.15), (4, .15)):
        base = by_seed(rows, 'primary', 'none', t)
        for i, mode in enumerate(modes):
            row = tables[t].get(mode)
            if row is None or row['difference'] is None:
                continue
            seeds = [value - base[s] for s, value in by_seed(rows, 'primary', mode, t).items() if s in base]
            axis.plot([i + offset] * len(seeds), seeds, '.', color=COLORS[mode], alpha=.5, ms=5)
            paired = row['difference']
            axis.errorbar(i + offset, paired.mean, yerr=paired.half, fmt=_MARKS[t], color=COLORS[mode], capsize=4)
            if row['paper_difference'] is not None:
                axis.plot(i + offset + .12, row['paper_difference'], _MARKS[t], mfc='none', mec='black', ms=6)
    axis.axhline(0, color=COLORS['none'], lw=1)
    axis.set_xticks(range(len(modes)), [_tick(mode, tables) for mode in modes], fontsize=8)
    axis.set_xlim(-.6, len(modes) - .4)
    axis.set_ylabel('top-1 minus the baseline, same seed (points)')
    axis.set_title('baseline: ' + _accuracies('none', tables), fontsize=10)
    for t in (t for t in _MARKS if 'none' in tables[t]):
        axis.plot([], [], _MARKS[t], color='#555555', label=f'here, T = {t}: mean, 95 %, seeds')
        axis.plot([], [], _MARKS[t], mfc='none', mec='black', label=f'paper, T = {t}, full scale')
    axis.legend(fontsize=8)
    axis.grid(axis='y', alpha=.3)


def _tick(mode: str, tables: Mapping[int, Mapping[str, Any]]) -> str:
    """Return the name of a mode with its accuracies below."""
    name = {'kd': 'distillation', 'contrastive': 'contrastive,\nuniform', 'sscl': 'SSCL',
            'contrastive_matched': "uniform at\nSSCL's total", 'sscl_kd_step': 'SSCL +\nKL per step'}[mode]
    return name + ('' if '\n' in name else '\n') + '\n' + _accuracies(mode, tables)


def _accuracies(mode: str, tables: Mapping[int, Mapping[str, Any]]) -> str:
    return '; '.join(f'{table[mode]["top1"]:.1f} (T={t})' for t, table in tables.items() if mode in table)


def _draw_layers(axis: Any, layers: Sequence[Mapping[str, Any]], key: str) -> None:
    """Draw one line per layer: the mean over the seeds of the comparison's sscl runs."""
    chosen = [r for r in layers if (r['phase'], r['variant'], r['timesteps']) == ('primary', 'sscl', '2') and r[key]]
    for layer in dict.fromkeys(r['layer'] for r in chosen):
        epochs = sorted({int(r['epoch']) for r in chosen})
        means = [np.mean([float(r[key]) for r in chosen if (r['layer'], int(r['epoch'])) == (layer, e)])
                 for e in epochs]
        axis.plot(epochs, means, marker='.', label=layer)


def report(results: Path, page: Path, facts: Facts) -> None:
    """Write the figure, the tables and the page's section from the CSV files.

    Raises:
        SystemExit: There are no CSV files.
    """
    rows, layers = read_csv(results / RUNS_CSV), read_csv(results / LAYERS_CSV)
    if not rows:
        raise SystemExit(f'{results / RUNS_CSV} is missing: run the ablation first.')
    draw(rows, layers, results / FIGURE)
    notes = (results / NOTES).read_text() if (results / NOTES).is_file() else ''
    lines = page_lines(rows, layers, read_csv(results / GRADIENTS_CSV), facts, notes)
    write_section(page, BEGIN, END, lines)
    print('\n'.join(lines))
