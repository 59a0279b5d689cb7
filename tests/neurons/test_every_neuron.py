"""What holds for every neuron by its name, a user's too: alone, and in small timm models.

A neuron that is registered before this file is collected runs through all of it.
"""
import copy
import io
import logging
import pickle
from dataclasses import dataclass, fields

import pytest
import timm
import torch
import torch.nn as nn

from timm_sscl import LIF, SpikingNeuron, calibrate, list_neurons, register_neuron
from timm_sscl.knobs import knob
from timm_sscl.neurons import NeuronSettings, create_neuron, lif_backend, neuron_class

T, B, C = 3, 4, 5


class _Users(SpikingNeuron):
    """A neuron of a user's own: a learnt decay per channel, one weight per time step, and levels 0 to 2."""
    output, top = 'integer', 2
    needs_channels, per_step = True, ('by_step',)

    @dataclass(frozen=True)
    class Settings(NeuronSettings):
        tau: float = knob(.5, 'decay factor at the start of training')

    def build(self, shape):
        self.w = nn.Parameter(torch.full(shape, self.settings.tau).logit())
        self.by_step = nn.Parameter(torch.ones(self.timesteps))

    def constants(self):
        return self.w.sigmoid(), self.over_time(self.by_step)

    def start(self, x):
        return (torch.zeros_like(x),)

    @staticmethod
    def step(x, state, constants, t, settings):
        u = constants[0] * state[0] + x * constants[1][t]
        out = settings.spike(u, .5) + settings.spike(u, 1.5)
        return out, (u - out,)


@pytest.fixture(autouse=True)
def _users_neuron_and_eager():
    register_neuron('users_own')(_Users)
    with lif_backend('eager'):
        yield


NAMES = [*list_neurons(), 'users_own']
every_neuron = pytest.mark.parametrize('name', NAMES)
COMPILED = [name if name in ('plif', 'glif', 'users_own') else pytest.param(name, marks=pytest.mark.families)
            for name in NAMES]


def _neuron(name, timesteps=T, shape=(C, 1, 1), **settings):
    torch.manual_seed(0)
    neuron = create_neuron(name, timesteps, channels=shape, **settings).double()
    with torch.no_grad():
        for p in neuron.parameters():  # not at their starting values, where gates and slopes are alike
            p.add_(.1 * torch.randn(p.shape, dtype=p.dtype))
    return neuron


def _x(*shape, seed=0):
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _run(neuron, x):
    """Output, and gradients by the current and the parameters."""
    x = x.clone().requires_grad_()
    out, weight = neuron(x), _x(*x.shape, seed=1)
    return out.detach(), torch.autograd.grad((out * weight).sum(), [x, *neuron.parameters()])


def _same(a, b, tolerance=1e-12):
    for x, y in zip(a[1], b[1]):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)  # sums in another order
    torch.testing.assert_close(a[0], b[0], rtol=tolerance, atol=tolerance)


# ---- alone

@every_neuron
def test_output_is_of_the_kind_it_says(name):
    neuron = _neuron(name)
    out = neuron(_x(T * B, C, 3, 3) * neuron.threshold() * 2)
    levels = neuron.levels(out)
    kinds = dict(binary=[0, 1], ternary=[-1, 0, 1], integer=list(range(neuron.top + 1)))
    if neuron.output == 'analog':
        assert len(levels.unique()) > 20
    else:
        assert levels.unique().tolist() == kinds[neuron.output]
    activity = neuron.activity(out)
    assert activity.min() == 0 and activity.max() == 1
    assert all(p.grad_fn is None for p in neuron.parameters())


@every_neuron
def test_every_parameter_and_the_current_have_a_gradient(name):
    neuron = _neuron(name)
    for gradient, (key, _) in zip(_run(neuron, _x(T * B, C, 3, 3))[1], [('x', None), *neuron.named_parameters()]):
        assert gradient.isfinite().all(), key
        gated = name == 'glif' and key in ('leak', 'v_reset')  # behind gates that are shut at the start
        assert gated or gradient.abs().sum() > 0, key


@every_neuron
def test_a_batch_is_its_samples_in_any_order(name):
    neuron, x = _neuron(name), _x(T, B, C, 3, 3)
    out = neuron(x.flatten(0, 1)).view_as(x)
    for i in range(B):
        torch.testing.assert_close(neuron(x[:, i]), out[:, i], rtol=1e-12, atol=1e-12)
    order = torch.tensor([2, 0, 3, 1])
    permuted = neuron(x[:, order].flatten(0, 1)).view_as(x)
    torch.testing.assert_close(permuted, out[:, order], rtol=1e-12, atol=1e-12)


