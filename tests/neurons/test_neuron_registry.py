"""Neurons and surrogates by name: a user's own in a converted model, its gradients, its checkpoints and its errors."""
import copy
import io
import logging
import pickle
from dataclasses import dataclass
from functools import partial

import pytest
import timm
import torch
import torch.nn as nn

import timm_sscl
from timm_sscl import (
    LIF, SpikingNeuron, convert_to_spiking, list_neurons, list_surrogates, register_neuron, register_surrogate,
    unregister_neuron, unregister_surrogate)
from timm_sscl.knobs import knob
from timm_sscl.neurons import NeuronSettings, create_neuron, lif_backend, neuron_class
from timm_sscl.training.command_line.options import OptionError, parse_args
from timm_sscl.training.student import create_student

T = 3


class ParametricLIF(SpikingNeuron):
    """tau is learnt, through a sigmoid; the reset is hard, to 0."""

    @dataclass(frozen=True)
    class Settings(NeuronSettings):
        tau: float = knob(0.5, 'decay factor at the start of training')
        v_threshold: float = knob(1., 'firing threshold')

    def __init__(self, timesteps, **settings):
        super().__init__(timesteps, **settings)
        self.w = nn.Parameter(torch.logit(torch.tensor(self.settings.tau)))

    def constants(self):
        return (self.w.sigmoid(),)

    def start(self, x):
        return (torch.zeros_like(x),)

    @staticmethod
    def step(x, state, constants, t, settings):
        u = constants[0] * state[0] + x
        spikes = settings.spike(u, settings.v_threshold)
        return spikes, (u * (1 - spikes),)


def bump(u, v_threshold, width=.5):
    return (1 - ((u - v_threshold) / width) ** 2).clamp(min=0)


@pytest.fixture
def plif():
    register_neuron('my_plif')(ParametricLIF)
    register_surrogate('bump')(bump)


class _Fire(torch.autograd.Function):
    """A spike with a gradient that is given, as the literature writes it."""

    @staticmethod
    def forward(ctx, u, v_threshold, slope):
        ctx.save_for_backward(slope)
        return (u >= v_threshold).to(u.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0], None, None


def _reference(x, tau, v_threshold, h, v_reset=0., detach_reset=False, v_init=0.):
    """Spikes (T, ...), step by step in plain autograd."""
    v, spikes = torch.full_like(x[0], v_init), []
    for x_t in x:
        u = tau * v + x_t
        o = _Fire.apply(u, v_threshold, h(u.detach()))
        spikes.append(o)
        r = o.detach() if detach_reset else o
        v = u - v_threshold * r if v_reset is None else u * (1 - r) + v_reset * r
    return torch.stack(spikes)


def _randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _gradients(run, x, weight, *parameters):
    x = x.clone().requires_grad_()
    spikes = run(x)
    return spikes.detach(), torch.autograd.grad((spikes * weight).sum(), [x, *parameters])


def _assert_equal(ours, expected):
    assert torch.equal(ours[0], expected[0]) and 0 < ours[0].mean() < 1
    for a, b in zip(ours[1], expected[1]):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)  # float64: sums in another order
        assert b.abs().max() > 0


@pytest.mark.parametrize('mode', ['eager', 'compiled'])
@pytest.mark.parametrize('settings', [
    dict(), dict(v_reset=None), dict(v_reset=.1), dict(detach_reset=True), dict(v_reset=None, detach_reset=True),
    dict(v_init=.2)], ids=str)
def test_lif_with_another_surrogate(settings, mode):
    x, weight = .6 * _randn(T, 4, 5), _randn(T, 4, 5, seed=1)
    neuron = LIF(T, tau=.5, surrogate='triangle', surrogate_kwargs=dict(gamma=.8), **settings).double()
    triangle = lambda u: (.8 - (u - .5).abs()).clamp(min=0) / .64
    v_init = settings.get('v_init', settings.get('v_reset') or 0.)
    reference = partial(_reference, tau=.5, v_threshold=.5, h=triangle, **{**settings, 'v_init': v_init})
    with lif_backend(mode):
        ours = _gradients(lambda x: neuron(x.flatten(0, 1)).view_as(x), x, weight)
    _assert_equal(ours, _gradients(reference, x, weight))


