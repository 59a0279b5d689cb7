"""Membrane potentials of a training forward: against the recursion, their gradients, every way to run the student."""
import copy

import pytest
import timm
import torch
import torch.nn as nn
from torch.utils._pytree import tree_leaves

import timm_sscl  # noqa: F401  registers the spiking_ names
from timm_sscl import LIF, SSCLTask, convert_to_spiking, lif, list_neurons, register_loss
from timm_sscl.features import MembraneRecorder
from timm_sscl.losses import unregister_loss
from timm_sscl.neurons import create_neuron, lif_backend

T = 3


def _current(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- of a neuron

@pytest.mark.parametrize('settings, backend', [
    ({}, 'eager'), ({}, 'compiled'), (dict(tau=.5, v_threshold=1.), 'eager'), (dict(v_reset=None), 'eager'),
    (dict(v_reset=-.2, v_init=.1), 'eager'), (dict(detach_reset=True), 'eager')], ids=str)
def test_potential_of_a_lif_is_its_recursions(settings, backend):
    """With the spikes of the neuron's own kernel and their gradients."""
    neuron = LIF(T, **settings).double()
    neuron.set_gain(torch.tensor(1.5))
    x = _current(T * 4, 5).requires_grad_()
    s = neuron.settings
    spikes = lif(x.view(T, 4, 5), s.tau, s.v_threshold, s.v_reset, s.detach_reset, s.v_init,
                 gain=torch.tensor(1.5, dtype=torch.float64))
    v = torch.full((4, 5), (s.v_reset or 0.) if s.v_init is None else s.v_init, dtype=torch.float64)
    expected = []
    for t in range(T):
        u = s.tau * v + 1.5 * x.view(T, 4, 5)[t]
        o = spikes[t].detach() if s.detach_reset else spikes[t]
        v = u - s.v_threshold * o if s.v_reset is None else u * (1 - o) + s.v_reset * o
        expected.append(u / s.v_threshold)
    expected = torch.stack(expected)
    with lif_backend(backend):
        got = neuron.potential(x)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
    weights = _current(T, 4, 5, seed=1)
    gradients = [torch.autograd.grad((u * weights).sum(), x)[0] for u in (got, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)


WITHOUT = {'ternary', 'ilif', 'mlf', 'psn', 'masked_psn', 'sliding_psn'}  # other levels, or no potential of its own


@pytest.mark.parametrize('name', sorted(set(list_neurons()) - WITHOUT))
def test_potential_is_at_the_threshold_where_a_neuron_fires(name):
    torch.manual_seed(0)
    neuron = create_neuron(name, T)
    if neuron.needs_channels:
        neuron.set_channels((5, 1))
    neuron.double()
    x = (3 * neuron.threshold() * _current(T * 4, 5, 2)).requires_grad_()
    potential, out = neuron.potential(x), neuron(x).view(T, 4, 5, 2)
    assert potential.shape == out.shape and potential.requires_grad
    if name == 'liaf':  # passes on the potential above the threshold
        out = (potential >= 1).double() * (out + 1)
    assert torch.equal(potential >= 1, out > 0) and 0 < (out > 0).double().mean() < 1
    gradients = torch.autograd.grad(potential.square().mean(), [x, *neuron.parameters()], allow_unused=True)
    assert gradients[0].abs().max() > 0


@pytest.mark.parametrize('name', sorted(WITHOUT))
def test_neurons_without_one_are_refused_by_name(name):
    with pytest.raises(ValueError, match=f"'act' .{type(create_neuron(name, T)).__name__}. has no membrane potential"):
        MembraneRecorder(nn.ModuleDict({'act': create_neuron(name, T)}))


def test_half_precision_is_integrated_in_float32():
    x = _current(T * 4, 5)
    potential = LIF(T).potential(x.half())
    assert potential.dtype == torch.float32
    torch.testing.assert_close(potential, LIF(T).potential(x.half().float()), rtol=1e-6, atol=1e-6)


# ---- of a model

@pytest.fixture
def loss():
    """A loss of the membranes, which weighs layers and elements differently, and the membranes that it saw last."""
    last = {}

    @register_loss('membranes', needs_membranes=True)
    def membranes(step):
        last.update(step.membranes)
        return torch.stack([
            (i + 1) * (u * torch.linspace(0., 1., u[0, 0].numel(), dtype=u.dtype).view(u.shape[2:])).square().mean()
            for i, u in enumerate(step.membranes.values())]).sum()

    yield last
    unregister_loss('membranes')


def _student(**kwargs):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return timm.create_model('spiking_test_resnet', num_classes=5, timesteps=T, **kwargs).double()


def _task(student=None, losses=None):
    student = _student() if student is None else student
    return SSCLTask(student, None, losses or {'membranes': 1.}, task_loss_weight=0., verbose=False).double().train()


def _batch(n=4):
    return _current(n, 3, 32, 32), torch.arange(n) % 5


def test_membranes_are_those_of_the_layers_inputs(loss):
    task, x = _task(), _batch()
    student = copy.deepcopy(task.student).train()
    seen = {}
    for name, module in student.named_modules():
        if isinstance(module, LIF):
            module.register_forward_hook(lambda m, args, out, name=name: seen.update({name: (m, args[0], out)}))
    output = student(x[0])
    result = _task(task.student)(*x)
    assert torch.equal(result['output'], output)  # the student runs as always
    assert list(loss) == list(seen) and len(seen) == 12
    for name, (neuron, current, spikes) in seen.items():
        u = loss[name]
        assert torch.equal(u.flatten(0, 1), neuron.potential(current).flatten(0, 1))
        assert torch.equal(u >= 1, spikes.view(u.shape) > 0)


def test_gradient_reaches_what_comes_before_the_layers(loss):
    task, x = _task(), _batch()
    task(*x)['loss'].backward()
    trained = [name for name, p in task.student.named_parameters() if p.grad is not None and p.grad.any()]
    assert 'conv1.0.weight' in trained and 'fc.weight' not in trained


def test_gradient_checkpointing(loss):
    results = []
    for checkpointing in (False, True):
        task = _task(_student(layers=(2, 1, 1, 2), zero_init_last=False))
        task.student.set_grad_checkpointing(checkpointing)
        value = task(*_batch())['loss']
        value.backward()
        results.append((value.item(), [p.grad for p in task.student.parameters()]))
    assert results[0][0] == results[1][0]
    for p, q in zip(results[0][1], results[1][1]):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)  # the same terms, added in another order


def test_reentrant_checkpointing_is_refused(loss, set_reentrant):
    set_reentrant(True)
    task = _task()
    task.student.set_grad_checkpointing()
    with pytest.raises(RuntimeError, match='membrane potentials cannot be trained.*set_reentrant_ckpt'):
        task(*_batch())


def test_compiles_as_one_graph(loss):
    tasks = []
    for _ in range(2):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3, stride=4), nn.ReLU(),
                            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 5))
        tasks.append(_task(convert_to_spiking(net, timesteps=2).double()))
    tasks[1].trainable_module = torch.compile(tasks[1].trainable_module, fullgraph=True, backend='aot_eager')
    results = []
    for task in tasks:
        for _ in range(2):  # the second call finds the graph of the first
            task.zero_grad()
            value = task(*_batch())['loss']
            value.backward()
        results.append((value.item(), [p.grad for p in task.trainable_module.parameters()]))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-12)
    for p, q in zip(results[0][1], results[1][1]):
        torch.testing.assert_close(q, p, rtol=1e-9, atol=1e-12)


