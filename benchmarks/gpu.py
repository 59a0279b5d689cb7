#!/usr/bin/env python3
"""Check and measure everything on a GPU, within a few minutes.

    python benchmarks/gpu.py --phase tests --minutes 6 --output DIR
    python benchmarks/gpu.py --phase bench --minutes 4 --output DIR
    python benchmarks/gpu.py --phase science --minutes 8 --output DIR
    python benchmarks/gpu.py --report DIR

Every finished case is one line of DIR/gpu_tests.jsonl or DIR/gpu_bench.jsonl, and a second call goes on with what is
missing. No case starts that would not end in time; what was left out is printed. --toy runs everything on the CPU at a
tiny size, which shows that the script works and measures nothing.
"""
import argparse
import json
import logging
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, List, Optional

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import gpu_bench
import gpu_report
import gpu_science
import gpu_tests
from gpu_cases import Ledger, run_cases
from harness import machine
from pages import PAGES, write_section

PAGE, BEGIN, END = PAGES / 'performance.md', '<!-- gpu: written by benchmarks/gpu.py -->', '<!-- end of gpu -->'
_DEADLINE = 'TIMM_SSCL_GPU_DEADLINE'  # a process that starts again after a lost CUDA context keeps its time
SHOWN = 8  # names of cases that were left out


def main(argv: Optional[List[str]] = None) -> None:
    args = _parse(argv)
    if args.report:
        report(args.report)
        return
    if args.phase == 'science':
        _science(args)
        return
    if not args.toy and not torch.cuda.is_available():
        raise SystemExit('PyTorch sees no CUDA device here; --toy runs the script on the CPU at a tiny size.')
    with _quiet(logging.getLogger('timm_sscl')):
        _measure(args)


@contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    """Leave out what a conversion says, which would come a hundred times."""
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _measure(args: argparse.Namespace) -> None:
    """Run the cases of a phase and print their table."""
    deadline = float(os.environ.setdefault(_DEADLINE, str(time.time() + 60 * args.minutes)))
    device = torch.device('cpu' if args.toy else 'cuda')
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / 'gpu_machine.json').write_text(json.dumps(machine(), indent=1) + '\n')
    phase = gpu_tests if args.phase == 'tests' else gpu_bench
    ledger = Ledger(args.output / f'gpu_{args.phase}.jsonl', args.retry)
    cases = [case for case in phase.create_cases(device, args.toy) if args.only in case.name]
    left_out = run_cases(cases, ledger, deadline)
    (gpu_report.print_tests if args.phase == 'tests' else gpu_report.print_bench)(ledger.rows())
    if left_out:
        more = f' and {len(left_out) - SHOWN} more' if len(left_out) > SHOWN else ''
        print(f'Left out for lack of time: {"; ".join(left_out[:SHOWN])}{more}.')


def _parse(argv: Optional[List[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--phase', choices=['tests', 'bench', 'science'])
    parser.add_argument('--minutes', type=float, default=8., help='no case starts that would end later (default: 8)')
    parser.add_argument('--output', type=Path, default=Path('output/gpu'), help='folder of the results')
    parser.add_argument('--data', type=Path, default=Path('.science'), metavar='DIR',
                        help='science: folder made by benchmarks/cifar_arrays.py')
    parser.add_argument('--toy', action='store_true', help='on the CPU, at a tiny size')
    parser.add_argument('--only', default='', metavar='TEXT', help='only cases whose name contains this')
    parser.add_argument('--retry', action='store_true', help='run again what failed')
    parser.add_argument('--report', type=Path, metavar='DIR', help='write figure, and section of the manual, from DIR')
    args = parser.parse_args(argv)
    if not args.phase and not args.report:
        parser.error('--phase or --report is needed.')
    return args


def _science(args: argparse.Namespace) -> None:
    """Run the plans of benchmarks/compare.py; with --toy, one epoch of each trial on the CPU."""
    options = ['--device', 'cpu', '--epochs', '1'] if args.toy else ['--device', 'cuda']
    if gpu_science.science(args.data, args.output, args.minutes, options):
        raise SystemExit(f'A process failed; its log is in {args.output}.')


def report(folder: Path) -> None:
    """Draw the figure into the folder, and write the section into the manual where the page has its markers."""
    gpu_report.draw(folder, folder / 'gpu_steps.svg')
    lines = gpu_report.sections(folder)
    if BEGIN in PAGE.read_text():
        write_section(PAGE, BEGIN, END, lines)
        print(f'written: {PAGE}')
    else:
        print('\n'.join(lines))


if __name__ == '__main__':
    main()
