"""The firing-rate regulariser: rates as counted by hand, their gradients, and every way to run the student."""
import copy
import math
import pickle

import pytest
import timm
import torch
import torch.nn as nn
from timm.utils import unwrap_model

from spiking_families import short_resnet
import timm_sscl  # noqa: F401  registers the spiking_ names
from timm_sscl import LIF, SSCLTask, create_loss, lif
from timm_sscl.losses import firing_rate_loss, loss_needs
from timm_sscl.features.rates import RateRecorder
from timm_sscl.training.command_line.options import OptionError, parse_args

T = 2


def _student(name='spiking_test_resnet', dtype=torch.float64, **kwargs):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return timm.create_model(name, num_classes=5, timesteps=T, **kwargs).to(dtype)


def _task(losses=None, student=None, target=(0.4, 0.45), **kwargs):
    losses = {'firing_rate': 1.} if losses is None else losses
    options = {'firing_rate': dict(target=target)} if 'firing_rate' in losses else {}
    student = _student() if student is None else student
    task = SSCLTask(student, None, losses, options, verbose=False, **kwargs)
    return task.to(next(student.parameters()).dtype).train()


def _batch(n=6, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 32, 32, generator=generator, dtype=torch.float64).to(dtype), torch.arange(n) % 5


def _spikes(student, x):
    """Spikes of every neuron layer in one forward, by the test's own hooks."""
    seen = {}
    handles = [m.register_forward_hook(lambda _m, _a, out, n=n: seen.setdefault(n, []).append(out))
               for n, m in student.named_modules() if isinstance(m, LIF)]
    student(x)
    for handle in handles:
        handle.remove()
    return seen


# ---- the function

def test_loss_is_the_squared_distance_from_the_band():
    rates = torch.tensor([0., 0.05, 0.1, 0.3, 0.5], dtype=torch.float64)
    expected = (0.05 ** 2 + 0. + 0. + 0.1 ** 2 + 0.3 ** 2) / 5
    assert firing_rate_loss(rates, 0.05, 0.2).item() == pytest.approx(expected, rel=1e-12)
    assert firing_rate_loss(rates, 0.1, 0.1).item() == pytest.approx(
        sum((r - 0.1) ** 2 for r in rates.tolist()) / 5, rel=1e-12)


@pytest.mark.parametrize('target', [(0.2, 0.1), -0.1, 1.5, math.nan, (0.1, 0.2, 0.3), ()], ids=str)
def test_targets_that_are_no_rates_raise(target):
    with pytest.raises(ValueError, match='target='):
        create_loss('firing_rate', target=target)


def test_one_rate_is_a_band_of_no_width():
    for target in (0.1, [0.1], (0.1, 0.1)):
        loss = create_loss('firing_rate', target=target)
        assert (loss.low, loss.high) == (0.1, 0.1)


# ---- in a task

def test_rates_and_loss_are_those_of_the_spikes():
    task, x = _task(), _batch()
    student = copy.deepcopy(task.student)
    result = task(*x)
    spikes = _spikes(student.train(), x[0])
    rates = {name: sum(o.sum().item() for o in outs) / sum(o.numel() for o in outs) for name, outs in spikes.items()}
    assert len(rates) == 12 and {v for out in spikes.values() for v in out[0].unique().tolist()} == {0., 1.}
    stats = {name: values['firing_rate'] for name, values in task.stats.items()}
    assert stats == pytest.approx(rates, rel=1e-12) and list(stats) == list(rates)
    expected = sum(max(0.4 - r, r - 0.45, 0) ** 2 for r in rates.values()) / len(rates)
    assert result['firing_rate_loss'].item() == pytest.approx(expected, rel=1e-12) and expected > 0
    assert result['loss'].item() == pytest.approx(result['task_loss'].item() + expected, rel=1e-12)


def test_gradient_is_autograds_through_the_neurons():
    task, (x, y) = _task(task_loss_weight=0.), _batch()
    student = copy.deepcopy(task.student).train()
    task(x, y)['loss'].backward()
    rates = torch.stack([torch.cat([o.flatten() for o in outs]).mean() for outs in _spikes(student, x).values()])
    ((0.4 - rates).clamp(min=0).square() + (rates - 0.45).clamp(min=0).square()).mean().backward()
    moved = 0
    for (name, p), q in zip(task.student.named_parameters(), student.parameters()):
        if q.grad is None:  # the classifier, behind all neurons; it is in the task's graph by its loss of weight 0
            assert name.startswith('fc') and not p.grad.any()
            continue
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-14)
        moved += bool(q.grad.any())
    assert moved > 20


@pytest.mark.parametrize('scale', [0.3, [0.1, 0.2, 3.]])
def test_rate_of_a_scaled_neuron_is_that_of_its_spikes(scale):
    """A neuron from an ANN's threshold returns its spikes times a scale, one or one per channel."""
    model = nn.Sequential(LIF(T), LIF(T)).double()
    scale = torch.tensor(scale, dtype=torch.float64)
    model[0].set_gain(scale=scale.view(-1, 1, 1) if scale.ndim else scale)
    x = torch.rand(T * 4, 3, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    recorder = RateRecorder(model)
    recorder.begin()
    model(x)
    rates = recorder.take()
    spikes = lif(x.view(T, 4, 3, 5, 5))
    assert rates['0'].item() == pytest.approx(spikes.mean().item(), rel=1e-12)
    assert 0.1 < rates['0'] < 0.9 and set(rates) == {'0', '1'}
    gradient, = torch.autograd.grad(rates['0'], x, retain_graph=True)
    expected, = torch.autograd.grad(spikes.mean(), x)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-15)


