"""The audit by execution: every nonlinearity that runs is a neuron, listed with a reason, or refused by name."""
import copy
import functools

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models import register_model

import timm_sscl.conversion.convert
from timm_sscl import LIF, convert_to_spiking, register_activation
from timm_sscl.conversion.finding.activations import unregister_activation
from timm_sscl.training.command_line.options import OptionError, parse_args
from timm_sscl.models.spiking import register_spiking_models
from timm_sscl.training.student import create_student

T, SIZE = 2, (3, 12, 12)


class _Calls(nn.Module):
    """A module of a user's that computes something by functions that its class does not tell."""

    def __init__(self, function):
        super().__init__()
        self.functions = [function]

    def forward(self, x):
        return self.functions[0](x)


def _net(middle):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), middle,
                         nn.Conv2d(8, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _convert(middle, **kwargs):
    return convert_to_spiking(_net(middle), timesteps=T, input_size=SIZE, **kwargs)


class _Clamp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, grad):
        return grad


class _DoubleReLU(nn.ReLU):
    def forward(self, x):
        return super().forward(x) * 2


class _InForward(nn.Module):
    def forward(self, x):
        return nn.ReLU()(x)


class _Held(nn.Module):
    def __init__(self, held):
        super().__init__()
        self.held = held

    def forward(self, x):
        return (self.held[0] if isinstance(self.held, list) else self.held['act'])(x)


class _Alias(nn.Module):
    def forward(self, x):
        f = F.relu
        return f(x)


class _HardSwish(nn.Module):
    def forward(self, x):
        return x * F.relu6(x + 3) / 6


class _HardSwishOfModules(nn.Module):
    def __init__(self):
        super().__init__()
        self.relu6 = nn.ReLU6()

    def forward(self, x):
        return x * self.relu6(x + 3) / 6


class _OnlyInTraining(nn.Module):
    def forward(self, x):
        return x.clamp(min=0) if self.training else x


def _set_negative_to_zero(x):
    x = x.clone()
    x[x < 0] = 0
    return x


def _relu_of_a_view(x):
    x = x.clone()
    x[:, :4].relu_()
    return x


def _by_numpy(x):
    return torch.from_numpy(np.maximum(x.detach().numpy(), 0))


def _clamp_of_a_view(x):
    x = x.clone()
    x[:, :4].clamp_(min=0)
    return x


UNKNOWN = {  # what is put behind a convolution -> the operation that is named
    'clamp': (_Calls(lambda x: torch.clamp(x, min=0)), 'clamp'),
    'gelu by erf': (_Calls(lambda x: .5 * x * (1 + torch.erf(x / 2 ** .5))), 'erf'),
    'gelu by tanh': (_Calls(lambda x: .5 * x * (1 + torch.tanh(.8 * (x + .045 * x ** 3)))), 'pow'),
    'threshold': (_Calls(lambda x: F.threshold(x, 0, 0)), 'threshold'),
    'where': (_Calls(lambda x: torch.where(x > 0, x, .1 * x)), 'where'),
    'logsigmoid': (_Calls(F.logsigmoid), 'log_sigmoid_forward'),
    'autograd function': (_Calls(_Clamp.apply), 'clamp'),
    'nn.Threshold': (nn.Threshold(0, 0), 'threshold'),
    'nn.Hardshrink': (nn.Hardshrink(), 'hardshrink'),
    'swish by hand': (_Calls(lambda x: x * torch.sigmoid(x)), 'mul'),
    'hard swish by hand': (_HardSwish(), 'mul'),
    'hard swish by modules': (_HardSwishOfModules(), 'mul'),
    'mask': (_Calls(lambda x: x * (x > 0)), 'gt'),
    'assignment by mask': (_Calls(_set_negative_to_zero), 'lt'),
    'in-place on a view': (_Calls(_clamp_of_a_view), 'clamp'),
    'maximum': (_Calls(lambda x: torch.maximum(x, torch.zeros(()))), 'maximum'),
    'maxout': (_Calls(lambda x: torch.stack([x, -x]).amax(0)), 'amax'),
    'square': (_Calls(lambda x: x * x), 'mul'),
    'sigmoid as an activation': (_Calls(torch.sigmoid), 'sigmoid'),
    'rounding': (_Calls(lambda x: x.round()), 'round'),
    'numpy': (_Calls(_by_numpy), 'numpy'),
    'only in training': (_OnlyInTraining(), 'clamp'),
}