def test_only_a_loss_that_asks_for_them_gets_them(loss):
    student = _student()
    task = _task(student, {'tet': 1.})
    assert not any(m._forward_hooks for m in student.modules())
    register_loss('unasked')(lambda step: next(iter(step.membranes.values())).mean())
    try:
        with pytest.raises(ValueError, match='needs_membranes=True'):
            _task(student, {'unasked': 1.})(*_batch())
    finally:
        unregister_loss('unasked')
    assert task.trainable_module.membrane_recorder is None


def test_copies_record_for_themselves(loss):
    task = _task()
    task.setup_ema()
    task(*_batch())
    recorder = task.trainable_module.membrane_recorder
    recorder.begin()
    copy.deepcopy(task.student)(_batch()[0])
    assert not recorder.take()
    assert not [leaf for leaf in tree_leaves(vars(recorder)) if isinstance(leaf, torch.Tensor)]


def test_a_neuron_that_runs_twice_has_two():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = LIF(T)

        def forward(self, x):
            return self.act(x), self.act(x[:, :1])

    recorder = MembraneRecorder(model := Twice())
    recorder.begin()
    model(torch.randn(T * 4, 3))
    assert {k: u.shape for k, u in recorder.take().items()} == {'act': (T, 4, 3), 'act (2)': (T, 4, 1)}


def test_a_head_that_is_read_twice_is_recorded_once(loss):
    """Features before the classifier are read by a second pass of the head, in which a neuron runs again."""
    register_loss('reads', needs_features=True, other_classes=True)(lambda step: step.student_features[-1].mean())
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            student, teacher = (
                timm.create_model(name, num_classes=5, width=4, hidden_size=4, **kwargs).double()
                for name, kwargs in (('spiking_resnet19_cifar_fc', dict(timesteps=2)), ('resnet19_cifar_fc', {})))
        task = SSCLTask(student, teacher, {'membranes': 1., 'firing_rate': 1., 'reads': 1.}, input_size=(3, 32, 32),
                        verbose=False).double().train()
        task(*_batch())['loss'].backward()
    finally:
        unregister_loss('reads')
    neurons = [name for name, module in student.named_modules() if isinstance(module, LIF)]
    assert sorted(loss) == sorted(neurons) and 'head.pre_logits.act' in loss
    assert not any(module.repeats for module in student.modules() if isinstance(module, LIF))


@torch.no_grad()
def test_potential_has_the_gains_of_the_timesteps():
    neuron = LIF(3, tau=.5)
    neuron.set_step_gain(torch.tensor([1., .5, 3.]))
    x = torch.randn(3 * 8, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal((neuron.potential(x) >= 1).flatten(0, 1), neuron(x) > 0)