@every_neuron
@pytest.mark.parametrize('timesteps, batch', [(1, 1), (1, B), (B, B)])
def test_one_step_and_as_many_steps_as_samples(name, timesteps, batch):
    neuron, x = _neuron(name, timesteps), _x(timesteps, batch, C, 2, 2)
    out, by_sample = neuron(x.flatten(0, 1)).view_as(x), [neuron(x[:, i]) for i in range(batch)]
    torch.testing.assert_close(out, torch.stack(by_sample, 1), rtol=1e-12, atol=1e-12)


@every_neuron
def test_step_by_step_by_its_own_step(name):
    """`forward` is the plain loop over `step`, gain and scale around it; parallel neurons have none."""
    neuron, x = _neuron(name), _x(T, B, C, 2, 2)
    gain, scale = torch.tensor(1.5, dtype=torch.float64), torch.tensor(.25, dtype=torch.float64)
    if type(neuron).step is SpikingNeuron.step:
        assert type(neuron).run is not SpikingNeuron.run
        return

    def loop(folded):
        steps, constants, outputs = gain * folded.view_as(x), neuron.constants(), []
        state = neuron.start(steps[0])
        for t in range(T):
            out, state = type(neuron).step(steps[t], state, constants, t, neuron.settings)
            outputs.append(out)
        out = scale * torch.stack(outputs).flatten(0, 1)
        return out * neuron.amplitude if 'amplitude' in neuron._parameters else out

    class Loop(nn.Module):
        parameters = neuron.parameters
        forward = staticmethod(loop)

    neuron.set_gain(gain, scale)
    _same(_run(neuron, x.flatten(0, 1)), _run(Loop(), x.flatten(0, 1)))


@pytest.mark.parametrize('name', COMPILED)
def test_compiled_equals_eager(name):
    neuron, x = _neuron(name, timesteps=2), _x(2 * B, C, 2, 2)
    eager = _run(neuron, x)
    with lif_backend('compiled'):
        _same(_run(neuron, x), eager, 1e-10)


@every_neuron
def test_half_precision_is_integrated_in_float32(name):
    neuron, x = _neuron(name).float(), _x(T * B, C, 2, 2).bfloat16()
    out = neuron(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, neuron(x.float()).bfloat16(), rtol=0, atol=0)


@every_neuron
def test_channels_last_and_gain_per_channel(name):
    neuron, x = _neuron(name), _x(T * B, C, 3, 3)
    neuron.set_gain(torch.linspace(.5, 2, C, dtype=torch.float64).view(C, 1, 1))
    out = neuron(x)
    torch.testing.assert_close(neuron(x.to(memory_format=torch.channels_last)), out, rtol=1e-12, atol=1e-12)
    gain = neuron.gain
    neuron.set_gain()
    torch.testing.assert_close(neuron(x * gain), out, rtol=1e-12, atol=1e-12)


@every_neuron
def test_a_static_current_is_the_repeated_one(name):
    neuron, x = _neuron(name), _x(B, C, 2, 2)
    repeated = neuron(torch.cat([x] * T))
    neuron.encodes = True
    torch.testing.assert_close(neuron(x), repeated, rtol=1e-12, atol=1e-12)


@every_neuron
def test_bad_settings_are_named(name):
    cls = neuron_class(name)
    with pytest.raises(ValueError, match="has no option 'nonsense'"):
        cls(T, nonsense=1)
    for field in fields(cls.Settings):
        assert field.metadata.get('help'), f'{name}: {field.name} has no help text'
    bad = dict(tau=2., v_threshold=-1., v_reset=9., k=0, num_levels=0, max_spikes=0, mask=2., activation='step',
               tau_m=-1., tau_a=0., rho=1.5, beta=-1.)
    if cls.__module__.startswith('timm_sscl.'):
        for key in bad.keys() & {field.name for field in fields(cls.Settings)}:
            with pytest.raises(ValueError, match=f'{key}='.replace('rho', 'tau')):
                cls(T, channels=(C,), **{key: bad[key]})


# ---- in a model

def _model(name, arch='test_resnet', timesteps=2, **options):
    torch.manual_seed(0)
    return timm.create_model(f'spiking_{arch}', num_classes=3, neuron=name, timesteps=timesteps, **options)


def _images(n=4, size=32):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def _step(model, x):
    optimizer = torch.optim.SGD(model.parameters(), lr=.1)
    loss = nn.functional.cross_entropy(model(x), torch.arange(len(x)) % 3)
    loss.backward()
    optimizer.step()
    return loss.item()