@pytest.mark.parametrize('middle,op', UNKNOWN.values(), ids=UNKNOWN)
def test_unknown_nonlinearity_is_refused_by_name_and_changes_nothing(middle, op):
    model = _net(middle)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=rf'unknown: {op}[^\n]* in 4\b[\s\S]*register_activation[\s\S]*allow_analog'):
        convert_to_spiking(model, timesteps=T, input_size=SIZE)
    assert [type(m) for m in model.modules()] == kinds and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and model.training
    allowed = convert_to_spiking(model, timesteps=T, input_size=SIZE, allow_analog=True)
    unknown = [r for r in allowed.spiking_report().analog if r.reason.startswith(f'unknown: {op}')]
    assert unknown and unknown[0].name.startswith('4.')
    assert f'unknown: {op}' in str(allowed.spiking_report())
    assert isinstance(allowed[2], LIF) and allowed(torch.randn(2, *SIZE)).shape == (2, 4)


REACHED = {  # functions that run, whatever name the source has for them
    'subclass with a forward of its own': _DoubleReLU(),
    'module made in forward': _InForward(),
    'module in a list': _Held([nn.ReLU()]),
    'module in a dict': _Held({'act': nn.GELU()}),
    'partial': _Held([functools.partial(F.leaky_relu, negative_slope=.1)]),
    'alias': _Alias(),
    'in-place on a view': _Calls(_relu_of_a_view),
}


@pytest.mark.parametrize('middle', REACHED.values(), ids=REACHED)
@torch.no_grad()
def test_activation_that_the_source_does_not_name_is_a_neuron(middle):
    model = _convert(middle)
    assert [name for name in model.neurons() if name.startswith('4.')] and not model.spiking_report().analog
    seen = []
    model[4].register_forward_hook(lambda m, args, out: seen.append(out))
    model(torch.randn(2, *SIZE))
    assert len(seen[0][:, :4].unique()) <= 2  # two values: silent or fired


def _softmax(x):
    e = torch.exp(x - x.amax(1, keepdim=True))
    return e / e.sum(1, keepdim=True)


def _layer_norm(x):
    x = x - x.mean(1, keepdim=True)
    return x / (x.pow(2).mean(1, keepdim=True) + 1e-5).sqrt()


def _attention(x):
    t = x.flatten(2).transpose(1, 2)
    return ((t @ t.transpose(1, 2)).softmax(-1) @ t).transpose(1, 2).reshape(x.shape)


def _response_norm(x):
    g = x.norm(p=2, dim=(2, 3), keepdim=True)
    return x * (g / (g.mean(1, keepdim=True) + 1e-6)) + x


NO_ACTIVATIONS = {
    'layer norm by hand': _layer_norm,
    'RMS norm by hand': lambda x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6),
    'F.normalize': lambda x: F.normalize(x, dim=1),
    'global response norm': _response_norm,
    'local response norm': lambda x: F.local_response_norm(x, 3),
    'instance norm': F.instance_norm,
    'softmax by hand': _softmax,
    'attention': _attention,
    'GLU by hand': lambda x: torch.cat([x[:, :4] * torch.sigmoid(x[:, 4:])] * 2, 1),
    'channel gate': lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(),
    'pooling': lambda x: F.interpolate(F.avg_pool2d(x, 2), size=x.shape[-2:]) + F.max_pool2d(x, 3, 1, 1),
    'check for NaN': lambda x: x if not torch.isnan(x).any() else x * 0,
    'lerp': lambda x: x.lerp(x.flip(1), .5),
    'Fourier filter': lambda x: torch.fft.irfft2(torch.fft.rfft2(x) * 2, s=x.shape[-2:]),
    'constants': lambda x: x * torch.arange(8.).view(8, 1, 1).sin().clamp(min=0),
}


@pytest.mark.parametrize('function', NO_ACTIVATIONS.values(), ids=NO_ACTIVATIONS)
def test_norms_attention_and_gates_are_no_activations(function):
    report = _convert(_Calls(function)).spiking_report()
    assert not [r for r in report if 'unknown' in r.reason]


