"""benchmarks/gpu.py at its tiny size on the CPU, and how it resumes, keeps to its time and survives failures."""
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / 'benchmarks'))

import gpu
import gpu_cases
import gpu_report
import gpu_tests
import gpu_training
from gpu_cases import Case, Ledger, run_cases
from timm_sscl.neurons.kernels.batch_norm_recompute import NormSource

CPU = torch.device('cpu')


def _call(*args):
    gpu.main(['--toy', '--minutes', '10', *map(str, args)])


@pytest.fixture(autouse=True)
def _own_deadline(monkeypatch):
    monkeypatch.setenv(gpu._DEADLINE, str(time.time() + 600))


# ---- the cases

@pytest.fixture(scope='module')
def checked(tmp_path_factory):
    """Results of every check that starts no training."""
    ledger = Ledger(tmp_path_factory.mktemp('gpu') / 'gpu_tests.jsonl')
    cases = [case for case in gpu_tests.create_cases(CPU, toy=True) if 'train.py' not in case.name]
    run_cases(cases, ledger, time.time() + 600)
    return cases, ledger


def test_every_check_passes_on_the_cpu(checked):
    cases, ledger = checked
    rows = ledger.rows()
    assert [row['case'] for row in rows] == [case.name for case in cases]
    assert not [(row['case'], row['error']) for row in rows if not row['ok']]


def test_checks_see_wrong_numbers(monkeypatch):
    """A device that computes something else: the checks fail."""
    calls = []

    def one_percent_off(*args, run=gpu_tests._run_neuron):
        calls.append(args)
        return [t * (1.01 if len(calls) % 2 == 0 else 1.) for t in run(*args)]  # the reference comes first
    monkeypatch.setattr(gpu_tests, '_run_neuron', one_percent_off)
    for case in (lambda: gpu_tests.lif_exact(CPU, {}, 'contiguous', 'eager'),
                 lambda: gpu_tests.neuron(CPU, 'plif', 'eager')):
        calls.clear()
        with pytest.raises(AssertionError):
            case()
    monkeypatch.setattr(NormSource, 'of', classmethod(lambda cls, x: None))
    with pytest.raises(AssertionError, match='bytes kept'):
        gpu_tests.norm_memory(CPU, 8)


@pytest.mark.slow
def test_trainings_and_measurements(tmp_path, capsys):
    _call('--phase', 'tests', '--only', 'train.py', '--output', tmp_path)
    _call('--phase', 'bench', '--output', tmp_path)
    rows = [row for phase in ('tests', 'bench') for row in Ledger(tmp_path / f'gpu_{phase}.jsonl').rows()]
    assert not [(row['case'], row['error']) for row in rows if not row['ok']]
    assert len(list(tmp_path.iterdir())) <= 8
    lines = gpu_report.sections(tmp_path)
    gpu_report.draw(tmp_path, tmp_path / 'steps.svg')
    assert sum(line.startswith('| test_resnet') for line in lines) == 5 and (tmp_path / 'steps.svg').stat().st_size
    assert any('checks against the CPU passed' in line for line in lines)
    assert len(capsys.readouterr().out.splitlines()) < 400


# ---- the ledger

def _cases(*names, fail=()):
    ran = []

    def run(name):
        ran.append(name)
        if name in fail:
            raise ValueError(f'{name} is wrong')
        return dict(value=len(ran))
    return [Case(name, lambda n=name: run(n), 1.) for name in names], ran


def test_second_call_goes_on(tmp_path):
    file, later = tmp_path / 'x.jsonl', time.time() + 600
    cases, ran = _cases('a', 'b', 'c', fail=['b'])
    assert run_cases(cases[:2], Ledger(file), later) == []
    file.write_text(file.read_text() + '{"case": "c", "ok"')  # the line of a process that was killed
    with open(file, 'a') as f:
        f.write('\n')
    assert run_cases(cases, Ledger(file), later) == [] and ran == ['a', 'b', 'c']
    rows = {row['case']: row for row in Ledger(file).rows()}
    assert [rows[n]['ok'] for n in 'abc'] == [True, False, True] and 'b is wrong' in rows['b']['error']
    good, ran = _cases('a', 'b', 'c')
    assert run_cases(good, Ledger(file, retry=True), later) == [] and ran == ['b']
    assert all(row['ok'] for row in Ledger(file).rows())


def test_cases_without_time_are_left_out(tmp_path):
    cases, ran = _cases('a', 'b')
    long = cases[0]._replace(seconds=100.)
    assert run_cases([long, cases[1]], Ledger(tmp_path / 'x.jsonl'), time.time() + 50) == ['a'] and ran == ['b']


def test_case_that_hangs_is_ended(tmp_path):
    ledger = Ledger(tmp_path / 'x.jsonl')
    run_cases([Case('hangs', lambda: time.sleep(60), .05)], ledger, time.time() + 600)
    row, = ledger.rows()
    assert not row['ok'] and 'took more than' in row['error']


def test_agree_sees_every_difference():
    one = torch.ones(3)
    assert gpu_cases.agree('x', [one, one * 2], [one, one * 2], 0.) == 0
    for got in ([one, one * 2.1], [one], [one, one * float('nan')], [one * float('nan'), one * 2]):
        with pytest.raises(AssertionError, match='x:'):
            gpu_cases.agree('x', got, [one, one * 2], .01)


def test_no_device_is_said(tmp_path):
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match='--toy'):
            gpu.main(['--phase', 'tests', '--output', str(tmp_path)])


def test_frames_of_the_project():
    root = Path(gpu_training.ROOT)
    assert all(map(gpu_training.our_frame, map(str, (root / 'train.py', root / 'timm_sscl/losses/sscl.py'))))
    assert not any(map(gpu_training.our_frame, map(str, (root / 'benchmarks/gpu.py', Path(torch.__file__)))))


# ---- cuDNN's batch norm

def test_cudnn_batch_norm_is_recognised():
    """Its node, without its kernels: on the meta device it saves what the recomputation reads."""
    x, weight, bias = (torch.randn(*shape, device='meta', requires_grad=True) for shape in ((4, 3, 5, 5), (3,), (3,)))
    mean, var = (torch.zeros(3, device='meta') for _ in range(2))
    for training in (True, False):
        out = torch.cudnn_batch_norm(x, weight, bias, mean, var, training, .1, 1e-5)[0]
        assert type(out.grad_fn).__name__ == 'CudnnBatchNormBackward0'
        source = NormSource.of(out)
        assert (source is not None) == training
    source = NormSource.of(torch.cudnn_batch_norm(x, weight, bias, mean, var, True, .1, 1e-5)[0])
    assert source.bias is bias
    saved, scale, shift = source.affine(bias)
    assert saved is x or saved.shape == x.shape
    assert scale.shape == shift.shape == (3,)
