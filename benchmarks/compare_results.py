#!/usr/bin/env python3
"""Write the pages of the comparisons: tables, figures and answers of every plan in benchmarks/plans.

    python benchmarks/compare_results.py --runs DIR [DIR ...]   # runs.jsonl -> CSV files, figures, pages
    python benchmarks/compare_results.py                        # figures and pages from the CSV files
    python benchmarks/compare_results.py --plan zoo             # of one plan

Every run of a plan goes to benchmarks/results/compare_PLAN.csv, and the results per image of the compared runs to
compare_PLAN_bits.npz. The pages are made from these two alone. The answer follows from the numbers by rules that are
fixed here and printed on the page. At the end, one line per plan says what was found.
"""
import argparse
from itertools import combinations
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

from compare_answers import (
    RULES, Comparison, Plan, answer, by_seed, compare, groups, primary_rows, read_plan, summary_line)
from compare_data import Row, check_rows, costs_file, csv_file, read_rows, setting, write_rows
from compare_figures import draw_arms, draw_differences
from compare_statistics import paired_differences
from compare_tables import (
    arm_table, arms_of, comparison_table, costs_table, failure_table, layer_table, pilot_table, selection_table, table,
    tried_configurations, where_text)
from pages import FIGURES, PAGES, write_section
from trials import read_results

ROOT = Path(__file__).resolve().parent
RESULTS, PLANS = ROOT / 'results', ROOT / 'plans'

# fields of a run that are stated beside the plan
FACTS = dict(teacher_top1='top-1 of the teacher', device='device', precision='precision', torch='torch', timm='timm',
             revision='code')
LAYER_KEYS = ('cka_running', 'running CKA (a moving average over the steps)'), ('weight', 'weight')


def page_of(plan: str) -> str:
    return 'zoo.md' if plan == 'zoo' else 'comparison.md'


def markers(plan: str) -> Tuple[str, str]:
    return f'<!-- {plan}: written by benchmarks/compare_results.py -->', f'<!-- end of {plan} -->'


# ---- the section of a plan

def section(plan: Plan, rows: Sequence[Row], results: Path) -> List[str]:
    """Draw the figures of a plan and return its section of a page."""
    lines = ['', f'## {plan.question}', '']
    primary, planned = primary_rows(rows), plan.planned(rows)
    if not primary:
        before = f'No run of the comparison yet; {len(rows)} runs of what comes before it.' if rows else 'No runs yet.'
        return [*lines, before, '', *plan_lines(plan, rows), '']
    check_rows(rows)
    found = [(group, compare(group, plan, compared_pairs(plan, group))) for group in groups(primary)]
    for group, comparisons in found:
        lines += [*([f'{title_of(group)}:', ''] if len(found) > 1 else []), *answer_lines(plan, comparisons, planned)]
    lines += plan_lines(plan, rows)
    tried = tried_configurations(rows)
    for group, comparisons in found:
        against = control_of(comparisons)
        names = ordered_arms(group, plan, against)
        lines += ['', f'### {title_of(group)}', '', *arm_table(group, plan, against, tried, names), '',
                  *comparison_table(comparisons, plan), *missing_lines(comparisons)]
        lines += figure_lines(plan, group, names, comparisons, results, len(found) > 1)
        lines += layer_lines(plan, group)
    lines += costs_table(costs_file(results, plan.name), plan)
    return [*lines, *confirmation_lines(plan, rows), *before_lines(plan, rows), *failure_lines(plan, rows)]


def title_of(rows: Sequence[Row]) -> str:
    settings = list(dict.fromkeys(map(setting, rows)))
    return where_text(settings[0]) if len(settings) == 1 else 'All settings'


def compared_pairs(plan: Plan, rows: Sequence[Row]) -> List[Tuple[str, str]]:
    """Return the plan's pairs of arms that the comparison has from the start, or that have runs."""
    known = {*arms_of(rows), *plan.compared}
    return [pair for pair in (plan.primary, *plan.comparisons) if set(pair) <= known]


def control_of(comparisons: Sequence[Comparison]) -> List[Comparison]:
    """Return the comparisons with the control that several of them have; none if all have their own."""
    controls = [c.control for c in comparisons]
    control = max(controls, key=controls.count, default='')
    return [c for c in comparisons if c.control == control] if controls.count(control) > 1 else []