@every_neuron
def test_model_trains_and_its_checkpoint_restores_all(name):
    model, x = _model(name), _images()
    neurons = model.neurons()
    assert neurons and {type(neuron) for neuron in neurons.values()} == {neuron_class(name)}
    keys = {f'{n}.{key}' for n, neuron in neurons.items() for key, _ in neuron.named_parameters()}
    assert keys <= model.no_weight_decay() and keys <= dict(model.named_parameters()).keys()
    drives = calibrate(model, x).spiking_report().drives
    assert any(drive.rate > 0 for drive in drives) and all(0 <= drive.rate <= 1 for drive in drives)
    model.train()
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    assert _step(model, x) > 0
    moved = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
    assert len(moved & keys) >= len(keys) / 4
    model.eval()
    other = timm.create_model('spiking_test_resnet', num_classes=3).eval()
    other.load_state_dict(model.state_dict())
    assert other.settings == model.settings and torch.equal(other(x), model(x))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False):
        assert torch.equal(twin(x), model(x)) and twin.settings == model.settings


@every_neuron
def test_an_anns_weights_load_strictly_and_neurons_keep_their_parameters(name):
    model, ann = _model(name), timm.create_model('test_resnet', num_classes=3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(ann.state_dict())
    after, weights = model.state_dict(), ann.state_dict()
    assert after.keys() == before.keys() and weights.keys() <= after.keys()
    assert all(torch.equal(value, weights.get(key, before[key])) for key, value in after.items())


@every_neuron
def test_other_time_steps_and_back(name, recwarn):
    model, x = _model(name, timesteps=4).eval(), _images()
    calibrate(model, x)
    out, state = model(x), {key: value.clone() for key, value in model.state_dict().items()}
    per_step = model(x, per_step=True)
    model.set_timesteps(2)
    if name != 'psn':  # no step sees a later one
        torch.testing.assert_close(model(x, per_step=True), per_step[:2], rtol=1e-4, atol=1e-4)  # float32
    else:
        assert any('another neuron' in str(w.message) for w in recwarn)
    model.set_timesteps(4)
    assert torch.equal(model(x), out) and all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    if name in ('psn', 'masked_psn'):
        with pytest.raises(ValueError, match='timesteps=6: .* has weights for 4 time steps'):
            model.set_timesteps(6)
        assert model.timesteps == 4 and torch.equal(model(x), out)
    else:
        model.set_timesteps(6)
        torch.testing.assert_close(model(x, per_step=True)[:4], per_step, rtol=1e-4, atol=1e-4)


@every_neuron
def test_checkpoint_of_other_time_steps(name, caplog):
    trained, x = _model(name, timesteps=4).eval(), _images()
    other = timm.create_model('spiking_test_resnet', num_classes=3, neuron=name).eval()
    other.set_timesteps(2)
    other._explicit = other._explicit - {'timesteps'}
    other.load_state_dict(trained.state_dict())
    assert other.timesteps == 4 and torch.equal(other(x), trained(x))
    fewer = _model(name, timesteps=2).eval()
    with caplog.at_level(logging.WARNING):
        fewer.load_state_dict(trained.state_dict())
    assert fewer.timesteps == 2
    trained.set_timesteps(2)
    assert torch.equal(fewer(x), trained(x))


@every_neuron
@pytest.mark.parametrize('arch', ['test_vit', 'test_convnext', 'test_mambaout'])
def test_tokens_and_channels_last_maps(name, arch):
    model = _model(name, arch).train()
    size = model.pretrained_cfg['input_size'][-1] if arch == 'test_vit' else 32
    x = _images(2, size)
    calibrate(model, x)
    assert _step(model, x) > 0
    shapes = {}
    for key, neuron in model.neurons().items():
        neuron.register_forward_pre_hook(lambda m, args, key=key: shapes.update({key: args[0].shape}))
    with torch.no_grad():
        model(x)
    for key, neuron in model.neurons().items():
        if neuron.needs_channels:
            maps = 'stem' in key and arch == 'test_mambaout'  # behind a convolution; elsewhere channels are last
            assert neuron.channels == ((shapes[key][1], 1, 1) if maps else (shapes[key][-1],))


def test_names_are_those_of_the_manual():
    assert set(list_neurons()) >= {
        'if', 'lif', 'plif', 'glif', 'klif', 'ltmd', 'diet', 'alif', 'multi_gaussian_alif', 'liaf', 'ternary',
        'real_spike', 'mlf', 'psn', 'masked_psn', 'sliding_psn', 'ilif'}
    assert neuron_class('lif') is LIF