@pytest.mark.parametrize('mode', ['eager', 'compiled'])
def test_generic_recursion_of_the_rectangle_is_lif(mode):
    class Same(LIF):
        run = SpikingNeuron.run  # not the kernel

    x, weight = _randn(T * 4, 5), _randn(T * 4, 5, seed=1)
    with lif_backend(mode):
        ours = _gradients(Same(T, v_reset=.1).double(), x, weight)
        _assert_equal(ours, _gradients(LIF(T, v_reset=.1).double(), x, weight))


@pytest.mark.parametrize('mode', ['eager', 'compiled'])
def test_own_neuron_with_a_parameter_against_autograd(plif, mode, caplog):
    x, weight = _randn(T, 4, 5), _randn(T, 4, 5, seed=1)
    neuron = create_neuron('my_plif', T, tau=.3, surrogate='bump', surrogate_kwargs=dict(width=.7)).double()
    w = neuron.w.detach().clone().requires_grad_()
    reference = lambda x: _reference(x, w.sigmoid(), 1., lambda u: (1 - ((u - 1) / .7) ** 2).clamp(min=0))
    with lif_backend(mode):
        ours = _gradients(lambda x: neuron(x.flatten(0, 1)).view_as(x), x, weight, neuron.w)
    _assert_equal(ours, _gradients(reference, x, weight, w))
    assert 'without torch.compile' not in caplog.text


def test_gain_scale_and_half_precision(plif):
    x = _randn(T * 4, 5, dtype=torch.float32)
    neuron = create_neuron('my_plif', T)
    expected = neuron(3 * x)
    neuron.set_gain(torch.tensor(3.), torch.tensor(2.))
    assert torch.equal(neuron(x), 2 * expected)
    assert neuron(x.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match='int64'):
        neuron(x.long())
    with pytest.raises(ValueError, match=f'timesteps={T}'):
        neuron(x[1:])


def _model(**options):
    options = {'neuron': 'my_plif', 'neuron_kwargs': dict(tau=.3), 'surrogate': 'bump', **options}
    return timm.create_model('spiking_test_resnet', num_classes=4, timesteps=2, **options)


def test_converted_model_trains_the_neurons_parameter(plif):
    model = _model(surrogate_kwargs=dict(width=.9))
    neurons = model.neurons()
    assert neurons and all(type(m) is ParametricLIF for m in neurons.values())
    neuron = next(iter(neurons.values()))
    assert neuron.settings == ParametricLIF.Settings(tau=.3, surrogate='bump', surrogate_kwargs=dict(width=.9))
    assert {r.now for r in model.spiking_report().neurons} == {'ParametricLIF'}
    names = {f'{name}.w' for name in neurons}
    assert names <= model.no_weight_decay() and names <= dict(model.named_parameters()).keys()
    timm_sscl.calibrate(model, _randn(4, 3, 32, 32, dtype=torch.float32))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if name in names}
    model(_randn(4, 3, 32, 32, dtype=torch.float32)).square().sum().backward()
    optimizer.step()
    after = dict(model.named_parameters())
    assert sum(not torch.equal(after[name], before[name]) for name in names) > len(names) / 2


def test_set_timesteps_keeps_parameters(plif):
    model = _model()
    neuron = next(iter(model.neurons().values()))
    with torch.no_grad():
        neuron.w.fill_(2.)
    model.set_timesteps(5)
    assert neuron.timesteps == 5 and neuron.w.item() == 2. and neuron is next(iter(model.neurons().values()))


def _trained(**options):
    model = _model(**options).eval()
    with torch.no_grad():
        for i, neuron in enumerate(model.neurons().values()):
            neuron.w.fill_(.1 * i)
    return model


