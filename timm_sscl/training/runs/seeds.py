"""--seeds: one run per seed, in a folder that they share, with one teacher."""
import json
import logging
import os
from argparse import Namespace
from contextlib import ExitStack
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, Tuple

import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from timm.models import safe_model_name

from ..saving.checkpoint import find_newest, holds_a_run, lock_folder, write_text
from ..errors import OptionError
from .interval import interval, interval_text
from ..command_line.options import ARGS_FILE, AUTO
from ..saving.resume import SUMMARY_FILE, newest_unfinished, options_as_yaml
from .run_files import read_run
from .run_report import try_to_report
from .runs_report import facts_of, write_comparison

__all__ = ['SeedGroup']

_logger = logging.getLogger('train')


class SeedGroup:
    """The runs of --seeds: FOLDER/seed-N for every seed.

    Args:
        args: Options, with `seeds`.
        accelerator: Accelerator. Every process must create the group.
        resources: Holds the lock on the folder.

    Raises:
        OptionError: --resume names a single run.
        FileExistsError: The folder holds runs, and they are not resumed.
        StorageError: Another process writes to the folder.
    """

    def __init__(self, args: Namespace, accelerator: Accelerator, resources: ExitStack):
        self.args = args
        self.main = accelerator.is_main_process
        self.root = Path(args.output or './output/train')
        self.folder: Path = broadcast_object_list([self._find() if self.main else None])[0]
        resources.enter_context(lock_folder(self.folder, self.main))
        if self.main:
            write_text(self.folder / ARGS_FILE, options_as_yaml(args))

    def _find(self) -> Path:
        """Return the folder of the group, a new one or that of the runs to go on with."""
        args = self.args
        name = args.experiment or f'{datetime.now().strftime("%Y%m%d-%H%M%S")}-{safe_model_name(args.model)}-seeds'
        if args.resume == AUTO:
            folder = None if args.experiment else newest_unfinished(args, self.root)
            return folder or self.root / name
        if args.resume:
            if find_newest(Path(args.resume)) is not None:
                raise OptionError(f'--resume {args.resume}: is the folder of one run; with --seeds it takes the folder '
                                  f'above the runs of all seeds.')
            if not (Path(args.resume) / ARGS_FILE).is_file():
                raise FileNotFoundError(f"--resume: '{args.resume}' holds no runs of --seeds: there is no {ARGS_FILE}.")
            return Path(args.resume)
        if holds_a_run(self.root / name):
            raise FileExistsError(f"--experiment: '{self.root / name}' holds a run already; choose another name, or "
                                  f'--resume {self.root / name}.')
        return self.root / name

    def folder_of(self, seed: int) -> Path:
        """Return the folder of a seed's run."""
        return self.folder / f'seed-{seed}'

    def runs_left(self) -> List[Namespace]:
        """Return the options of every run that is not complete, in the order of the seeds. All processes must call
        this.
        """
        left = broadcast_object_list([[s for s in self.args.seeds if not self._is_done(s)] if self.main else None])[0]
        done = [seed for seed in self.args.seeds if seed not in left]
        if done and self.main:
            _logger.info(f'Seeds {", ".join(map(str, done))} are done already.')
        return [Namespace(**{**vars(self.args), 'seeds': None, 'seed': seed, 'resume': AUTO,
                             'experiment': os.path.relpath(self.folder_of(seed), self.root)}) for seed in left]

    def _is_done(self, seed: int) -> bool:
        """Return whether a seed's run has ended with as many epochs as are asked for."""
        folder = self.folder_of(seed)
        if not (folder / SUMMARY_FILE).is_file() or not (folder / ARGS_FILE).is_file():
            return False
        return yaml.safe_load((folder / ARGS_FILE).read_text())['epochs'] == self.args.epochs

    def summarize(self) -> None:
        """Print the closing table over the seeds, write summary.json and, with --report, the comparison of the runs."""
        if not self.main:
            return
        runs = {seed: read_run(self.folder_of(seed)) for seed in self.args.seeds}
        facts = {seed: facts_of(run) for seed, run in runs.items()}
        teachers = {run.teacher.digest for run in runs.values() if run.teacher is not None}
        self._print(facts, len(teachers))
        write_text(self.folder / SUMMARY_FILE, json.dumps(dict(
            model=self.args.model, seeds=facts, **{name: vars(interval(values)) for name, values in _known(facts)},
        ), indent=2) + '\n')
        try_to_report(self.args.report, self.folder, partial(write_comparison, [run.folder for run in runs.values()]))

    def _print(self, facts: Dict[int, Dict[str, Any]], teachers: int) -> None:
        text = {name: interval_text(values, digits) for (name, values), digits in (
            (item, 3 if item[0] == 'rate' else 2) for item in _known(facts))}
        lines = ['', f'Seeds     {len(facts)} runs; mean ± half the width of the 95 % interval (t distribution)']
        lines += [f'          seed {seed}: ' + ', '.join(f'{values[key]:.2f} {title}' for key, title in (
            ('top1', 'top-1 after the last epoch'), ('best', 'best')) if values[key] is not None)
            for seed, values in facts.items()]
        if 'teacher' in text:
            one = 'one for all seeds' if teachers == 1 else f'{teachers} different ones'
            lines.append(f'Teacher   {text["teacher"]} top-1 ({one})')
        lines.append(f'Student   {self.args.model}: {text["top1"]} top-1 after the last epoch'
                     + (f', best {text["best"]}' if 'best' in text else ''))
        if 'rate' in text:
            lines.append(f'Firing    {text["rate"]} spikes per neuron and timestep')
        if 'energy' in text:
            lines.append(f'Energy    {text["energy"]} microjoules per image')
        _logger.info('\n'.join([*lines, f'Files     {self.folder}: seed-N, {SUMMARY_FILE}']))


def _known(facts: Dict[int, Dict[str, Any]]) -> List[Tuple[str, List[float]]]:
    """Return the numbers that every seed's run has: name -> value per seed."""
    names = next(iter(facts.values()))
    return [(name, [values[name] for values in facts.values()]) for name in names
            if all(values[name] is not None for values in facts.values())]
