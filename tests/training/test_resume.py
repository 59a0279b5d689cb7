"""Runs that are killed, stopped or starved of disk, and go on as if nothing had happened."""
import csv
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
from timm.utils.checkpoint_saver import load_checkpoint_metadata

from runs import fails, same_runs

pytestmark = pytest.mark.slow  # starts processes
ROOT = Path(__file__).resolve().parents[2]
# everything that draws random numbers or keeps a state
TINY = ['--model', 'spiking_test_resnet', '-T', '2', '--epochs', '3', '--teacher-epochs', '2', '--warmup-epochs', '1',
        '--train-num-samples', '48', '--val-num-samples', '20', '--batch-size', '8', '--log-interval', '100',
        '--output', 'out', '--experiment', 'run', '--recovery-interval', '1', '--checkpoint-hist', '2',
        '--threads', '1', '--drop', '0.1', '--drop-path', '0.1', '--aa', 'rand-m9-mstd0.5', '--reprob', '0.5',
        '--mixup', '0.2', '--cutmix', '0.5', '--model-ema', '--model-ema-decay', '0.9']


def start_to_end(server, cwd, workers):
    """Options and folder of a run that was never stopped."""
    args = [*TINY, '--workers', str(workers), '--resume', 'auto']
    code, log = server.run(args, cwd)
    assert code == 0, log
    return args, cwd


@pytest.fixture(scope='module')
def without_workers(server, tmp_path_factory):
    return start_to_end(server, tmp_path_factory.mktemp('without_workers'), 0)


@pytest.fixture(scope='module')
def with_workers(server, tmp_path_factory):
    return start_to_end(server, tmp_path_factory.mktemp('with_workers'), 2)


@pytest.fixture(params=['without_workers', 'with_workers'])
def whole(request):
    return request.getfixturevalue(request.param)


def running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def kill_at_random(pid, cwd, moments):
    """kill -9: one time in four while the run starts, else some steps after it began to write checkpoints."""
    if moments.random() < 0.25:
        time.sleep(moments.uniform(0.2, 1.5))
    else:
        known, seen, steps = set(cwd.rglob('recovery-*')), set(), moments.randint(1, 6)
        while len(seen) < steps and running(pid):
            seen |= set(cwd.rglob('recovery-*')) - known
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.1))
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:  # it had ended
        pass


def kill_until_it_ends(server, args, cwd, moments, most=12):
    """How often a run was killed before it came to its end; after `most` times it is left alone."""
    kills = 0
    while True:
        pid = server.start(args, cwd)
        killer = threading.Thread(target=kill_at_random, args=(pid, cwd, moments))
        if kills < most:
            killer.start()
        code = server.wait()
        if kills < most:
            killer.join()
        assert code in (0, -signal.SIGKILL), server.log.read_text()
        if code == 0:
            return kills
        kills += 1


def test_killed_again_and_again_it_ends_bit_identical(server, whole, tmp_path):
    """kill -9 at random moments of the whole run, the teacher's training and the writing of checkpoints included."""
    args, reference = whole
    moments = random.Random(0)
    kills = []
    while sum(kills) < 6:  # with and without workers each; on a fast machine one run may end before
        cwd = tmp_path / str(len(kills))
        kills.append(kill_until_it_ends(server, args, cwd, moments))
        same_runs(reference / 'out', cwd / 'out')
        assert len(kills) < 20
    print(f'kills: {kills}')


# ---- checkpoints

@pytest.fixture
def run(without_workers, tmp_path):
    """A copy of the finished run without workers, which a test may break."""
    args, cwd = without_workers
    shutil.copytree(cwd / 'out', tmp_path / 'out')
    return [*args[:args.index('--resume')]], tmp_path


STOP = '''
import logging, os

class Stop(logging.Handler):
    def emit(self, record):
        if {after!r} in record.getMessage():
            logging.getLogger('train').removeHandler(self)
            os.kill(os.getpid(), {number})

logging.getLogger('train').addHandler(Stop())
'''


