"""A training step does not wait for the device: nothing of it reads a number on the host."""
import logging

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import timm_sscl  # noqa: F401  registers the spiking_ names
from timm_sscl import SSCLLoss, SSCLTask
from timm_sscl.host_copy import HostCopy

READS = {'item', 'tolist', '__bool__', '__float__', '__int__', '__index__', 'cpu', 'numpy', 'nonzero', 'equal'}


class _NoScalars(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, 'a number was read'
        return func(*args, **(kwargs or {}))


class _NoReads(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert getattr(func, '__name__', '') not in READS, f'{func.__name__} was called'
        return func(*args, **(kwargs or {}))


def _models():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return (timm.create_model('spiking_test_resnet', num_classes=5, timesteps=2).train(),
                timm.create_model('test_resnet', num_classes=5))


def _batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 3, 32, 32, generator=generator), torch.arange(6) % 5


def _loop(**options):
    """A step of somebody's own loop, and its optimizer."""
    student, teacher = _models()
    sscl = SSCLLoss(student, teacher, input_size=(3, 32, 32), dim=8, **options)
    x, y = _batch()

    def step():
        (F.cross_entropy(student(x), y) + sscl(x)).backward()

    return step, torch.optim.SGD([*student.parameters(), *sscl.parameters()], lr=0.01)


STATEFUL = dict.fromkeys(('sscl', 'crd', 'bkdsnn', 'meom', 'im', 'rmp', 'seal_kd', 'firing_rate'), 0.1)


def _task(losses):
    options = dict(crd=dict(num_negatives=8), sscl=dict(queue_size=4, weighting='uncertainty'))
    options = {name: options[name] for name in options if losses is STATEFUL}
    task = SSCLTask(*_models(), losses, options, input_size=(3, 32, 32), verbose=False, num_samples=6).train()
    task.set_progress(0.5)
    (x, y), index = _batch(), torch.arange(6)
    return (lambda: task(x, y, index=index)['loss'].backward(),
            torch.optim.SGD(task.trainable_module.parameters(), lr=0.01))


@pytest.mark.parametrize('create', [
    _loop, lambda: _loop(weighting='uncertainty', queue_size=4, critic='normalized'),
    lambda: _task({'sscl': 0.1, 'kd': 1., 'kd_step': 1., 'tet': 1., 'firing_rate': 1.}),
    lambda: _task(STATEFUL),
], ids=['loop', 'loop with a queue', 'task', 'losses with state'])
@pytest.mark.parametrize('busy', [False, True])
def test_step_reads_no_number(create, busy, monkeypatch):
    if busy:  # a device that has never finished yet
        monkeypatch.setattr(HostCopy, 'ready', property(lambda copy: False))
    step, optimizer = create()
    for index in range(4):
        if index == 0:
            step()
        else:
            with _NoScalars():
                step()
            if busy:
                optimizer.zero_grad()
                with _NoReads():
                    step()
        optimizer.step()
        optimizer.zero_grad()


def test_state_stays_where_it_is():
    """Parameters and buffers are changed in place, which a captured CUDA graph relies on."""
    task = SSCLTask(*_models(), STATEFUL, dict(crd=dict(num_negatives=8), sscl=dict(queue_size=4)),
                    input_size=(3, 32, 32), verbose=False, num_samples=6).train()
    trained = task.trainable_module

    def state():
        return {**dict(trained.named_buffers()), **dict(trained.named_parameters())}

    before = state()
    values = {name: tensor.clone() for name, tensor in before.items()}
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.01)
    for progress in (0., 0.5):
        task.set_progress(progress)
        task(*_batch(), index=torch.arange(6))['loss'].backward()
        optimizer.step()
    after = state()
    assert after.keys() == before.keys() and all(after[name] is tensor for name, tensor in before.items())
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, values[name])}
    assert {'progress', 'losses.crd.student_bank', 'losses.crd.labels', 'losses.sscl.critic.queue',
            'losses.sscl.running_cka.0.mean_terms', 'student.bn1.running_mean'} <= changed


def test_the_modes_see_reads():
    for read in (float, bool, torch.Tensor.item):
        with pytest.raises(AssertionError), _NoScalars():
            read(torch.ones(()))
    with pytest.raises(AssertionError, match='tolist'), _NoReads():
        torch.ones(1).tolist()


def test_warnings_come_once_the_device_is_done(monkeypatch, caplog):
    """A floored layer is named at a later step where the device was busy."""
    ready = [False]
    monkeypatch.setattr(HostCopy, 'ready', property(lambda copy: ready[0]))
    step, optimizer = _loop(cka_floor=1.)
    for _ in range(3):
        step()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    ready[0] = True
    step()
    assert sum('taken as the floor' in record.getMessage() for record in caplog.records) >= 1


def test_host_copy():
    copy = HostCopy(torch.tensor([1., 2.], requires_grad=True))
    assert copy.ready and copy.read() == [1., 2.]
