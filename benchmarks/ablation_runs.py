"""Trainings of the ablation: run, skip, resume and share them between processes."""
import fcntl
import json
import math
import os
import shutil
import subprocess
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np

__all__ = ['Run', 'Runner', 'finished_runs', 'is_done', 'recorded_device']


class Run(NamedTuple):
    """One training, identified within its phase by the fields below."""
    phase: str
    variant: str
    seed: int
    timesteps: int  # 0 for the teacher
    options: Dict[str, Any]  # options of train.py, by name

    @property
    def name(self) -> str:
        return f'{self.phase}-{self.variant}-T{self.timesteps}-s{self.seed}'


def is_done(folder: Path) -> bool:
    return (folder / 'summary.json').is_file() and (folder / 'summary.csv').is_file()


def start_arguments(folder: Path, arguments: Sequence[str]) -> List[str]:
    """Return the arguments of train.py: the run's, or --resume if there is a checkpoint."""
    if (folder / 'last.pth.tar').is_file() and (folder / 'args.yaml').is_file():
        return ['--resume', str(folder)]
    if folder.exists():
        shutil.rmtree(folder)  # interrupted before its first checkpoint
    return list(arguments)


class Runner:
    """Run trainings, several at a time, each in a process that holds the run's lock file.

    Args:
        output: Root of all runs.
        parallel: Number of simultaneous runs.
        deadline: time.time() by which the last run must be done; None for no limit.
        revision: Code revision to record.
        train: Command that starts a training.
        max_load: Start runs only while the machine's load (1 minute) is below this.
        device: Name of the device, to record.
    """

    def __init__(
            self,
            output: Path,
            parallel: int,
            deadline: Optional[float],
            revision: str,
            train: Sequence[str],
            max_load: float = math.inf,
            device: Optional[str] = None,
    ):
        self.output, self.parallel, self.deadline, self.revision = output, parallel, deadline, revision
        self.max_load, self.device = max_load, device
        self.train = list(train)
        self.seconds: List[Tuple[int, float]] = []  # (timesteps, seconds) of the runs of this process

    def folder(self, run: Run) -> Path:
        return self.output / 'runs' / run.name

    def estimate(self, run: Run) -> Optional[float]:
        """Estimate the duration of a run in seconds from finished runs, proportional to T; None if there are none."""
        known = self.seconds or [
            (run.timesteps, json.loads((folder / 'summary.json').read_text())['seconds'])
            for run, _, folder in finished_runs(self.output)]
        known = [(t, s) for t, s in known if t > 0]
        if run.timesteps == 0 or not known:
            return None
        return float(np.mean([s / t for t, s in known])) * run.timesteps

    def show_plan(self, runs: Sequence[Run]) -> None:
        """Print all runs with their state, and the estimated time left."""
        left = [run for run in runs if not is_done(self.folder(run))]
        print(f'{len(runs)} runs, {len(runs) - len(left)} of them done; {self.parallel} at a time:')
        for run in runs:
            folder = self.folder(run)
            state = 'done' if is_done(folder) else 'resumes' if (folder / 'last.pth.tar').is_file() else 'new'
            print(f'  {state:<8} {run.name}')
        print(f'ETA {self._eta(left)}', flush=True)

    def _eta(self, left: Sequence[Run]) -> str:
        seconds = [self.estimate(run) for run in left]
        if not left:
            return '0:00:00'
        if None in seconds:
            return 'unknown before the first run is done'
        return str(timedelta(seconds=round(sum(seconds) / self.parallel)))

    def __call__(self, runs: Sequence[Run], arguments: Mapping[str, Sequence[str]]) -> None:
        """Run what is not done, in this order.

        Args:
            runs: The runs.
            arguments: Arguments of train.py, by the name of the run.

        Raises:
            SystemExit: A training failed. The message names its log.
        """
        waiting = [run for run in runs if not is_done(self.folder(run))]
        active: List[Tuple[Run, subprocess.Popen, float]] = []
        try:
            while waiting or active:
                while waiting and len(active) < self.parallel and os.getloadavg()[0] < self.max_load:
                    started = self._start(waiting.pop(0), arguments, len(waiting))
                    active += [started] if started else []
                if waiting or active:
                    time.sleep(0.5)
                for item in [item for item in active if item[1].poll() is not None]:
                    active.remove(item)
                    self._finish(*item, waiting)
        finally:
            for _, process, _ in active:
                process.terminate()

    def _start(self, run: Run, arguments: Mapping[str, Sequence[str]], left: int):
        folder = self.folder(run)
        estimate = self.estimate(run)
        if self.deadline is not None and time.time() + (estimate or 0) > self.deadline:
            print(f'{run.name}: not started, it would not be done by the deadline.', flush=True)
            return None
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = open(folder.parent / f'{folder.name}.lock', 'w')
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f'{run.name}: another process runs it.', flush=True)
            return None
        if is_done(folder):  # another process has finished it meanwhile
            return None
        words = start_arguments(folder, arguments[run.name])
        facts = {**run._asdict(), 'revision': self.revision, 'device': self.device}
        (folder.parent / f'{folder.name}.json').write_text(json.dumps(facts, indent=1) + '\n')
        with open(folder.parent / f'{folder.name}.log', 'a') as log:
            # the child inherits the lock, which therefore holds while the training runs, even if this process ends
            process = subprocess.Popen([*self.train, *words], stdout=log, stderr=log, pass_fds=[lock.fileno()])
        lock.close()
        print(f'{datetime.now():%H:%M:%S} {run.name}: started{" again" if words[0] == "--resume" else ""}, '
              f'{left} behind it', flush=True)
        return run, process, time.time()

    def _finish(self, run: Run, process: subprocess.Popen, started: float, waiting: Sequence[Run]) -> None:
        folder = self.folder(run)
        if process.returncode or not is_done(folder):
            raise SystemExit(f'{run.name}: train.py failed; see {folder.parent / (folder.name + ".log")}')
        summary = json.loads((folder / 'summary.json').read_text())
        self.seconds.append((run.timesteps, time.time() - started))
        print(f'{datetime.now():%H:%M:%S} {run.name}: {summary["student"]["top1"]:.2f} top-1 after '
              f'{time.time() - started:.0f} s; ETA {self._eta(waiting)}', flush=True)


def recorded_device(folder: Path) -> Optional[str]:
    """Return the device that a run was last started on; None for runs that did not record it."""
    return json.loads((folder.parent / f'{folder.name}.json').read_text()).get('device')


def finished_runs(output: Path) -> Iterator[Tuple[Run, str, Path]]:
    """Yield (run, code revision, folder) of all finished runs."""
    for file in sorted((output / 'runs').glob('*.json')):
        folder = file.with_suffix('')
        if is_done(folder):
            facts = json.loads(file.read_text())
            yield Run(*(facts[field] for field in Run._fields)), facts['revision'], folder
