"""A neuron for every activation that a module calls as a function: as many, and as calibrated, as modules would be."""
import copy
import functools
import pickle

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from timm_sscl import LIF, calibrate, convert_to_spiking

T = 3


class _Modules(nn.Module):
    """The reference: activations as modules."""

    def __init__(self):
        super().__init__()
        self.conv = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.fc = nn.Linear(3, 2)
        self.acts = nn.ModuleList(nn.ReLU() for _ in range(3))

    def act(self, i, x):
        return self.acts[i](x)

    def forward(self, x):
        for i, conv in enumerate(self.conv):
            x = self.act(i, conv(x))
        return self.fc(x.mean((2, 3)))


class _Functions(_Modules):
    def __init__(self):
        super().__init__()
        del self.acts

    def forward(self, x):
        x = F.relu(self.conv[0](x))
        x = F.relu(self.conv[1](x))
        return self.fc(torch.relu(self.conv[2](x)).mean((2, 3)))


class _Loop(_Functions):
    def forward(self, x):
        for conv in self.conv:
            x = F.relu(conv(x), inplace=True)
        return self.fc(x.mean((2, 3)))


class _Aliases(_Functions):
    """What no source tells."""
    functions = [F.relu, functools.partial(F.relu, inplace=False), nn.ReLU()]

    def forward(self, x):
        for conv, function in zip(self.conv, self.functions):
            x = function(conv(x))
        return self.fc(x.mean((2, 3)))


class _Parent(_Functions):
    def forward(self, x):
        return F.gelu(super().forward(F.silu(x)))


class _Child(_Parent):
    """Calls nothing that its parent's forward does."""

    def forward(this, x):
        for conv in this.conv:
            x = x + F.relu(conv(x))
        return this.fc(x.mean((2, 3)))


def _converted(cls, root=True, **kwargs):
    torch.manual_seed(0)
    net = cls() if root else nn.Sequential(cls(), nn.Flatten())
    return convert_to_spiking(net, timesteps=T, **kwargs)


def _images():
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize('root', [True, False], ids=['itself', 'inside'])
@pytest.mark.parametrize('cls', [_Functions, _Loop, _Aliases])
def test_calls_are_neurons_as_modules_are(cls, root):
    model, reference = _converted(cls, root), _converted(_Modules, root)
    x = _images()
    prefix = '' if root else '0.'
    assert [(r.name, r.was, r.now) for r in model.spiking_report()] == [
        (f'{prefix}functional_act.{i}', 'relu', 'LIF') for i in range(3)]
    drives = [[(d.rms, d.gain, d.rate) for d in calibrate(m, x).spiking_report().drives] for m in (model, reference)]
    assert drives[0] == drives[1] and len(set(drives[0])) == 3
    outputs = []
    for net in (model, reference):
        out = net(x, per_step=True)
        out.square().sum().backward()
        outputs.append((out, [p.grad for p in net.parameters()]))
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert all(torch.equal(a, b) for a, b in zip(outputs[0][1], outputs[1][1]))
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), _converted(cls, root)):
        clone.load_state_dict(model.state_dict(), strict=True)
        assert torch.equal(clone(x), model(x))
        clone.set_timesteps(2)
        assert clone(x, per_step=True).shape[0] == 2 and model(x, per_step=True).shape[0] == T
    assert torch.equal(torch.compile(model, backend='eager', fullgraph=True)(x), model(x))


def test_one_call_keeps_its_name():
    class One(_Functions):
        def forward(self, x):
            return self.fc(F.relu(self.conv[0](x)).mean((2, 3)))

    model = _converted(One)
    assert [r.name for r in model.spiking_report()] == ['functional_act'] and isinstance(model.functional_act, LIF)


def test_a_childs_forward_hides_its_parents():
    assert [r.was for r in _converted(_Child).spiking_report()] == ['relu'] * 3
    assert [r.was for r in _converted(_Parent).spiking_report()] == ['silu', 'relu', 'relu', 'relu', 'gelu']
    with torch.device('meta'):  # by shapes
        assert [r.was for r in _converted(_Child).spiking_report()] == ['relu'] * 3


def test_a_function_that_does_not_run_has_no_neuron():
    class Unused(_Modules):
        def helper(self, x):
            return F.gelu(x)

    model = _converted(Unused)
    assert [r.name for r in model.spiking_report()] == ['acts.0', 'acts.1', 'acts.2']


@pytest.mark.parametrize('excluded', [0, 1, 2])
def test_calls_are_excluded_one_by_one(excluded):
    model = _converted(_Functions, exclude=f'functional_act.{excluded}')
    reference = _converted(_Modules, exclude=f'acts.{excluded}')
    assert [r.now for r in model.spiking_report()] == ['relu' if i == excluded else 'LIF' for i in range(3)]
    assert torch.equal(model(_images()), reference(_images()))
    other = _converted(_Functions)
    other.load_state_dict(model.state_dict())  # brings the exclusion, which was not asked for otherwise
    assert torch.equal(model(_images()), other(_images()))


