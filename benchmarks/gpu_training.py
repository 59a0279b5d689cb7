"""Runs of train.py on the device: killed and resumed, in mixed precision, and the reads of its steps."""
import csv
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

import torch
from accelerate.state import AcceleratorState

__all__ = ['resumed_run', 'amp_run', 'synchronizations', 'our_frame']

ROOT = Path(__file__).resolve().parent.parent
DIGITS = ['--dataset', 'digits', '--num-classes', '10', '--img-size', '32', '--warmup-epochs', '0', '--lr', '0.01',
          '--log-interval', '100', '--experiment', 'run', '--workers', '0']
TOY = ['--model', 'spiking_test_resnet', '-T', '2', '--epochs', '2', '--teacher-epochs', '1', '--batch-size', '16',
       '--train-num-samples', '64', '--val-num-samples', '20', '--threads', '1', '--device', 'cpu']
REAL = ['--model', 'spiking_resnet20_cifar', '-T', '4', '--epochs', '3', '--teacher-epochs', '1', '--batch-size', '128',
        '--threads', '4', '--channels-last']


def _options(toy: bool) -> List[str]:
    return [*DIGITS, *(TOY if toy else REAL)]


# ---- killed and resumed

class _Run:
    """One process of train.py with the log in its folder.

    Args:
        folder: Output folder.
        options: Options of train.py.
        fork: Whether to fork this process, which saves the imports. CUDA does not allow it.
    """

    def __init__(self, folder: Path, options: List[str], fork: bool):
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / 'log.txt'
        options = [*options, '--output', str(folder), '--resume', 'auto', '--deterministic', '--recovery-interval', '2',
                   '--drop', '0.1']
        if fork:
            process = get_context('fork').Process(target=_train, args=(options, self.log))
            process.start()
            self._id, self._wait = process.pid, lambda: process.join() or process.exitcode
            self._poll = lambda: process.exitcode
        else:
            path = f'{ROOT}:{os.environ.get("PYTHONPATH", "")}'
            with open(self.log, 'a') as log:
                started = subprocess.Popen([sys.executable, str(ROOT / 'train.py'), *options], stdout=log,
                                           stderr=subprocess.STDOUT, env={**os.environ, 'PYTHONPATH': path})
            self._id, self._wait, self._poll = started.pid, started.wait, started.poll

    def kill_in_second_epoch(self) -> str:
        """Kill the run once it has a recovery checkpoint of its second epoch; return the checkpoint's name."""
        while self._poll() is None:
            found = sorted((self.log.parent / 'run').glob('recovery-1-*.pth.tar'))
            if found:
                self.end()
                return found[-1].name
            time.sleep(.01)
        raise AssertionError(f'the run ended before its second epoch:\n{self._last_lines()}')

    def finish(self) -> None:
        """Wait for the run. Raise AssertionError if it failed."""
        code = self._wait()
        if code:
            raise AssertionError(f'train.py ended with {code}:\n{self._last_lines()}')

    def end(self) -> None:
        """End the process if it runs (SIGKILL)."""
        if self._poll() is None:
            os.kill(self._id, signal.SIGKILL)
            self._wait()

    def _last_lines(self) -> str:
        return '\n'.join(self.log.read_text().splitlines()[-12:])


def _train(options: List[str], file: Path) -> None:
    """Run train.py in a forked process."""
    import train
    with open(file, 'a') as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    AcceleratorState._reset_state(reset_partial_state=True)
    train.main(options)


