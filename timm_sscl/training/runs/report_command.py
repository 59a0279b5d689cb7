"""timm-sscl-report: write the report of a run, or compare several runs."""
import argparse
import logging
from pathlib import Path
from typing import List, Optional

import torch
from timm.utils import setup_default_logging

from timm_sscl.report.extra import MISSING, can_report

from ..errors import OptionError
from ..exits import one_line_errors
from ..command_line.options import ARGS_FILE
from ..command_line.option_types import HelpFormatter, OptionParser, home_path
from .run_report import IMAGES, REPORT_FILE, write_run_report
from .runs_report import COMPARISON_FILE, write_comparison

__all__ = ['create_report_parser', 'main']

_logger = logging.getLogger('train')


def create_report_parser() -> argparse.ArgumentParser:
    """Create the parser of timm-sscl-report."""
    parser = OptionParser(
        prog='timm-sscl-report', allow_abbrev=False, formatter_class=HelpFormatter,
        description=f'Write the report of a run into its folder ({REPORT_FILE} and the pictures in report/), or '
                    f'compare several runs ({COMPARISON_FILE}).')
    parser.add_argument('runs', nargs='+', type=home_path, metavar='RUN',
                        help='folder of a run of train.py, or of the runs of --seeds')
    parser.add_argument('--output', type=home_path, default=None, metavar='DIR',
                        help='folder for the comparison of several runs (the folder above them)')
    parser.add_argument('--images', type=int, default=IMAGES, metavar='N',
                        help='one run: measure at most N validation images, evenly spaced over the set')
    parser.add_argument('--device', default=None, help='one run: cpu or cuda (a GPU where there is one)')
    return parser


def runs_in(folder: Path) -> List[Path]:
    """Return the runs of all seeds in the folder of --seeds; of one run its folder."""
    return sorted(file.parent for file in folder.glob(f'seed-*/{ARGS_FILE}')) or [folder]


def main(argv: Optional[List[str]] = None) -> None:
    """Parse the command line, and write the report of one run or the comparison of several."""
    with one_line_errors():
        args = create_report_parser().parse_args(argv)
        if not can_report():
            raise OptionError(f'matplotlib and jinja2 are not both installed; {MISSING}.')
        if args.images < 1:
            raise OptionError(f'--images {args.images}: must be 1 or more.')
        setup_default_logging(logging.INFO)
        folders = [folder for run in args.runs for folder in runs_in(Path(run))]
        if len(folders) > 1:
            print(write_comparison(folders, Path(args.output) if args.output else None))
            return
        if args.output:
            raise OptionError('--output: is for the comparison of several runs; the report of one run is written into '
                              'its folder.')
        print(write_run_report(folders[0], args.images, torch.device(args.device) if args.device else None))


if __name__ == '__main__':
    main()