@pytest.mark.parametrize('root', [True, False], ids=['itself', 'inside'])
@pytest.mark.parametrize('calls,what', [(2, 'fewer'), (4, 'more')])
def test_a_changed_number_of_calls_raises(calls, what, root):
    class Varies(_Functions):
        calls = 3

        def forward(self, x):
            for i in range(self.calls):
                x = F.relu(self.conv[i % 3](x))
            return self.fc(x.mean((2, 3)))

    model = _converted(Varies, root)
    model(_images())
    (model if root else model[0]).calls = calls
    with pytest.raises(RuntimeError, match=f'called {what}.* 3 '):
        model(_images())


def test_modes_that_call_differently_share_one_neuron():
    class Auxiliary(_Functions):
        def forward(self, x):
            x = F.relu(self.conv[0](x))
            aux = F.relu(self.conv[1](x)) if self.training else 0.
            return self.fc((x + aux).mean((2, 3)))

    model = _converted(Auxiliary)
    assert [r.name for r in model.spiking_report()] == ['functional_act']
    assert all(model.train(mode)(_images()).shape == (4, 2) for mode in (True, False))


def test_a_module_that_runs_twice_has_its_own_neurons_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = _Block()

        def forward(self, x):
            return self.block(self.block(x)).mean((2, 3))

    class _Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return F.relu(self.conv(F.silu(x)))

    model = _converted(Twice)
    assert [(r.name, r.was) for r in model.spiking_report()] == [
        ('block.functional_act.0', 'silu'), ('block.functional_act.1', 'relu')]
    assert model(_images()).shape == (4, 3)


class _LikeTimm(_Functions):
    """forward_features and forward_head, functions in both."""

    def forward_features(self, x):
        return F.relu(self.conv[1](F.relu(self.conv[0](x))))

    def forward_head(self, x):
        return self.fc(F.relu(self.conv[2](x)).mean((2, 3)))

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


@torch.no_grad()
def test_each_method_takes_its_own_neurons():
    model, x = _converted(_LikeTimm), _images()
    calibrate(model, x)
    assert len({lif.gain.item() for lif in model.neurons().values()}) == 3
    assert torch.equal(model.forward_head(model.forward_features(x)), model(x))


@pytest.mark.parametrize('root', [True, False], ids=['itself', 'inside'])
def test_one_gain_of_an_old_checkpoint_goes_to_every_call(root):
    model, x = _converted(_Functions, root), _images()
    calibrate(model, x)
    prefix = '' if root else '0.'
    state = {k: v for k, v in model.state_dict().items() if 'functional_act' not in k}
    state[f'{prefix}functional_act.spiking_gain'] = torch.tensor(1.7)
    other = _converted(_Functions, root)
    other.load_state_dict(state, strict=True)
    assert [lif.gain.item() for lif in other.neurons().values()] == [pytest.approx(1.7)] * 3


def test_an_operator_of_somebodys_own_is_no_activation():
    @torch.library.custom_op('timm_sscl_test::relu', mutates_args=())
    def relu(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    class Net(_Modules):
        def forward(self, x):
            return super().forward(torch.ops.timm_sscl_test.relu(x))

    with pytest.raises(ValueError, match='unknown: timm_sscl_test::relu'):
        _converted(Net)
    report = _converted(Net, allow_analog=True).spiking_report()
    assert [r.name for r in report if r.now == 'LIF'] == ['acts.0', 'acts.1', 'acts.2']


class _Part(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.conv, self.function = nn.Conv2d(4, 4, 3, padding=1), function

    def forward(self, x):
        x = self.conv(x)
        return F.gelu(x) if self.function == 'gelu' else F.dropout(x, .5, self.training)


class _Checkpointed(nn.Module):
    """Gradient checkpointing around a method, a module, or nothing."""

    def __init__(self, function, around, reentrant):
        super().__init__()
        self.conv, self.act, self.part, self.head = nn.Conv2d(3, 4, 3), nn.ReLU(), _Part(function), nn.Linear(4, 5)
        self.function, self.around, self.reentrant = function, around, reentrant

    def method(self, x):
        return F.gelu(x) if self.function == 'gelu' else F.dropout(x, .5, self.training)

    def forward(self, x):
        x, run = self.act(self.conv(x)), self.method if self.around == 'method' else self.part
        x = run(x) if self.around is None else torch.utils.checkpoint.checkpoint(run, x, use_reentrant=self.reentrant)
        return self.head(x.mean((2, 3)))


def _gradients(function, around, reentrant=False):
    torch.manual_seed(0)
    model = convert_to_spiking(_Checkpointed(function, around, reentrant), timesteps=3, v_threshold=.1).train()
    torch.manual_seed(1)
    model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize('reentrant', [False, True])
@pytest.mark.parametrize('function', ['gelu', 'dropout'])
def test_functions_that_checkpointing_computes_again(function, reentrant):
    """The backward computes a module again with its neurons and masks; a method it would compute as the ANN's."""
    expected = _gradients(function, None)
    assert len(expected) == 6 and all(map(torch.equal, _gradients(function, 'part', reentrant), expected))
    with pytest.raises(RuntimeError, match=f"'{function}' is called as a function.*checkpointing"):
        _gradients(function, 'method', reentrant)


def test_a_method_under_checkpointing_runs_without_gradients():
    model = convert_to_spiking(_Checkpointed('gelu', 'method', True), timesteps=3).eval()
    with torch.no_grad():
        assert model(torch.randn(2, 3, 8, 8)).shape == (2, 5)
