"""Runs of train.py, tiny: in a process of their own as a user starts them, or in this one, and what they leave."""
import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from timm.utils.checkpoint_saver import load_checkpoint_metadata

import train

ROOT = Path(__file__).resolve().parent.parent
TINY = ['--model', 'spiking_test_resnet', '--timesteps', '2', '--epochs', '2', '--warmup-epochs', '0',
        '--train-num-samples', '64', '--val-num-samples', '40', '--batch-size', '16', '--log-interval', '2',
        '--threads', '1']
IMAGES = ['--data-dir', 'images', '--model', 'spiking_test_resnet', '-T', '2', '--img-size', '32', '--batch-size', '8',
          '--epochs', '2', '--warmup-epochs', '0', '--workers', '0', '--output', 'out', '--experiment', 'run',
          '--distill', 'none', '--lr', '0.01', '--log-interval', '1', '--scale', '0.5', '1', '--threads', '1']
TAUGHT = [a for a in IMAGES if a not in ('--distill', 'none')]
NO_REPORT = ['--no-report']  # a report takes seconds; the tests of reports write them


def launch(args, cwd):
    """Exit code and output of train.py under accelerate launch."""
    result = subprocess.run(
        [sys.executable, '-m', 'accelerate.commands.launch', str(ROOT / 'train.py'), *args, *NO_REPORT], cwd=cwd,
        capture_output=True, text=True, timeout=600, env={**os.environ, 'PYTHONPATH': str(ROOT)})
    return result.returncode, result.stdout + result.stderr


class Server:
    """A process with everything imported, which forks one training at a time, of one process or of several."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / 'tests' / 'fork_server.py')], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})

    def start(self, args, cwd, processes=1, **job):
        """Process id of the training, or a list of them for several processes."""
        Path(cwd).mkdir(parents=True, exist_ok=True)
        self.log = Path(cwd) / 'log.txt'
        if processes > 1:  # as torchrun sets them; its agent has the store, on a port that was free
            self.store = torch.distributed.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)
            group = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(self.store.port), WORLD_SIZE=str(processes),
                         LOCAL_WORLD_SIZE=str(processes), TORCHELASTIC_USE_AGENT_STORE='True',
                         TORCHELASTIC_RESTART_COUNT='0')
            job['envs'] = [dict(group, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(processes)]
        job.update(args=[*map(str, args), *NO_REPORT], cwd=str(cwd), log=str(self.log))
        self.process.stdin.write(json.dumps(job) + '\n')
        self.process.stdin.flush()
        pids = json.loads(self.process.stdout.readline())
        return pids if processes > 1 else pids[0]

    def wait(self):
        """Exit code, or minus the signal; of several processes the first that is not 0."""
        codes = [os.waitstatus_to_exitcode(status) for status in json.loads(self.process.stdout.readline())]
        return next((code for code in codes if code), 0)

    def run(self, args, cwd, **job):
        self.start(args, cwd, **job)
        code = self.wait()
        return code, self.log.read_text()

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def run_here(args, cwd, monkeypatch):
    """Run train.py in this process, on one thread: other workers of the tests have the other cores."""
    monkeypatch.chdir(cwd)
    args = [*map(str, args), *([] if '--report' in args else NO_REPORT)]
    try:
        train.main(args if '--threads' in args else [*args, '--threads', '1'])
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)  # Accelerate's settings are the process's


def fails(args, cwd, monkeypatch, capsys):
    """Exit code and the one line of the error."""
    with pytest.raises(SystemExit) as exit_:
        run_here(args, cwd, monkeypatch)
    line, = [x for x in capsys.readouterr().err.splitlines() if x.startswith('error: ')]
    return exit_.value.code, line


def run_of(root):
    run, = [p for p in Path(root).iterdir() if p.name != 'teachers']
    return run


def rows_of(run):
    with open(run / 'summary.csv') as f:
        return list(csv.DictReader(f))


def same(a, b, where=''):
    """Whether two nested containers hold exactly the same, with the place of the first difference."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            same(a[key], b[key], f'{where}.{key}')
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            same(x, y, f'{where}[{i}]')
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif a == a:  # not nan
        assert a == b, where


def same_runs(one, other):
    """Every checkpoint of both runs and of their teachers, and the tables."""
    files = sorted(f.relative_to(one) for f in one.rglob('*') if f.is_file() and not f.name.startswith('.'))
    assert files == sorted(f.relative_to(other) for f in other.rglob('*') if f.is_file() and not f.name.startswith('.'))
    assert any(f.name == 'last.pth.tar' for f in files)
    for file in files:
        if file.name.endswith('.pth.tar'):
            a, b = (load_checkpoint_metadata(str(root / file)) for root in (one, other))
            options = [{k: v for k, v in x.pop('args').items() if k != 'resume'} for x in (a, b)]
            assert options[0] == options[1]
            same(a, b, str(file))
        elif file.name == 'summary.csv':
            assert (one / file).read_text() == (other / file).read_text()


def run_killed(server, args, folder, kills, seconds=240):
    """Run train.py in a folder, by the fork server: killed (SIGKILL) some times after a further recovery checkpoint,
    then to its end.
    """
    for n in range(kills):
        pid = server.start(args, folder)
        known, deadline = set(folder.rglob('run/recovery-*')), time.monotonic() + seconds
        while len(set(folder.rglob('run/recovery-*')) - known) < 2 + n:
            time.sleep(0.002)
            assert time.monotonic() < deadline, server.log.read_text()
        os.kill(pid, signal.SIGKILL)
        assert server.wait() == -signal.SIGKILL, server.log.read_text()
    code, log = server.run(args, folder)
    assert code == 0, log
