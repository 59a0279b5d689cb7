"""Compare runs: group them by their options but the seed, with mean and interval over the seeds."""
import json
import os
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from timm_sscl.report.figures import draw_groups
from timm_sscl.report.page import Section, Table

from ..errors import OptionError
from .interval import interval, interval_text
from ..command_line.option_groups import create_parser
from .run_files import RunFiles, curve, read_run
from .run_report import REPORT_FILE, write_page
from ..teachers.teacher_key import plain

__all__ = ['COMPARISON_FILE', 'facts_of', 'write_comparison']

COMPARISON_FILE = 'comparison.html'
# options in which the runs of a group may differ
_APART = frozenset(('seed', 'seeds', 'output', 'experiment', 'resume', 'report', 'workers', 'threads', 'device'))


def write_comparison(folders: Sequence[Path], output: Optional[Path] = None) -> Path:
    """Write comparison.html: runs grouped by their options but the seed, with mean and interval over the seeds.

    Args:
        folders: Folders of runs.
        output: Folder for the page; by default the folder above all runs.

    Returns:
        The page.

    Raises:
        OptionError: A folder holds no run, or stands there twice.
        ImportError: matplotlib or jinja2 is not installed.
    """
    places = [folder.resolve() for folder in folders]
    twice = [str(folder) for folder, place in zip(folders, places) if places.count(place) > 1]
    if twice:
        raise OptionError(f"'{twice[0]}' stands there twice; name every run once.")
    runs = [read_run(folder) for folder in folders]
    output = output or Path(os.path.commonpath([place.parent for place in places]))
    groups = group_runs(runs)
    open_ = sum(run.summary is None for run in runs)
    status = f'{len(runs)} runs in {len(groups)} group{"s" if len(groups) > 1 else ""}.' + (
        f' {open_} of them not complete: their last epoch so far is compared.' if open_ else '')
    return write_page(output, 'Comparison of runs', status, _sections(groups, output), COMPARISON_FILE)


def group_runs(runs: Sequence[RunFiles]) -> Dict[str, List[RunFiles]]:
    """Group runs by their options but the seed. A group's name says in which options it differs from the others."""
    keys = [{name: plain(value) for name, value in run.options.items() if name not in _APART} for run in runs]
    parser = create_parser()
    names = sorted({name for key in keys for name in key})
    values = [[json.dumps(key.get(name, plain(parser.get_default(name))), default=str) for name in names]
              for key in keys]
    differing = [i for i in range(len(names)) if len({row[i] for row in values}) > 1]
    groups: Dict[str, List[RunFiles]] = {}
    for run, row in zip(runs, values):
        name = ', '.join(f'{names[i]}={json.loads(row[i])}' for i in differing) or str(run.options.get('model'))
        groups.setdefault(name, []).append(run)
    return groups


def last_top1(run: RunFiles) -> Optional[float]:
    """Return the top-1 after the last epoch in percent; None before the first validation."""
    values = curve(run.rows, 'eval_top1', '').values
    return values[-1] if values else None


def facts_of(run: RunFiles) -> Dict[str, Optional[float]]:
    """Return the numbers of a run that are compared."""
    summary: Mapping[str, Any] = run.summary or {}
    rates = summary.get('firing_rates') or {}
    return dict(
        top1=last_top1(run), best=(summary.get('best') or {}).get('top1'),
        teacher=(summary.get('teacher') or {}).get('top1'),
        rate=sum(rates.values()) / len(rates) if rates else None,
        energy=(summary.get('energy') or {}).get('spiking_uj'), seconds=summary.get('seconds'))


def _sections(groups: Mapping[str, List[RunFiles]], output: Path) -> List[Section]:
    facts = {name: [facts_of(run) for run in runs] for name, runs in groups.items()}
    columns = (('top1', 2), ('best', 2), ('teacher', 2), ('rate', 3), ('energy', 2))
    rows = [(name, len(found), *(interval_text([f[key] for f in found], digits) for key, digits in columns))
            for name, found in facts.items()]
    head = ('group', 'runs', 'top-1, last epoch', 'top-1, best epoch', 'top-1 of the teacher', 'firing rate',
            'energy in microjoules')
    finals = {name: [f['top1'] for f in found if f['top1'] is not None] for name, found in facts.items()}
    finals = {name: values for name, values in finals.items() if values}
    curves = {name: _curve_of(groups[name]) for name in finals}
    figures = {'comparison.png': draw_groups(curves, finals)} if finals else {}
    every = [(name, run.options.get('seed'), interval_text([f['top1']]), run.status, _link(run, output))
             for name, runs in groups.items() for run, f in zip(runs, facts[name])]
    return [
        Section('Groups', ['Mean ± half the width of the 95 % interval over the runs of a group (t distribution); runs '
                           'of a group differ only in their seed.'], figures, [Table(head, rows)]),
        Section('Runs', tables=[Table(('group', 'seed', 'top-1', 'state', 'folder'), every)]),
    ]


def _curve_of(runs: Sequence[RunFiles]) -> Tuple[List[float], List[float], List[Optional[float]]]:
    """Return epochs, mean top-1, and half widths of the intervals over the runs that have the epoch."""
    by_epoch: Dict[float, List[float]] = {}
    for run in runs:
        found = curve(run.rows, 'eval_top1', '')
        for epoch, value in zip(found.epochs, found.values):
            by_epoch.setdefault(epoch, []).append(value)
    points = [(epoch, interval(by_epoch[epoch])) for epoch in sorted(by_epoch)]
    return [e for e, _ in points], [i.mean for _, i in points], [i.half for _, i in points]


def _link(run: RunFiles, output: Path) -> str:
    """Return the folder of a run, seen from the page, with its report if there is one."""
    place = os.path.relpath(run.folder, output)
    return f'{place}/{REPORT_FILE}' if (run.folder / REPORT_FILE).is_file() else place
