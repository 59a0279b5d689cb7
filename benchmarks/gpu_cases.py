"""Run cases one by one: each result is one line of a JSON file, a second call goes on, and the time is boxed."""
import json
import os
import signal
import sys
import threading
import time
import traceback
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Sequence

import torch

__all__ = ['Case', 'Ledger', 'agree', 'run_cases', 'synchronize']


class Case(NamedTuple):
    """One check or measurement.

    Attributes:
        name: Unique name.
        run: Returns what was measured. It raises if a check fails.
        seconds: Expected duration at most. The case does not start if less time is left.
    """
    name: str
    run: Callable[[], Mapping[str, Any]]
    seconds: float = 10.


class Ledger:
    """Results of a phase, one JSON object per line: `case`, `ok`, `seconds`, and what the case measured or `error`.

    Args:
        file: File of the results. Lines of earlier calls count as done.
        retry: Whether cases that failed earlier run again. The last line of a case counts.
    """

    def __init__(self, file: Path, retry: bool = False):
        self.file, self.retry = file, retry
        file.parent.mkdir(parents=True, exist_ok=True)
        self._earlier = {row['case']: row['ok'] for row in self.rows()}

    def rows(self) -> List[Dict[str, Any]]:
        """Return the last result of every case. A line that was cut off is left out."""
        rows = {}
        for line in self.file.read_text().splitlines() if self.file.is_file() else []:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            rows[row['case']] = row
        return list(rows.values())

    def is_done(self, name: str) -> bool:
        """Return whether an earlier call ran the case, and it is not to run again."""
        return name in self._earlier and (self._earlier[name] or not self.retry)

    def append(self, **row: Any) -> None:
        with open(self.file, 'a') as file:
            file.write(json.dumps(row) + '\n')


def run_cases(cases: Sequence[Case], ledger: Ledger, deadline: float) -> List[str]:
    """Run all cases that are not done, and return the names of those for which no time was left.

    Args:
        cases: The cases, the most important first.
        ledger: Where results go.
        deadline: Time (`time.time()`) at which the last case has to be over.
    """
    left_out = []
    for case in cases:
        if ledger.is_done(case.name):
            continue
        began = time.time()
        if began + case.seconds > deadline:
            left_out.append(case.name)
            continue
        try:
            with _time_limit(min(4 * case.seconds, deadline - began + case.seconds)):
                row = dict(ok=True, **case.run())
        except Exception as error:
            row = dict(ok=False, error=_describe(error))
        row['seconds'] = round(time.time() - began, 2)
        ledger.append(case=case.name, **row)
        print(f'{"ok  " if row["ok"] else "FAIL"} {row["seconds"]:6.1f} s  {case.name}'
              + ('' if row['ok'] else f': {row["error"].splitlines()[-1][:160]}'), flush=True)
        _recover()
    return left_out


def _describe(error: Exception) -> str:
    lines = ''.join(traceback.format_exception(type(error), error, error.__traceback__)).rstrip().splitlines()
    return '\n'.join(lines[-14:])


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the code inside after this many seconds. Without effect outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError(f'the case took more than {seconds:.0f} s.')

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _recover() -> None:
    """Free the device's memory. After an error that ended its context, start this process again for the next cases."""
    if not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        print(f'The CUDA context is lost ({str(error).splitlines()[0][:120]}): a new process goes on.', flush=True)
        os.execv(sys.executable, [sys.executable, *(arg for arg in sys.argv if arg != '--retry')])


def synchronize(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize()


def agree(what: str, got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], tolerance: float) -> float:
    """Return the largest difference of tensors on any devices, relative to the largest expected value of all.

    Raises:
        AssertionError: It is above the tolerance, or a value is not finite.
    """
    pairs = [(g.detach().cpu().double(), e.detach().cpu().double()) for g, e in zip(got, expected)]
    if len(got) != len(expected) or not pairs:
        raise AssertionError(f'{what}: {len(got)} tensors, {len(expected)} expected.')
    size = torch.stack([e.abs().max() for _, e in pairs if e.numel()]).max().item()
    apart = torch.stack([(g - e).abs().max() for g, e in pairs if e.numel()]).max().item()  # nan if any is nan
    if not apart <= tolerance * max(size, 1e-30):
        raise AssertionError(f'{what}: {apart:.3g} apart, the largest value is {size:.3g}; allowed is {tolerance:g} '
                             f'of it.')
    return apart / max(size, 1e-30)
