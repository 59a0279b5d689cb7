#!/usr/bin/env python3
"""Run the trials of plans: arms x seeds on one data set, student and teacher, many small trainings side by side.

    python benchmarks/cifar_arrays.py CIFAR100 DATA
    python benchmarks/compare.py --plan benchmarks/plans/inverse_cka.yaml --data DATA --output DIR --device cuda
    python benchmarks/compare_results.py --runs DIR

Plans are described in benchmarks/compare_plan.py, the results (DIR/runs.jsonl) in benchmarks/trials.py. When started
again, finished trials are skipped. On the CPU, several processes with one output share the trials (OMP_NUM_THREADS=1
each). The trainings don't go through train.py: the images lie on the device, and on CUDA the steps are replayed from
captured graphs. Precision: on CUDA float32 with TF32 in convolutions, which is PyTorch's default; on the CPU what
--precision says.
"""
import argparse
import os
import time
from pathlib import Path
from typing import List, Optional, Sequence

import torch

from compare_plan import ComparisonPlan
from trial_engine import Engine
from trials import read_results

__all__ = ['main', 'run_plan']

PHASES = 'pilot', 'tune', 'screen', 'primary', 'confirm'


def run_plan(plan: ComparisonPlan, engine: Engine, phases: Sequence[str], dry: bool = False) -> bool:
    """Run phases of a plan. A phase is begun when all trials of the phases before it have ended.

    Returns:
        Whether all of them have ended.
    """
    for phase in plan.phases:
        if phase not in phases:
            continue
        trials = plan.trials(phase, read_results(engine.output))
        print(f'{plan.name}, {phase}: {len(trials)} trials', flush=True)
        if dry:
            print('\n'.join(f'  {trial.name}' for trial in trials))
            continue
        if trials:
            engine.run(trials)
        names = {line['name'] for line in read_results(engine.output)}
        if any(trial.name not in names for trial in trials):
            return False
        report(plan, phase, engine)
    return True


def report(plan: ComparisonPlan, phase: str, engine: Engine) -> None:
    """Print what a phase decides. Of a pilot, this is the SD of the differences and nothing else."""
    lines = read_results(engine.output)
    if phase == 'pilot':
        for scale, spread in plan.pilot_sd(lines).items():
            print(f'  SD of the paired difference at {scale}: {spread:.2f} points')
        if 'power' in plan.content:
            print(f'  {plan.pairs(lines)} pairs', flush=True)
    elif phase == 'tune':
        print('  ' + ', '.join(f'{arm}: try {plan.best_try(arm, lines)}' for arm in plan.arms), flush=True)
    else:
        print('  ' + ', '.join(f'{arm} {mean:.2f}' for arm, mean in plan.ranking(lines, phase).items()), flush=True)


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--plan', type=Path, nargs='+', required=True, help='plan files, run in this order')
    parser.add_argument('--data', type=Path, required=True, help='folder made by benchmarks/cifar_arrays.py')
    parser.add_argument('--output', type=Path, required=True, help='folder of runs.jsonl and the teachers')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu', choices=['cpu', 'cuda'])
    parser.add_argument('--phase', nargs='+', default=['all'], choices=['all', *PHASES])
    parser.add_argument('--minutes', type=float, help='start nothing that would not be done in this time')
    parser.add_argument('--replicas', type=int, default=8, help='trials side by side on CUDA')
    parser.add_argument('--workers', type=int, default=None,
                        help='processes that prepare trials and measure energy (CUDA: half of the cores, CPU: 0)')
    parser.add_argument('--backend', choices=['auto', 'compiled', 'eager'],
                        help='how neurons run (CUDA: compiled, since the number of kernels counts there; CPU: auto)')
    parser.add_argument('--precision', default='auto', choices=['auto', 'float32', 'bfloat16'],
                        help='of the CPU: bfloat16 is autocast in channels_last; auto takes the faster one, measured '
                             'once for an output')
    parser.add_argument('--evaluations', type=int, default=4, help='per trial, the last after the last epoch')
    parser.add_argument('--no-graph', action='store_true', help='run steps eagerly on CUDA')
    parser.add_argument('--epochs', type=int, help="instead of the plan's, also of the teacher: to try a plan")
    parser.add_argument('--dry-run', action='store_true', help='print the trials; phases that follow from results of '
                                                               'others need these')
    return parser


def main(argv: Optional[List[str]] = None) -> None:
    args = create_parser().parse_args(argv)
    deadline = None if args.minutes is None else time.time() + 60 * args.minutes
    shrink = None if args.epochs is None else dict(epochs=args.epochs, teacher_epochs=args.epochs)
    plans = [ComparisonPlan(file, shrink) for file in args.plan]
    workers = args.workers
    if workers is None:
        workers = (os.cpu_count() or 2) // 2 if args.device == 'cuda' else 0
    backend = args.backend or ('compiled' if args.device == 'cuda' else 'auto')
    engine = Engine(args.data, args.output, args.device, args.replicas, deadline, backend,
                    0 if args.dry_run else workers, not args.no_graph, args.precision, args.evaluations)
    try:
        for plan in plans:
            if not run_plan(plan, engine, PHASES if 'all' in args.phase else args.phase, args.dry_run):
                break
    finally:
        engine.close()


if __name__ == '__main__':
    main()
