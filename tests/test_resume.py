"""Runs that are killed, stopped or starved of disk, and go on as if nothing had happened."""
import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from timm.utils.checkpoint_saver import load_checkpoint_metadata

ROOT = Path(__file__).resolve().parent.parent
# everything that draws random numbers or keeps a state
TINY = ['--model', 'spiking_test_resnet', '-T', '2', '--epochs', '3', '--teacher-epochs', '2', '--warmup-epochs', '1',
        '--train-num-samples', '48', '--val-num-samples', '20', '--batch-size', '8', '--log-interval', '100',
        '--output', 'out', '--experiment', 'run', '--recovery-interval', '1', '--checkpoint-hist', '2', '--threads', '1',
        '--drop', '0.1', '--drop-path', '0.1', '--aa', 'rand-m9-mstd0.5', '--reprob', '0.5', '--mixup', '0.2',
        '--cutmix', '0.5', '--model-ema', '--model-ema-decay', '0.9']


class Server:
    """A process with everything imported, which forks one training at a time."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / 'tests' / 'fork_server.py')], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, 'OMP_NUM_THREADS': '1'})

    def start(self, args, cwd, **job):
        Path(cwd).mkdir(parents=True, exist_ok=True)
        self.log = Path(cwd) / 'log.txt'
        job.update(args=[str(a) for a in args], cwd=str(cwd), log=str(self.log))
        self.process.stdin.write(json.dumps(job) + '\n')
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self):
        """Exit code, or minus the signal."""
        return os.waitstatus_to_exitcode(int(self.process.stdout.readline()))

    def run(self, args, cwd, **job):
        self.start(args, cwd, **job)
        code = self.wait()
        return code, self.log.read_text()


@pytest.fixture(scope='module')
def server():
    server = Server()
    yield server
    server.process.stdin.close()
    server.process.wait()


def same(a, b, where='', skip=()):
    """Whether two nested containers hold exactly the same, with the place of the first difference."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            if key not in skip:
                same(a[key], b[key], f'{where}.{key}', skip)
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            same(x, y, f'{where}[{i}]', skip)
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
            a['args'], b['args'] = vars(a['args']), vars(b['args'])
            same(a, b, str(file), skip=('resume', 'max_unreadable'))
        elif file.name == 'summary.csv':
            assert (one / file).read_text() == (other / file).read_text()


@pytest.fixture(scope='module', params=[0, 2], ids=['no workers', 'two workers'])
def whole(request, server, tmp_path_factory):
    """Options and folder of a run that was never stopped."""
    args = [*TINY, '--workers', str(request.param), '--resume', 'auto']
    cwd = tmp_path_factory.mktemp('whole')
    code, log = server.run(args, cwd)
    assert code == 0, log
    return args, cwd


def running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def kill_at_random(pid, cwd, moments):
    """kill -9: one time in four while the run starts, else within some steps after it began to write checkpoints."""
    if moments.random() < 0.25:
        time.sleep(moments.uniform(0.2, 1.5))
    else:
        known = set(cwd.rglob('recovery-*'))
        while not set(cwd.rglob('recovery-*')) - known and running(pid):
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.3))
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:  # it had ended
        pass


def test_killed_again_and_again_it_ends_bit_identical(server, whole, tmp_path):
    """kill -9 at random moments of the whole run, the teacher's training and the writing of checkpoints included."""
    args, reference = whole
    moments = random.Random(0)
    kills, code = 0, None
    while code != 0:
        pid = server.start(args, tmp_path)
        killer = threading.Thread(target=kill_at_random, args=(pid, tmp_path, moments))
        killer.start()
        code = server.wait()
        killer.join()
        assert code in (0, -signal.SIGKILL), server.log.read_text()
        kills += code != 0
    print(f'{kills} kills')
    assert kills >= 10  # of each of two runs
    same_runs(reference / 'out', tmp_path / 'out')