def ordered_arms(rows: Sequence[Row], plan: Plan, against: Sequence[Comparison]) -> List[str]:
    """Return the arms with runs: the control first, then in the plan's order."""
    first = [against[0].control] if against else []
    present = arms_of(rows)
    return list(dict.fromkeys(name for name in (*first, *plan.labels, *present) if name in present))


def answer_lines(plan: Plan, comparisons: Sequence[Comparison], planned: int) -> List[str]:
    """Return one answer per comparison, the primary one in bold."""
    lines = [f'- **{answer(c, plan, planned)}**' if (c.arm, c.control) == plan.primary
             else f'- {answer(c, plan, planned)}' for c in comparisons]
    return [*lines, '']


def plan_lines(plan: Plan, rows: Sequence[Row]) -> List[str]:
    """Return the plan, fixed before the first run, beside where and with what it ran."""
    a, b = map(plan.label, plan.primary)
    lines = [['question', plan.question], ['primary comparison', f'{a} minus {b}, paired by seed'],
             ['pairs planned', plan.planned(rows)], ['stopping rule', plan.stopping], ['reading', RULES],
             ['plan', f'`benchmarks/plans/{plan.name}.yaml`']]
    for key, title in FACTS.items():
        values = list(dict.fromkeys(row[key] for row in rows if row.get(key)))
        if values:
            lines.append([title, ', '.join(f'{v:.2f}' if isinstance(v, float) else v for v in values)])
    return table(['', ''], lines)


def missing_lines(comparisons: Sequence[Comparison]) -> List[str]:
    """Name every seed that has no pair."""
    missing = list(dict.fromkeys(text for c in comparisons for text in c.missing))
    return ['', 'Without a pair: ' + '; '.join(missing) + '.'] if missing else []


def figure_lines(
        plan: Plan,
        rows: Sequence[Row],
        names: Sequence[str],
        comparisons: Sequence[Comparison],
        results: Path,
        several: bool,
) -> List[str]:
    """Draw the figure of runs and return its link. Several figures of one plan have their setting in the name."""
    if not any(c.pairs for c in comparisons):
        return []
    against = control_of(comparisons)
    scale, timesteps, arch = setting(rows[0])
    name = '_'.join(['compare', plan.name, *([scale, f'T{timesteps}', arch] if several else [])]) + '.png'
    title = f'{title_of(rows)}, last epoch, validation images'
    if against:
        draw_arms(rows, names, against, plan, results / name, title)
    else:
        draw_differences(comparisons, plan, results / name, title)
    return ['', f'![{plan.question}]({FIGURES}/{name})']


def layer_lines(plan: Plan, rows: Sequence[Row]) -> List[str]:
    """Return CKA and weight per layer, where a loss has them."""
    lines: List[str] = []
    for key, title in LAYER_KEYS:
        values = layer_table(rows, plan, key)
        if values:
            lines += ['', f'The {title} of each layer, first and last epoch, means over the runs:', '', *values]
    return lines


def confirmation_lines(plan: Plan, rows: Sequence[Row]) -> List[str]:
    """Return the table of the runs on fresh seeds: all pairs of up to four arms, else the plan's."""
    confirming = primary_rows(rows, 'confirm')
    lines: List[str] = ['', '### Confirmation on fresh seeds', ''] if confirming else []
    for group in groups(confirming):
        arms = arms_of(group)
        pairs = list(combinations(arms, 2)) if len(arms) <= 4 else compared_pairs(plan._replace(compared=()), group)
        comparisons = compare(group, plan._replace(primary=('', '')), pairs)
        lines += [f'{title_of(group)}:', '', *answer_lines(plan._replace(primary=('', '')), comparisons, 0),
                  *arm_table(group, plan, [], {}, arms), '', *comparison_table(comparisons, plan),
                  *missing_lines(comparisons), '']
    return lines