def resumed_run(toy: bool) -> Dict[str, Any]:
    """A run that was killed in its second epoch (SIGKILL) and resumed ends with the weights of one that was not."""
    with tempfile.TemporaryDirectory() as root:
        whole, killed = Path(root, 'whole'), Path(root, 'killed')
        runs = [_Run(folder, _options(toy), fork=toy) for folder in (whole, killed)]
        try:
            position = runs[1].kill_in_second_epoch()
            runs.append(_Run(killed, _options(toy), fork=toy))
            runs[0].finish()
            runs[2].finish()
        finally:
            for run in runs:
                run.end()
        first, second = (torch.load(folder / 'run' / 'last.pth.tar', map_location='cpu', weights_only=False)
                         for folder in (whole, killed))
    apart = {key: (value.double() - second['state_dict'][key].double()).abs().max().item()
             for key, value in first['state_dict'].items() if not torch.equal(value, second['state_dict'][key])}
    if apart:
        worst = max(apart, key=lambda key: apart[key])
        raise AssertionError(f'{len(apart)} of {len(first["state_dict"])} tensors differ, {worst} by '
                             f'{apart[worst]:.3g}.')
    return dict(killed_at=position, tensors=len(first['state_dict']))


# ---- in this process

@contextmanager
def _here(options: List[str]) -> Iterator[Path]:
    """Run train.py in this process; gives the folder of the run."""
    import train
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as root:
        try:
            train.main([*options, '--output', root])
            yield Path(root, 'run')
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)  # Accelerate's settings are the process's
            torch.set_num_threads(threads)


def amp_run(dtype: str, toy: bool) -> Dict[str, Any]:
    """train.py --amp: the mean loss of every epoch is finite."""
    with _here([*_options(toy), '--amp', '--amp-dtype', dtype]) as run:
        with open(run / 'summary.csv') as file:
            rows = list(csv.DictReader(file))
    losses = [float(row['train_loss']) for row in rows]
    if not torch.tensor(losses).isfinite().all():
        raise AssertionError(f'losses of the epochs: {losses}')
    return dict(losses=losses, top1=float(rows[-1]['eval_top1']))


def our_frame(filename: str) -> bool:
    """Return whether a file is the package's or train.py."""
    path = Path(filename)
    return ROOT / 'timm_sscl' in path.parents or path == ROOT / 'train.py'


def synchronizations(toy: bool, options: List[str]) -> Dict[str, Any]:
    """Count the reads that make the host wait within train.py's steps, by the calling line.

    The calling line is the innermost one outside torch. Counted are the second and later steps of every epoch.
    """
    import train
    counts: Counter = Counter()
    steps = 0

    def watched(function: Callable, first: int) -> Callable:
        def call(training: Any, *args: Any) -> Any:
            nonlocal steps
            step = next(a for a in args if isinstance(a, int))
            if step < 2:
                return function(training, *args)
            steps += first
            with _count_synchronizations(counts):
                return function(training, *args)
        return call

    before = train.train_step, train.end_step
    train.train_step, train.end_step = watched(before[0], 1), watched(before[1], 0)
    try:
        with _here([*_options(toy), *options]):
            pass
    finally:
        train.train_step, train.end_step = before
    ours = {place: n for place, n in counts.items() if our_frame(place.rsplit(':', 1)[0])}
    return dict(steps=steps, ours_per_step=sum(ours.values()) / max(steps, 1),
                others_per_step=(sum(counts.values()) - sum(ours.values())) / max(steps, 1),
                places={_short(place): n for place, n in counts.most_common(8)})


@contextmanager
def _count_synchronizations(counts: Counter) -> Iterator[None]:
    """Count synchronisations by the calling line, 'file:line'."""
    if not torch.cuda.is_available():
        yield
        return

    def show(message: Any, category: Any, filename: str, lineno: int, *_: Any) -> None:
        if 'synchronizing CUDA operation' in str(message):
            stack = [f for f in traceback.extract_stack()[:-1] if '/torch/' not in f.filename and f.name != 'show'
                     and not f.filename.endswith('warnings.py')]
            counts[f'{stack[-1].filename}:{stack[-1].lineno}'] += 1

    with warnings.catch_warnings():
        warnings.simplefilter('always')
        warnings.showwarning = show
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode('warn')
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(mode)


def _short(place: str) -> str:
    return '/'.join(place.split('/')[-2:])
