"""train.py on two processes on a CPU, as torchrun starts them: who trains on what, who writes, and how it goes on.

Where the launcher has no part in it, the two are forked from a process that has imported everything.
"""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil  # Accelerate needs it too
import pytest

from files import write_images
from runs import rows_of, same_runs

pytestmark = pytest.mark.slow  # starts processes
ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = {
    'torchrun': [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2'],
    'accelerate': [sys.executable, '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2',
                   '--main_process_port', '0'],
}
# a loss that writes down which images each process sees
SPY = '''
import hashlib, json
from accelerate.state import PartialState
from timm_sscl import register_loss


@register_loss('spy')
def spy(step):
    state = PartialState()
    digests = [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in step.input.detach()]
    with open(f'seen-{state.process_index}.jsonl', 'a') as f:
        f.write(json.dumps([state.num_processes, step.student.training, digests]) + '\\n')
    return step.logits.sum() * 0
'''
ARGS = ['--data-dir', 'images', '--model', 'spiking_test_resnet', '-T', '2', '--img-size', '32', '--batch-size', '4',
        '--epochs', '8', '--teacher-epochs', '1', '--warmup-epochs', '0', '--workers', '0', '--threads', '1',
        '--output', 'out', '--experiment', 'run', '--recovery-interval', '1', '--lr', '0.01', '--checkpoint-hist', '1']


def start(cwd, args, launcher='torchrun'):
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    if launcher == 'accelerate':
        env['ACCELERATE_USE_CPU'] = 'true'
    with open(cwd / 'log.txt', 'a') as log:
        return subprocess.Popen([*LAUNCHERS[launcher], str(ROOT / 'train.py'), *args], cwd=cwd, env=env, stdout=log,
                                stderr=subprocess.STDOUT, start_new_session=True)


def finish(process, cwd):
    code = process.wait(timeout=300)
    return code, (cwd / 'log.txt').read_text()


def wait_for_epoch(cwd, epoch, runs, timeout=300):
    """Until a checkpoint within that epoch, or a later one, was written."""
    deadline = time.monotonic() + timeout
    while not any(int(file.name.split('-')[1]) >= epoch for file in cwd.glob('out/run/recovery-*.pth.tar')):
        assert runs() and time.monotonic() < deadline, (cwd / 'log.txt').read_text()
        time.sleep(0.01)


@pytest.fixture(scope='module')
def whole(server, tmp_path_factory):
    """A run on two processes that was not stopped, with what each saw."""
    cwd = tmp_path_factory.mktemp('whole')
    write_images(cwd / 'images', per_class=15)
    (cwd / 'spy.py').write_text(SPY)
    args = [*ARGS, '--no-aug', '--loss-file', 'spy.py', '--loss', 'sscl=0.1,spy=1']
    code, log = server.run(args, cwd, processes=2)
    assert code == 0, log
    return cwd, log


def test_processes_train_on_disjoint_samples_and_one_writes(whole):
    cwd, log = whole
    seen = [[json.loads(line) for line in (cwd / f'seen-{rank}.jsonl').read_text().splitlines()] for rank in (0, 1)]
    for rank in (0, 1):
        assert all(processes == 2 and training for processes, training, _ in seen[rank])
    for epoch in range(8):  # 45 images, 5 whole batches of 2 x 4 per epoch
        steps = [[digest for _, _, batch in seen[rank][5 * epoch:5 * epoch + 5] for digest in batch] for rank in (0, 1)]
        assert [len(s) for s in steps] == [20, 20]
        assert len({*steps[0], *steps[1]}) == 40
    assert len(seen[0]) == len(seen[1]) == 40
    assert log.count('Student   ') == 1 and log.count('student epoch 1/8 validation') == 1


def test_metrics_count_exactly_the_validation_set(whole):
    cwd, _ = whole
    for row in rows_of(cwd / 'out/run'):
        correct = float(row['eval_top1']) * 45 / 100
        assert correct == pytest.approx(round(correct), abs=1e-6)


def test_killed_on_two_processes_it_ends_bit_identical(server, whole, tmp_path):
    (tmp_path / 'images').symlink_to(whole[0] / 'images')
    (tmp_path / 'spy.py').write_text(SPY)
    args = [*ARGS, '--no-aug', '--loss-file', 'spy.py', '--loss', 'sscl=0.1,spy=1', '--resume', 'auto']
    pids = server.start(args, tmp_path, processes=2)
    wait_for_epoch(tmp_path, 0, lambda: all(map(psutil.pid_exists, pids)))
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert server.wait() == -signal.SIGKILL
    process = start(tmp_path, args)
    wait_for_epoch(tmp_path, 4, lambda: process.poll() is None)  # the killed one had not come so far
    process.send_signal(signal.SIGTERM)  # torchrun hands it on
    code, log = finish(process, tmp_path)
    assert code != 0 and 'error: stopped by SIGTERM' in log
    assert 'torchrun --nproc_per_node 2' in log and '--resume out/run' in log
    code, log = server.run(args, tmp_path, processes=2)
    assert code == 0, log
    same_runs(whole[0] / 'out', tmp_path / 'out')


def test_signal_to_one_process_stops_both_at_one_step(server, whole, tmp_path):
    """The other one learns of it a step later, whatever --log-interval is; the run goes on bit for bit."""
    (tmp_path / 'images').symlink_to(whole[0] / 'images')
    (tmp_path / 'spy.py').write_text(SPY)
    args = [*ARGS, '--no-aug', '--loss-file', 'spy.py', '--loss', 'sscl=0.1,spy=1', '--resume', 'auto',
            '--log-interval', '1000', '--recovery-interval', '3']
    pids = server.start(args, tmp_path, processes=2)
    wait_for_epoch(tmp_path, 1, lambda: all(map(psutil.pid_exists, pids)))
    os.kill(pids[1], signal.SIGTERM)
    assert server.wait() != 0
    log = (tmp_path / 'log.txt').read_text()
    assert log.count('stopped by SIGTERM') == 2 and log.count('saving and stopping after this step') == 1, log
    code, log = server.run(args, tmp_path, processes=2)
    assert code == 0 and 'Goes on from' in log, log
    seen = [(tmp_path / f'seen-{rank}.jsonl').read_text().splitlines() for rank in (0, 1)]
    assert [len(lines) for lines in seen] == [40, 40]  # no step was done twice, and none left out


def test_accelerate_launch_on_two_processes(tmp_path):
    write_images(tmp_path / 'images', per_class=7)
    (tmp_path / 'spy.py').write_text(SPY)
    code, log = finish(
        start(tmp_path, [*ARGS, '--epochs', '1', '--loss-file', 'spy.py', '--loss', 'spy=1'], 'accelerate'), tmp_path)
    assert code == 0, log
    for rank in (0, 1):
        assert json.loads((tmp_path / f'seen-{rank}.jsonl').read_text().splitlines()[0])[0] == 2


@pytest.mark.parametrize('split', ['train', 'validation'])
def test_unreadable_image_of_one_process_stops_both_with_a_line_each(split, server, tmp_path):
    write_images(tmp_path / 'images', per_class=15)
    file = sorted((tmp_path / 'images' / split).rglob('*.png'))[30 if split == 'train' else 40]
    file.write_bytes(file.read_bytes()[:100])
    args = [*ARGS, '--epochs', '3', '--distill', 'none', '--max-unreadable', '0', '--neuron-init', 'none']
    code, log = server.run(args, tmp_path, processes=2)
    assert code != 0
    errors = [line for line in log.splitlines() if line.startswith('error')]
    assert len(errors) == 2, log
    for words in ('cannot be read', 'another process'):
        assert sum(words in line for line in errors) == 1
    assert 'RuntimeError' not in log.split('error')[0] and 'gloo' not in log
    assert '--resume out/run' in log


# ---- one process that ends takes the others with it, each in a line

LIMIT = '''
import resource, signal, os
from timm_sscl import register_loss
calls = 0


@register_loss('limited')
def limited(step):
    global calls
    calls += 1
    if calls == 3 and os.environ['RANK'] == '0':
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))
    return step.logits.sum() * 0
'''
KILL = '''
import os, signal
import psutil
from timm_sscl import register_loss
calls = 0


@register_loss('kills')
def kills(step):
    global calls
    calls += 1
    if calls == 3 and os.environ['RANK'] == '1':
        for process in {processes}:
            process.send_signal(signal.SIGKILL)
    return step.logits.sum() * 0
'''


def errors_of(server, args, cwd):
    write_images(cwd / 'images', per_class=15)
    code, log = server.run([*ARGS, '--epochs', '3', '--neuron-init', 'none', *args], cwd, processes=2)
    assert code != 0
    assert 'train.py", line' not in log, log  # no traceback but the launcher's own
    return [line for line in log.splitlines() if line.startswith('error')], log


def test_full_disk_of_one_process_stops_both(server, tmp_path):
    (tmp_path / 'limit.py').write_text(LIMIT)
    errors, log = errors_of(server, ['--loss-file', 'limit.py', '--loss', 'limited=1'], tmp_path)
    assert len(errors) == 2, log
    assert sum('cannot write' in line for line in errors) == sum('another process' in line for line in errors) == 1
    assert 'Newest whole checkpoint: out/run/recovery-0-2.pth.tar' in log


@pytest.mark.parametrize('processes, words', [
    ('psutil.Process().children()[:1]', ['a worker of the data loader died', 'another process']),
    ('[psutil.Process()]', ['another process'])])
def test_killed_worker_or_process_stops_the_rest(processes, words, server, tmp_path):
    (tmp_path / 'kill.py').write_text(KILL.format(processes=processes))
    errors, log = errors_of(server, ['--loss-file', 'kill.py', '--loss', 'kills=1', '--workers', '1'], tmp_path)
    assert len(errors) == len(words), log
    for word in words:
        assert sum(word in line for line in errors) == 1, log
    assert 'Newest whole checkpoint: out/run/recovery-0-' in log


def test_unreadable_image_of_the_calibration_stops_both(server, tmp_path):
    write_images(tmp_path / 'images', per_class=15)
    for file in (tmp_path / 'images' / 'train').rglob('*.png'):
        file.write_bytes(file.read_bytes()[:100])
    code, log = server.run([*ARGS, '--distill', 'none', '--max-unreadable', '0'], tmp_path, processes=2)
    errors = [line for line in log.splitlines() if line.startswith('error')]
    assert code != 0 and len(errors) == 2 and 'RuntimeError' not in log.split('error')[0], log
    assert all('cannot be read' in line or 'another process' in line for line in errors)