def test_checkpoint_restores_neuron_surrogate_and_parameters(plif, tmp_path, caplog):
    trained, x = _trained(surrogate_kwargs=dict(width=.9)), _randn(2, 3, 32, 32, dtype=torch.float32)
    other = timm.create_model('spiking_test_resnet', num_classes=4).eval()  # nothing was asked for
    other.load_state_dict(trained.state_dict())
    assert other.settings == trained.settings and torch.equal(other(x), trained(x))
    assert other.settings.surrogate == 'bump' and dict(other.settings.neuron_kwargs)['tau'] == .3
    torch.save(trained.state_dict(), tmp_path / 'weights.pth')
    named = timm.create_model('spiking_test_resnet', num_classes=4, pretrained=True,
                              pretrained_cfg_overlay=dict(file=str(tmp_path / 'weights.pth'), num_classes=4)).eval()
    assert torch.equal(named(x), trained(x))
    with caplog.at_level(logging.WARNING):
        kept = _model(neuron_kwargs=dict(v_threshold=.7), surrogate=None).eval()
        kept.load_state_dict(trained.state_dict())
    assert dict(kept.settings.neuron_kwargs) == dict(tau=.3, v_threshold=.7) and kept.settings.surrogate == 'bump'
    assert 'v_threshold=1.0' in caplog.text and 'v_threshold=0.7' in caplog.text


def test_ann_weights_load_strictly(plif):
    ann, model = timm.create_model('test_resnet', num_classes=4), _trained()
    before = [neuron.w.item() for neuron in model.neurons().values()]
    model.load_state_dict(ann.state_dict())
    assert [neuron.w.item() for neuron in model.neurons().values()] == before
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in ann.state_dict().items())


def test_missing_parameter_of_a_spiking_checkpoint_is_an_error(plif):
    state = _trained().state_dict()
    del state[next(key for key in state if key.endswith('.w'))]
    with pytest.raises(RuntimeError, match=r'Missing key.*\.w'):
        _model().load_state_dict(state)


@pytest.mark.parametrize('kind, unregister', [('my_plif', unregister_neuron), ('bump', unregister_surrogate)])
def test_checkpoint_of_a_missing_plugin(plif, kind, unregister):
    state, other = _trained().state_dict(), timm.create_model('spiking_test_resnet', num_classes=4)
    unregister(kind)
    with pytest.raises(RuntimeError, match=f"'{kind}', which is not registered.*--plugin"):
        other.load_state_dict(state)
    assert other.settings.neuron == 'lif'


def test_copies(plif):
    model, x = _trained(), _randn(2, 3, 32, 32, dtype=torch.float32)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False):
        assert torch.equal(twin(x), model(x)) and twin.settings == model.settings
        neuron = next(iter(twin.neurons().values()))
        assert neuron.settings.surrogate_function is bump
        neuron.w.data.fill_(9.)
    assert next(iter(model.neurons().values())).w.item() == 0


def test_names(plif):
    assert {'lif', 'my_plif'} <= set(list_neurons()) and {'rectangle', 'triangle', 'bump'} <= set(list_surrogates())
    assert neuron_class('lif') is LIF
    unregister_neuron('my_plif')
    assert 'my_plif' not in list_neurons()
    with pytest.raises(ValueError, match="unknown neuron 'my_plif'"):
        _model()
    with pytest.raises(ValueError, match="unknown neuron 'liff'.*Did you mean 'lif'"):
        _model(neuron='liff')
    with pytest.raises(ValueError, match="unknown surrogate 'triangel'.*Did you mean 'triangle'"):
        _model(neuron=None, neuron_kwargs=None, surrogate='triangel')
    with pytest.raises(ValueError, match="neuron 'lif' has no option 'tua'.*Did you mean 'tau'"):
        _model(neuron='lif', neuron_kwargs=dict(tua=.1))
    with pytest.raises(ValueError, match="surrogate 'bump'.*wdith.*width"):
        _model(neuron='lif', surrogate_kwargs=dict(wdith=.1))