def before_lines(plan: Plan, rows: Sequence[Row]) -> List[str]:
    """Return what ran before the comparison, on other seeds or images: pilot, screening, tried configurations."""
    lines: List[str] = []
    pilot = primary_rows(rows, 'pilot')
    if pilot:
        lines += ['', '### Pilot', '', 'Only the spread of the paired difference was read, not its sign:', '',
                  *pilot_table(pilot, plan, lambda r: list(paired_differences(
                      by_seed(r, plan.primary[0]), by_seed(r, plan.primary[1])).values()))]
    for phase, title in (('screen', 'Screening'), ('tune', 'Every configuration that was tried')):
        if primary_rows(rows, phase):
            images = 'held-out training images' if all(
                row['split'] == 'heldout' for row in primary_rows(rows, phase)) else 'validation images'
            lines += ['', f'### {title}', '', f'Accuracy on {images}; none of these runs is in the tables above:', '',
                      *selection_table(rows, plan, phase)]
    return lines


def failure_lines(plan: Plan, rows: Sequence[Row]) -> List[str]:
    failures = failure_table(rows, plan)
    return ['', '### Failed runs', '', *(failures or ['None.']), '']


# ---- the script

def collect(folders: Sequence[Path], results: Path, names: Sequence[str]) -> None:
    """Write the CSV files of these plans and of the teachers from the folders' runs. Teachers of other folders stay."""
    rows: Dict[str, Row] = {}
    for folder in folders:
        rows.update({row['name']: row for row in read_results(folder)})
    for name in (*names, 'teachers'):
        own = [row for row in rows.values() if row['plan'] == name]
        if own and name == 'teachers':
            own = [row for row in read_rows(results, name) if row['name'] not in rows] + own
        if own:
            check_rows(own)
            write_rows(results, name, own)
            print(f'{csv_file(results, name)}: {len(own)} runs')
    others = sorted({row['plan'] for row in rows.values()} - {*names, 'teachers'})
    if others:
        print(f'not written: runs of the plans {", ".join(others)}')


def write_page(page: Path, plan: Plan, lines: Sequence[str]) -> None:
    """Write a plan's section, at the end of the page if it is new there."""
    begin, end = markers(plan.name)
    text = page.read_text()
    if begin not in text:
        page.write_text(f'{text.rstrip()}\n\n{begin}\n{end}\n')
    write_section(page, begin, end, lines)


def report(plans: Sequence[Plan], results: Path, pages: Path) -> List[str]:
    """Write figures and pages of these plans, and return their answers, the primary comparison first."""
    summary = []
    for plan in plans:
        rows = read_rows(results, plan.name)
        write_page(pages / page_of(plan.name), plan, section(plan, rows, results))
        primary = primary_rows(rows)
        for group in groups(primary):
            main_one, *others = compare(group, plan, compared_pairs(plan, group))
            if main_one.pairs:
                summary.append(f'{plan.name}: {summary_line(main_one, plan, group, plan.planned(rows))}')
                summary += [f'  {answer(c, plan, plan.planned(rows))}' for c in others if c.pairs]
        if not primary:
            summary.append(f'{plan.name}: no runs yet.')
    return summary


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--runs', type=Path, nargs='+', default=[], metavar='DIR', help='folders with a runs.jsonl')
    parser.add_argument('--plan', nargs='+', metavar='NAME', help='only these plans (default: all)')
    parser.add_argument('--plans', type=Path, default=PLANS, metavar='DIR', help='folder of the plans')
    parser.add_argument('--results', type=Path, default=RESULTS, metavar='DIR', help='folder of CSV files and figures')
    parser.add_argument('--pages', type=Path, default=PAGES, metavar='DIR', help='folder of the pages')
    return parser


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Write the CSV files if there are runs, then figures and pages, and print the findings."""
    args = create_parser().parse_args(argv)
    files = sorted(args.plans.glob('*.yaml'))
    unknown = set(args.plan or ()) - {file.stem for file in files}
    if unknown:
        raise SystemExit(f"--plan {sorted(unknown)[0]}: there is no such file in {args.plans}; there are "
                         f"{', '.join(file.stem for file in files) or 'none'}.")
    plans = [read_plan(file) for file in files if not args.plan or file.stem in args.plan]
    if args.runs:
        collect(args.runs, args.results, [plan.name for plan in plans])
    print('\n'.join(report(plans, args.results, args.pages)))


if __name__ == '__main__':
    main()
