#!/usr/bin/env python3
"""Compare finished runs of train.py that differ in the student's initialisation: top-1 after every epoch.

    python benchmarks/starts.py RUN [RUN ...]

Other runs are compared with the first: 'reached' is the epoch after which a run was at least as good as the first run
at its end.
"""
import argparse
import csv
import json
from pathlib import Path
from typing import Any, Dict, Optional

import yaml


def start_of(options: Dict[str, Any]) -> str:
    if not (options['initial_checkpoint'] or options['pretrained'] or options['pretrained_path']):
        return 'random'
    if options['neuron_init'] == 'ann':
        return f"ANN's weights and thresholds ({options['ann_percentile']:g} %)"
    return "ANN's weights" + (', calibrated gains' if options['neuron_init'] == 'calibrated' else '')


def read(run: Path) -> Dict[str, Any]:
    options, facts = yaml.safe_load((run / 'args.yaml').read_text()), json.loads((run / 'summary.json').read_text())
    with (run / 'summary.csv').open() as stream:
        top1 = [float(row['eval_top1']) for row in csv.DictReader(stream)]
    return dict(run=run.name, model=facts['model'], T=facts['timesteps'], start=start_of(options), epochs=len(top1),
                lr=f"{options['opt']} {options['lr']:g}", top1=top1, teacher=(facts['teacher'] or {}).get('top1'))


def reached(top1: list, goal: float) -> Optional[int]:
    return next((epoch for epoch, value in enumerate(top1, 1) if value >= goal), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', type=Path, nargs='+', metavar='RUN', help='folder of a finished run of train.py')
    runs = [read(run) for run in parser.parse_args().runs]
    goal = runs[0]['top1'][-1]
    print(f'{"run":<14}{"T":>3}  {"start":<40}{"optimizer":>14}{"epochs":>8}{"last":>8}{"reached":>9}  every epoch')
    for r in runs:
        at = reached(r['top1'], goal) if r is not runs[0] else None
        print(f'{r["run"]:<14}{r["T"]:>3}  {r["start"]:<40}{r["lr"]:>14}{r["epochs"]:>8}{r["top1"][-1]:>8.2f}'
              f'{at or "-":>9}  ' + ' '.join(f'{value:.1f}' for value in r['top1']))
    teachers = sorted({r['teacher'] for r in runs if r['teacher'] is not None})
    print('teacher top-1: ' + ', '.join(f'{t:.2f}' for t in teachers))


if __name__ == '__main__':
    main()