class _Squeeze(nn.Module):
    """Squeeze and excite with a gate that is written by hand."""

    def __init__(self, gate):
        super().__init__()
        self.fc1, self.act, self.fc2, self.gate = nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1), gate

    def forward(self, x):
        return x * self.gate(self.fc2(self.act(self.fc1(x.mean((2, 3), keepdim=True)))))


class _HardSigmoidByFunction(nn.Module):
    def forward(self, x):
        return F.relu6(x + 3., inplace=True) / 6.


class _HardSigmoidByModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU6(inplace=True)

    def forward(self, x):
        return self.relu(x + 3) / 6


GATES = {
    'hard sigmoid by F.relu6': (_HardSigmoidByFunction, F.hardsigmoid),
    'hard sigmoid by nn.ReLU6': (_HardSigmoidByModule, F.hardsigmoid),
    'hard sigmoid by clamp': (lambda: _Calls(lambda x: (x + 3).clamp(0, 6) / 6), F.hardsigmoid),
    'F.hardsigmoid': (lambda: _Calls(F.hardsigmoid), F.hardsigmoid),
    'sigmoid by exp': (lambda: _Calls(lambda x: 1 / (1 + torch.exp(-x))), torch.sigmoid),
    'torch.sigmoid': (lambda: _Calls(torch.sigmoid), torch.sigmoid),
}


@pytest.mark.parametrize('gate,expected', GATES.values(), ids=GATES)
@torch.no_grad()
def test_gates_by_hand_stay_analog_and_are_listed(gate, expected):
    model = _convert(_Squeeze(gate()))
    assert isinstance(model[2], LIF) and isinstance(model[4].act, LIF)
    assert [r for r in model.spiking_report().analog if r.name.startswith('4.gate') and 'gate' in r.reason]
    x = torch.randn(4, 8, 1, 1)
    assert torch.allclose(model[4].gate(x.clone()), expected(x), atol=1e-6)  # float32


class _MyReLU(nn.ReLU):
    """A user's subclass that adds nothing to the forward."""


class _MySiLU(nn.SiLU):
    def extra_repr(self):
        return 'mine'


@pytest.mark.parametrize('act', [_MyReLU(), _MySiLU()])
def test_subclass_of_an_activation_is_swapped(act):
    model = _convert(act)
    assert isinstance(model[4], LIF)
    record = next(r for r in model.spiking_report() if r.name == '4')
    assert (record.was, record.now) == (type(act).__name__, 'LIF')


def test_registered_class_is_swapped():
    assert register_activation(_HardSwish) is _HardSwish
    try:
        model = _convert(_HardSwish())
        assert isinstance(model[4], LIF) and not model.spiking_report().analog
        other = _convert(nn.Sequential(type('Child', (_HardSwish,), {})()))
        assert isinstance(other[4][0], LIF)
    finally:
        unregister_activation(_HardSwish)
    with pytest.raises(ValueError, match='unknown: mul'):
        _convert(_HardSwish())
    with pytest.raises(KeyError, match='not registered'):
        unregister_activation(_HardSwish)
    for wrong in (F.relu, nn.ReLU(), 'ReLU'):
        with pytest.raises(TypeError, match='class of modules'):
            register_activation(wrong)


def test_policy_explains_what_the_audit_finds():
    clamp = _Calls(lambda x: x.clamp(min=0))
    record = next(r for r in _convert(clamp, exclude='4').spiking_report() if r.name == '4.clamp')
    assert record.reason == "excluded by '4', stays analog"
    reasons = {r.name: r.reason for r in _convert(clamp, include='2').spiking_report()}
    assert reasons['4.clamp'].startswith('not included')
    with pytest.raises(ValueError, match="'nowhere' matches no activation"):
        _convert(nn.Identity(), exclude='nowhere')


def test_recurrent_cells_and_excluded_modules_are_listed_once():
    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.GRUCell(8, 8)

        def forward(self, x):
            return x + self.cell(x.mean((2, 3)))[..., None, None]

    records = list(_convert(Cell()).spiking_report().analog)
    assert [r.name for r in records] == ['4.cell'] and 'recurrent' in records[0].reason
    records = _convert(nn.SiLU(), exclude='SiLU').spiking_report().analog
    assert [(r.name, r.now) for r in records] == [('4', 'SiLU')]