def test_name_that_is_taken_and_a_class_defined_again(caplog):
    def define():
        class Mine(SpikingNeuron):
            pass
        return register_neuron('mine')(Mine)

    define()
    with caplog.at_level(logging.WARNING):
        second = define()
    assert 'defined again' in caplog.text and neuron_class('mine') is second
    with pytest.raises(ValueError, match="'lif' is registered already"):
        register_neuron('lif')(ParametricLIF)
    with pytest.raises(TypeError, match='no subclass of SpikingNeuron'):
        register_neuron('relu')(nn.ReLU)


def test_surrogate_defined_again_is_not_the_compiled_one_of_before():
    def define(slope):
        def mine(u, v_threshold):
            return torch.full_like(u, slope)
        register_surrogate('mine')(mine)

    x = _randn(2 * 4).requires_grad_()
    with lif_backend('compiled'):
        for slope in (1., 3.):
            define(slope)
            grad, = torch.autograd.grad(LIF(1, surrogate='mine').double()(x).sum(), x)
            assert torch.equal(grad, torch.full_like(x, slope))


def test_lif_options_in_either_form():
    def convert(**options):
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        return convert_to_spiking(model, example_inputs=torch.zeros(1, 4), **options)

    models = [convert(tau=.7, v_reset='soft'), convert(neuron='lif', neuron_kwargs=dict(tau=.7, v_reset='soft')),
              convert(neuron=LIF, neuron_kwargs=dict(tau=.7, v_reset=None)),
              convert(neuron=partial(LIF, tau=.7, v_reset=None))]
    for model in models:
        assert model.settings.tau == .7 and model.settings.v_reset is None and model.settings.neuron_kwargs == ()
        assert model[1].tau == .7 and model[1].v_reset is None
    with pytest.raises(ValueError, match='no registered neuron'):
        convert(neuron=type('Other', (LIF,), {}))


@pytest.mark.parametrize('neuron', ['lif', 'if', 'klif'])
def test_words_for_the_soft_reset(neuron):
    net = partial(nn.Sequential, nn.Linear(4, 4), nn.ReLU())
    for word in ('soft', 'none', None):
        assert create_neuron(neuron, timesteps=2, v_reset=word).settings.v_reset is None
        model = convert_to_spiking(net(), example_inputs=torch.zeros(1, 4), neuron=neuron, v_reset=word)
        assert model[1].settings.v_reset is None
    for make in (partial(create_neuron, neuron, timesteps=2),
                 partial(convert_to_spiking, net(), example_inputs=torch.zeros(1, 4), neuron=neuron)):
        with pytest.raises(ValueError, match="v_reset=sotf: must be a number or 'soft'"):
            make(v_reset='sotf')


def test_option_of_another_neuron_by_the_lifs_name(plif):
    model = convert_to_spiking(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), example_inputs=torch.zeros(1, 4), tau=.2,
                               neuron='my_plif')
    assert model[1].settings.tau == .2
    with pytest.raises(ValueError, match="neuron 'my_plif' has no option 'v_init'"):
        _model(v_init=.1)


def _student(*options):
    args, _ = parse_args(['--model', 'spiking_test_resnet', *options])
    return create_student(args, 4)


def test_options_of_the_script(plif):
    model = _student('--neuron', 'my_plif', '--neuron-kwargs', 'tau=.3', 'v_threshold=.8', '--surrogate', 'bump',
                     '--surrogate-kwargs', 'width=.9')
    assert dict(model.settings.neuron_kwargs) == dict(tau=.3, v_threshold=.8)
    assert model.settings.surrogate == 'bump' and dict(model.settings.surrogate_kwargs) == dict(width=.9)
    assert _student('--neuron-kwargs', 'tau=.3', 'v_reset=soft').settings.v_reset is None
    assert _student().settings.neuron == 'lif'
    for options, message in (
            (['--neuron', 'plfi'], '--neuron plfi: is not registered.*--plugin'),
            (['--surrogate', 'bmup'], '--surrogate bmup: is not registered.*--plugin'),
            (['--neuron-kwargs', 'tua=.3'], "neuron 'lif' has no option 'tua'"),
            (['--model', 'test_resnet', '--neuron', 'my_plif'], 'does not spike')):
        with pytest.raises(OptionError, match=message):
            _student(*options)