def interrupted(server, cwd, args, after, number=signal.SIGTERM):
    """Exit code and log of a run that gets a signal at the moment it logs these words."""
    return server.run(args, cwd, setup=STOP.format(after=after, number=int(number)))


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_stops_and_names_the_command_that_goes_on(server, whole, tmp_path, number):
    args, reference = whole
    code, log = interrupted(server, tmp_path, args, 'student epoch 1/3 validation', number)
    assert code == 128 + number, log
    assert f'error: stopped by {number.name}' in log and 'Traceback' not in log
    command = next(line for line in log.splitlines() if line.startswith('To go on: '))
    launcher, resume = command[len('To go on: '):].split('train.py ')
    assert launcher.startswith(f'{sys.executable} ') and resume == '--resume out/run'
    code, log = server.run(resume.split(), tmp_path)
    assert code == 0, log
    same_runs(reference / 'out', tmp_path / 'out')


def cut(file):
    file.write_bytes(file.read_bytes()[:-1000])


def flip(file):
    """One bit, in the middle of the weights."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize('damage', [cut, flip])
def test_damaged_checkpoint_is_named_and_the_one_before_it_is_taken(server, run, damage):
    args, cwd = run
    last, kept = cwd / 'out/run/last.pth.tar', sorted((cwd / 'out/run').glob('checkpoint-*'))
    best = cwd / 'out/run/model_best.pth.tar'
    shutil.copy(last, cwd / 'copy')  # not a hard link
    last.unlink()
    shutil.move(cwd / 'copy', last)
    damage(last)
    if (cwd / 'out/run/checkpoint-2.pth.tar').exists():  # else the same epoch is there a second time
        (cwd / 'out/run/checkpoint-2.pth.tar').unlink()
    if best.exists() and load_checkpoint_metadata(str(best))['epoch'] == 2:
        best.unlink()
    before = {file: file.read_bytes() for file in kept if file.exists()}
    assert before
    code, log = server.run(['--resume', 'out/run/last.pth.tar', *args], cwd)
    assert code == 2 and "'out/run/last.pth.tar' is damaged" in log and '--resume out/run' in log
    (cwd / 'log.txt').unlink()
    code, log = server.run(['--resume', 'out/run'], cwd)
    assert code == 0, log
    assert "Checkpoint 'out/run/last.pth.tar' is damaged and skipped" in log
    left = [file for file in before if file.exists()]
    assert left and all(file.read_bytes() == before[file] for file in left)
    assert load_checkpoint_metadata(str(last))['epoch'] == 2  # trained again


LIMIT = ('import resource, signal; resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0})); '
         'signal.signal(signal.SIGXFSZ, signal.SIG_IGN)')


def test_full_disk_stops_with_a_message_and_leaves_the_earlier_checkpoints_whole(server, run):
    args, cwd = run
    files = {f: f.read_bytes() for f in (cwd / 'out/run').glob('*.pth.tar')}
    room = max(map(len, files.values())) // 2
    code, log = server.run(['--resume', 'out/run', '--epochs', '4'], cwd, setup=LIMIT.format(room))
    assert code == 1, log
    line = next(x for x in log.splitlines() if x.startswith('error: '))
    assert "cannot write 'out/run/recovery-3-1.pth.tar'" in line and 'Free space' in line
    assert {f: f.read_bytes() for f in (cwd / 'out/run').glob('*.pth.tar')} == files
    assert not list((cwd / 'out').rglob('*.part'))


def test_folder_that_cannot_be_written_is_found_before_training(server, tmp_path):
    (tmp_path / 'file').write_text('mine')
    code, log = server.run([*TINY, '--workers', '0', '--output', 'file'], tmp_path)
    assert code == 2 and "cannot write to the folder 'file/run'" in log and 'epoch 1' not in log
    assert (tmp_path / 'file').read_text() == 'mine'


def test_second_process_in_the_same_folder_is_refused(server, run):
    args, cwd = run
    from timm_sscl.training.saving.checkpoint import lock_folder
    with lock_folder(cwd / 'out/run'):
        code, log = server.run(['--resume', 'out/run', '--epochs', '4'], cwd)
    assert code == 2 and "'out/run' is being written by another process" in log


def test_resume_auto_finds_the_run_by_its_options(server, run):
    args, cwd = run
    at = args.index('--experiment')
    unnamed = [*args[:at], *args[at + 2:]]
    code, log = interrupted(server, cwd, [*unnamed, '--seed', '1'], 'student epoch 1/3 validation')
    started, = [f for f in (cwd / 'out').iterdir() if f.name not in ('teachers', 'run')]
    (cwd / 'log.txt').unlink()
    code, log = server.run([*unnamed, '--seed', '1', '--resume', 'auto'], cwd)
    assert code == 0 and f'Goes on from {started.relative_to(cwd)}' in log
    assert len(list((cwd / 'out').iterdir())) == 3
    with open(started / 'summary.csv') as f:
        assert [row['epoch'] for row in csv.DictReader(f)] == ['0', '1', '2']


def test_plateau_schedule_and_accumulation_go_on_exactly(server, tmp_path):
    args = [*TINY, '--workers', '0', '--resume', 'auto', '--sched', 'plateau', '--patience-epochs', '0',
            '--warmup-epochs', '0', '--grad-accum-steps', '2', '--clip-grad', '1', '--loss', 'sscl=0.1,kd=1',
            '--epochs', '4', '--teacher-epochs', '1']
    assert server.run(args, tmp_path / 'whole')[0] == 0
    code, log = interrupted(server, tmp_path / 'cut', args, 'student epoch 2/4 validation')
    assert code == 128 + signal.SIGTERM, log
    state = load_checkpoint_metadata(str(next((tmp_path / 'cut/out/run').glob('recovery-*'))))['run_state']
    assert state['position'][1] % 2 == 0  # between two windows, not inside one
    code, log = server.run(args, tmp_path / 'cut')
    assert code == 0, log
    same_runs(tmp_path / 'whole/out', tmp_path / 'cut/out')
    with open(tmp_path / 'cut/out/run/summary.csv') as f:
        assert len({row['lr'] for row in csv.DictReader(f)}) > 1  # the plateau was met


def test_ending_the_launcher_saves_and_stops_the_training(tmp_path):
    """accelerate launch does not hand on SIGTERM."""
    with open(tmp_path / 'log.txt', 'w') as log:
        process = subprocess.Popen(
            [sys.executable, '-m', 'accelerate.commands.launch', str(ROOT / 'train.py'), *TINY, '--workers', '0',
             '--epochs', '50', '--distill', 'none'], cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 300
    while 'epoch 1/50 validation' not in (tmp_path / 'log.txt').read_text():
        time.sleep(0.02)
        assert process.poll() is None and time.monotonic() < deadline
    process.terminate()
    process.wait()
    while 'stopped by SIGTERM' not in (tmp_path / 'log.txt').read_text():
        time.sleep(0.02)
        assert time.monotonic() < deadline, (tmp_path / 'log.txt').read_text()
    assert 'To go on: accelerate launch' in (tmp_path / 'log.txt').read_text()
    assert list((tmp_path / 'out/run').glob('recovery-*'))


@pytest.mark.parametrize('args', [[], ['--eval-only']])
def test_a_folder_above_runs_names_them(args, tmp_path, monkeypatch, capsys):
    for name in ('a', 'b', 'no_run'):
        (tmp_path / 'out' / name).mkdir(parents=True)
    for name in ('a', 'b'):
        (tmp_path / 'out' / name / 'args.yaml').write_text('epochs: 1\n')
    code, line = fails(['--distill', 'none', '--resume', 'out', *args], tmp_path, monkeypatch, capsys)
    assert code and "--resume: 'out'" in line and line.endswith('; folders in it hold runs: out/a, out/b.')