class _Watcher(nn.Module):
    """Keeps state that a measurement must not touch."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop, self.calls, self.seen = nn.BatchNorm2d(8), nn.Dropout(.5), 0, []

    def forward(self, x):
        self.calls += 1
        self.seen.append(x)
        return self.drop(self.norm(x))


@pytest.mark.parametrize('training', [True, False])
def test_audit_leaves_no_trace(training):
    model = _net(_Watcher()).train(training)
    model[0].eval()
    hooked = []
    model[3].register_forward_hook(lambda *args: hooked.append(1))
    state, before = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    convert_to_spiking(model, timesteps=T, input_size=SIZE)
    assert not hooked and model[4].calls == 0 and model[4].seen == [] and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert [m.training for m in model.modules()] == modes
    assert not nn.modules.module._global_forward_hooks and not nn.modules.module._global_forward_pre_hooks
    assert all('forward' not in vars(m) for m in model.modules())


def test_what_cannot_run_is_pending():
    with torch.device('meta'):
        model = _net(nn.Identity())
    assert 'audit: pending' in str(convert_to_spiking(model, timesteps=T).spiking_report())
    assert 'audit: all operations' in str(_convert(nn.Identity()).spiking_report())


def test_report_tells_what_the_audit_could_not_see():
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.spare = nn.ReLU()

        def forward(self, x):
            if self.training:
                raise RuntimeError('needs labels')
            return x if x.sum() > 0 else x + 1

    text = str(_convert(Picky()).spiking_report())
    assert 'needs labels' in text and 'depends on the data in 4' in text and '4.spare' in text


@functools.lru_cache(maxsize=None)
def _register():
    """A timm architecture of a user's own, with a clamp in it."""
    @register_model
    def audit_clamped(pretrained=False, **kwargs):
        model = timm.create_model('test_resnet', **kwargs)
        model.layer1[0].conv1 = nn.Sequential(model.layer1[0].conv1, _Calls(lambda x: x.clamp(min=0)))
        return model

    audit_clamped.__module__ = __name__
    register_spiking_models()


def test_allow_analog_reaches_create_model_and_a_checkpoint_restores_it(tmp_path):
    _register()
    with pytest.raises(ValueError, match=r'unknown: clamp in layer1\.0\.conv1\.1'):
        timm.create_model('spiking_audit_clamped', num_classes=4)
    model = timm.create_model('spiking_audit_clamped', num_classes=4, allow_analog=True)
    assert any('unknown: clamp' in r.reason for r in model.spiking_report())
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    again = timm.create_model('spiking_audit_clamped', num_classes=4, pretrained=True,
                              pretrained_cfg_overlay=dict(file=str(tmp_path / 'weights.pth'), num_classes=4))
    assert again.settings.allow_analog
    args, _ = parse_args(['--model', 'spiking_audit_clamped', '--allow-analog'])
    assert create_student(args, 4).settings.allow_analog
    args, _ = parse_args(['--model', 'test_resnet', '--allow-analog'])
    with pytest.raises(OptionError, match='--allow-analog.*does not spike'):
        create_student(args, 4)


def test_a_timm_model_needs_no_run_unless_it_was_changed(monkeypatch):

    def fail(*args, **kwargs):
        raise AssertionError('ran')

    monkeypatch.setattr(timm_sscl.conversion.convert, 'audit', fail)
    report = timm.create_model('spiking_test_vit').spiking_report()
    assert [r.name for r in report.analog if r.reason.startswith('gate (function)')][0].startswith('blocks.0.attn.')
    model = timm.create_model('test_resnet')
    model.layer2.append(nn.Threshold(0, 0))
    with pytest.raises(AssertionError, match='ran'):
        convert_to_spiking(model)
    with pytest.raises(AssertionError, match='ran'):
        timm.create_model('spiking_test_resnet', act_layer=nn.CELU)  # no class of timm's own models
    assert timm.create_model('spiking_fasternet_t0').neurons()  # its __init__ chooses among its own forwards
    model = timm.create_model('test_resnet')
    model.layer1[0].conv1.forward = model.layer2[0].conv1.forward
    with pytest.raises(AssertionError, match='ran'):
        convert_to_spiking(model)


def test_the_table_lists_the_gates_of_timms_classes():
    """Without a run, a report says what an audit would say."""
    for name in ('test_vit', 'volo_d1_224', 'davit_tiny'):
        with torch.device('meta'):
            report = timm.create_model(f'spiking_{name}').spiking_report()
        assert [r for r in report.analog if r.name.endswith('.softmax')], name