def test_neuron_that_runs_twice_counts_both_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = LIF(T)

        def forward(self, x):
            return self.act(x), self.act(10 * x[:, :1])

    model, x = Twice().double(), torch.rand(T * 4, 3, dtype=torch.float64)
    recorder = RateRecorder(model)
    recorder.begin()
    a, b = model(x)
    assert recorder.take()['act'].item() == pytest.approx(((a.sum() + b.sum()) / (a.numel() + b.numel())).item())


def test_half_precision_counts_in_float32():
    """More spikes than float16 holds: their sum would be infinite, and a mean of it too."""
    model = nn.Sequential(LIF(1))
    recorder = RateRecorder(model)
    recorder.begin()
    model(torch.ones(1, 300_000, dtype=torch.float16))
    assert recorder.take()['0'].item() == 1.


def test_training_moves_the_rates_into_the_band():
    task = _task(target=0.3, task_loss_weight=0.)
    optimizer = torch.optim.SGD(task.trainable_module.parameters(), lr=30.)  # a mean over 12 layers of squares: small
    x, y = _batch()
    distances = []
    for _ in range(15):
        loss = task(x, y)['loss']
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        distances.append(loss.item())
    assert distances[-1] < 0.3 * distances[0]


def test_gradient_checkpointing():
    results = []
    for checkpointing in (False, True):
        task = _task({'firing_rate': 3.}, _student(layers=(2, 1, 1, 2), zero_init_last=False))
        task.student.set_grad_checkpointing(checkpointing)
        loss = task(*_batch())['loss']
        loss.backward()
        results.append((loss.item(), task.stats, [p.grad for p in task.student.parameters()]))
    assert results[0][:2] == results[1][:2]
    for p, q in zip(results[0][2], results[1][2]):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)  # the same terms, added in another order


def test_reentrant_checkpointing_is_refused(set_reentrant):
    """It would give rates without a gradient, in silence."""
    set_reentrant(True)
    task = _task()
    task.student.set_grad_checkpointing()
    with pytest.raises(RuntimeError, match='set_reentrant_ckpt'):
        task(*_batch())


def test_compiles_as_one_graph():
    tasks = [_task(student=short_resnet(timesteps=T).double()) for _ in range(2)]
    tasks[1].trainable_module = torch.compile(tasks[1].trainable_module, fullgraph=True, backend='aot_eager')
    results = []
    for task in tasks:
        for _ in range(2):  # the second call finds the graph of the first
            task.zero_grad()
            loss = task(*_batch())['loss']
            loss.backward()
        results.append((loss.item(), task.stats, [p.grad for p in task.trainable_module.parameters()]))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-12)
    assert results[1][1].keys() == results[0][1].keys()
    for layer, values in results[0][1].items():
        assert results[1][1][layer] == pytest.approx(values, rel=1e-12)
    for p, q in zip(results[0][2], results[1][2]):
        torch.testing.assert_close(q, p, rtol=1e-9, atol=1e-12)


def test_student_on_its_own_is_not_recorded_and_copies_are_detached():
    task = _task()
    task(*_batch())
    recorder = task.trainable_module.rate_recorder
    task.student.eval()(_batch(3)[0])
    assert not recorder.take()
    task.setup_ema()  # deepcopies the trainable module
    averaged = unwrap_model(task.get_trainable_module(ema=True))
    recorder.begin()
    averaged.student(_batch(3)[0])
    assert not recorder.take() and not averaged.rate_recorder.take()
    loaded = pickle.loads(pickle.dumps(task.student))
    recorder.begin()
    loaded(_batch(3)[0])
    assert not recorder.take()


def test_a_student_without_the_loss_has_no_hooks():
    student = _student()
    SSCLTask(student, None, 'none', verbose=False)
    assert not any(m._forward_hooks for m in student.modules())


def test_student_without_neurons_raises():
    with pytest.raises(ValueError, match='ResNet has no spiking neurons'):
        _task(student=timm.create_model('test_resnet', num_classes=5))


def test_beside_sscl_with_its_taps():
    torch.manual_seed(0)
    task = SSCLTask(_student(dtype=torch.float32), timm.create_model('test_resnet', num_classes=5),
                    {'sscl': 0.1, 'firing_rate': 1.}, verbose=False).train()
    task(*_batch(dtype=torch.float32))['loss'].backward()
    stats = task.stats
    assert 'nce' in stats['layer4'] and 'firing_rate' in stats['act1']
    assert loss_needs('firing_rate') == dict(teacher=False, features=False, shapes=False, firing_rates=True)


def test_command_line():
    args, _ = parse_args(['--loss', 'sscl=0.1,firing_rate=2', '--firing-rate-target', '0.1'])
    assert args.losses == dict(sscl=0.1, firing_rate=2.) and args.loss_options['firing_rate'] == dict(target=[0.1])
    args, _ = parse_args(['--loss', 'firing_rate', '--firing-rate-target', '0.1', '0.2'])
    assert args.loss_options['firing_rate'] == dict(target=[0.1, 0.2])
    with pytest.raises(OptionError, match="'firing_rate'.*target=.*2"):
        parse_args(['--loss', 'firing_rate', '--firing-rate-target', '2'])
