"""Threshold rules of convert_ann and calibrate against slow references, hand examples and SpikingJelly."""
import copy
from functools import partial

import pytest
import torch
import torch.nn as nn

from timm_sscl import (
    calibrate, convert_ann, convert_to_spiking, list_threshold_rules, poisson_input, register_threshold_rule,
    unregister_threshold_rule)
from timm_sscl.conversion import ThresholdRule

IF = dict(tau=1., v_threshold=1., v_reset='soft')


class _Plain(nn.Module):
    """Three layers of ReLU without norms and biases, as SpikeNorm wants them."""

    def __init__(self):
        super().__init__()
        self.fc1, self.act1 = nn.Linear(6, 8, bias=False), nn.ReLU()
        self.fc2, self.act2 = nn.Linear(8, 8, bias=False), nn.ReLU()
        self.fc3, self.act3 = nn.Linear(8, 8, bias=False), nn.ReLU()
        self.head = nn.Linear(8, 4, bias=False)

    def forward(self, x):
        x = self.act1(self.fc1(x.flatten(1)))
        return self.head(self.act3(self.fc3(self.act2(self.fc2(x)))))


class _Norms(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.act1 = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU()
        self.conv2, self.bn2, self.act2 = nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.act2(self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x))))))
        return self.head(x.mean((2, 3)))


def _net(cls=_Plain):
    torch.manual_seed(0)
    net = cls().double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, .5, 2.)
            nn.init.normal_(module.bias)
    return net.eval()


def _images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _largest(model, x):
    """max(gain * current) of every neuron layer, over timesteps, samples and neurons."""
    seen = {}
    for name, lif in model.neurons().items():
        lif.register_forward_hook(lambda m, args, out, name=name: seen.update({name: (m.gain * args[0]).max().item()}))
    with torch.no_grad():
        model(x)
    return seen


def _spike_norm(net, x, timesteps, factor):
    """Slow reference: one layer after the other, every neuron and timestep by itself."""
    currents, thresholds = [(x.flatten(1) @ net.fc1.weight.T).tolist()] * timesteps, []
    for after in (net.fc2, net.fc3, net.head):
        threshold = factor * max(value for step in currents for row in step for value in row)
        spikes = [[[0.] * len(row) for row in step] for step in currents]
        for i, row in enumerate(currents[0]):
            for j in range(len(row)):
                v = threshold / 2
                for t in range(timesteps):
                    v += currents[t][i][j]
                    if v >= threshold:
                        v -= threshold
                        spikes[t][i][j] = threshold
        thresholds.append(threshold)
        currents = [(torch.tensor(step, dtype=torch.float64) @ after.weight.T).tolist() for step in spikes]
    return thresholds


@pytest.mark.parametrize('factor', [1., .7])
def test_spike_norm_is_that_of_a_slow_reference(factor):
    net, x = _net(), _images(5, 1, 2, 3)
    expected = _spike_norm(net, x, 7, factor)
    model = convert_ann(copy.deepcopy(net), x, 7, per_channel=False, rule='spike_norm', factor=factor)
    found = [lif.scale.item() for lif in model.neurons().values()]
    assert found == pytest.approx(expected, rel=1e-12)  # round-off of sums in another order
    assert [lif.gain.item() for lif in model.neurons().values()] == pytest.approx([1 / t for t in expected], rel=1e-12)


@pytest.mark.parametrize('cls, shape', [(_Plain, (6, 1, 2, 3)), (_Norms, (6, 3, 8, 8))])
@pytest.mark.parametrize('factor', [1., .7])
def test_largest_current_reaches_the_threshold(cls, shape, factor):
    """max(gain * x) is 1 per layer on the same batch, and 1 / factor with a factor."""
    x = _images(*shape)
    converted = convert_ann(_net(cls), x, 6, per_channel=False, rule='spike_norm', factor=factor)
    calibrated = convert_to_spiking(_net(cls), timesteps=6, input_size=shape[1:], **IF).train()
    calibrate(calibrated, x, rule='spike_norm', factor=factor)
    for model in (converted, calibrated):
        largest = _largest(model, x)
        assert set(largest) == set(model.neurons())
        assert list(largest.values()) == pytest.approx([1 / factor] * len(largest), rel=1e-12)  # one rounded division
    drives = calibrated.spiking_report().drives
    assert drives[0].gain == pytest.approx(calibrated.act1.gain.item()) and all(d.rate > 0 for d in drives)


def test_calibration_scales_by_the_neurons_own_threshold():
    x = _images(6, 1, 2, 3)
    model = convert_to_spiking(_net(), timesteps=3, v_threshold=.5, input_size=(1, 2, 3))
    calibrate(model, x, 'spike_norm')
    assert list(_largest(model, x).values()) == pytest.approx([.5] * 3, rel=1e-12)


def test_gains_alone_and_thresholds_with_scales_give_the_same_spikes():
    """Without biases, scaling a layer's spikes by its threshold scales all later currents and thresholds."""
    x, spikes = _images(6, 1, 2, 3), []
    converted = convert_ann(_net(), x, 9, per_channel=False, rule='spike_norm')
    calibrated = convert_to_spiking(_net(), timesteps=9, v_init=.5, input_size=(1, 2, 3), **IF)
    calibrate(calibrated, x, 'spike_norm')
    other = _images(4, 1, 2, 3, seed=2)
    for model in (converted, calibrated):
        for lif in model.neurons().values():
            lif.register_forward_hook(lambda m, args, out: spikes.append(out != 0))
        model(other)
    assert len(spikes) == 6 and all(torch.equal(a, b) for a, b in zip(spikes[:3], spikes[3:]))
    assert 0 < spikes[2].double().mean() < 1
    product = converted.act3.scale  # the last threshold carries those of all layers before it
    assert torch.allclose(converted(other), calibrated(other) * product, rtol=1e-12, atol=0)


def test_factor_multiplies_measured_thresholds():
    net, x = _net(_Norms), _images(8, 3, 8, 8)
    whole, part = (convert_ann(copy.deepcopy(net), x, factor=f) for f in (1., .25))
    assert torch.equal(part.act1.scale, whole.act1.scale * .25)
    rms, half = (convert_to_spiking(copy.deepcopy(net), input_size=(3, 8, 8)) for _ in range(2))
    calibrate(rms, x), calibrate(half, x, factor=.5)
    assert half.act1.gain.item() == pytest.approx(2 * rms.act1.gain.item(), rel=1e-6)  # rounded to float32 once


# ---- LTB

def _ltb(net, batches):
    """Slow reference of the first two layers, per channel."""
    thresholds = [[0.] * 6, [0.] * 8]
    for x in batches:
        a = net.bn1(net.conv1(x)).relu()
        for i, layer in enumerate(thresholds):
            for c in range(len(layer)):
                values = a[:, c].flatten().tolist()
                layer[c] += 2 * sum(max(v - layer[c], 0.) for v in values) / len(values)
            a = torch.minimum(a, torch.tensor(layer, dtype=a.dtype)[:, None, None])
            a = net.bn2(net.conv2(a)).relu() if i == 0 else a
    return thresholds


@torch.no_grad()
def test_ltb_is_that_of_a_slow_reference():
    net, x = _net(_Norms), _images(130, 3, 6, 6)  # batches of 64, 64 and 2
    expected = _ltb(net, x.split(64))
    model = convert_ann(copy.deepcopy(net), x, rule='ltb')
    for lif, values in zip(model.neurons().values(), expected):
        assert lif.scale.shape == (len(values), 1, 1)
        # a threshold of 0 belongs to a silent channel, which gets 1
        assert lif.scale.flatten().tolist() == pytest.approx([v or 1. for v in values], rel=1e-12)


@torch.no_grad()
def test_ltb_begins_with_twice_the_mean():
    net, x = _net(_Norms), _images(20, 3, 6, 6)
    a = net.bn1(net.conv1(x)).relu()
    per_channel, per_layer = (convert_ann(copy.deepcopy(net), x, per_channel=p, rule='ltb') for p in (True, False))
    assert torch.allclose(per_channel.act1.scale.flatten(), 2 * a.mean((0, 2, 3)), rtol=1e-12, atol=0)
    assert per_layer.act1.scale.item() == pytest.approx(2 * a.mean().item(), rel=1e-12)


@torch.no_grad()
def test_ltb_is_spikingjellys():
    recipe = pytest.importorskip('spikingjelly.activation_based.ann2snn.recipes.local_threshold_balancing')
    net, x = _net(_Norms), _images(128, 3, 6, 6)
    hooks = [recipe.LocalThresholdBalancingHook() for _ in range(2)]
    for batch in x.split(64):
        a = hooks[0](net.bn1(net.conv1(batch)))
        hooks[1](net.bn2(net.conv2(a)))
    model = convert_ann(copy.deepcopy(net), x, rule='ltb')
    for lif, hook in zip(model.neurons().values(), hooks):
        expected = hook.compute_threshold()
        expected = torch.where(expected == hook.eps, 1., expected)  # a silent channel: 1 here, 1e-6 there
        assert torch.allclose(lif.scale.flatten(), expected, rtol=1e-12, atol=0)


# ---- Poisson input

def test_poisson_frames_have_the_image_as_their_mean():
    x = torch.linspace(-1, 1, 9, dtype=torch.float64).view(1, 1, 3, 3)
    timesteps = 40_000
    frames = poisson_input(x, timesteps, torch.Generator().manual_seed(0))
    assert frames.shape == (1, timesteps, 1, 3, 3) and frames.dtype == x.dtype
    assert torch.equal(frames.unique(), torch.tensor([-1., 0., 1.], dtype=x.dtype))
    # a mean of T draws has a standard deviation of at most 1 / (2 sqrt(T)) = .0025; five of them
    assert (frames.mean(1) - x).abs().max() < .0125
    for index in (0, 4, 8):  # -1, 0 and 1 are certain
        assert (frames.flatten(2)[..., index] == x.flatten()[index]).all()


def test_poisson_input_says_that_it_saturates():
    x = torch.tensor([[[[.5, -3.]]]])
    with pytest.warns(UserWarning, match='beyond -1 and 1'):
        frames = poisson_input(x, 8)
    assert (frames[..., 1] == -1).all()
    for images, timesteps, message in ((x, 0, 'timesteps=0'), (x, 2.5, 'timesteps=2.5'), (x[0], 2, 'images'),
                                       (x.long(), 2, 'images'), (x / 0., 2, 'finite')):
        with pytest.raises(ValueError, match=message):
            poisson_input(images, timesteps)


def test_spike_norm_on_poisson_frames():
    """The first threshold is the largest current of all frames; the ANN's maximum is another."""
    net, x = _net(), _images(6, 1, 2, 3).clamp(-1, 1)
    frames = poisson_input(x, 5, torch.Generator().manual_seed(0))
    model = convert_ann(copy.deepcopy(net), frames, 5, per_channel=False, rule='spike_norm')
    assert model.act1.scale.item() == pytest.approx(net.fc1(frames.flatten(2)).max().item(), rel=1e-12)
    assert list(_largest(model, frames).values()) == pytest.approx([1.] * 3, rel=1e-12)
    spiking = convert_to_spiking(copy.deepcopy(net), timesteps=5, input_size=(1, 2, 3), **IF)
    calibrate(spiking, frames, 'spike_norm')
    assert list(_largest(spiking, frames).values()) == pytest.approx([1.] * 3, rel=1e-12)
    with pytest.raises(ValueError, match='images: holds 5 frames per sample.*timesteps=4'):
        convert_ann(copy.deepcopy(net), frames, 4, rule='spike_norm')
    with pytest.raises(ValueError, match="images: holds 5 frames.*'ltb'"):
        convert_ann(copy.deepcopy(net), frames, 5, rule='ltb')


# ---- all rules

@pytest.mark.parametrize('per_channel', [True, False])
@pytest.mark.parametrize('rule', list_threshold_rules())
def test_thresholds_are_finite_of_the_right_shape_and_in_the_checkpoint(rule, per_channel):
    x = _images(8, 3, 8, 8)
    model = convert_ann(_net(_Norms), x, 4, per_channel, rule=rule)
    shapes = [tuple(lif.scale.shape) for lif in model.neurons().values()]
    assert shapes == ([(6, 1, 1), (8, 1, 1)] if per_channel else [(), ()])
    assert all((lif.scale > 0).all() and lif.scale.isfinite().all() for lif in model.neurons().values())
    other = convert_to_spiking(_net(_Norms), input_size=(3, 8, 8))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(x), model(x))


@pytest.mark.parametrize('rule', ['percentile', 'spike_norm'])
@torch.no_grad()
def test_approaches_the_ann(rule):
    """Nothing is clipped on the images of the thresholds, so that the error falls as 1 / T up to the transients."""
    ann, x = _net(_Norms), _images(8, 3, 8, 8)
    expected = ann(x)
    model = convert_ann(copy.deepcopy(ann), x, 32, per_channel=False, rule=rule)
    errors = [((model.set_timesteps(t)(x) - expected).norm() / expected.norm()).item() for t in (8, 64, 512)]
    assert errors[1] < errors[0] / 3 and errors[2] < errors[1] / 3


@pytest.mark.parametrize('rule', list_threshold_rules())
def test_silent_channel_gets_a_threshold_of_one(rule):
    net = _net(_Norms)
    with torch.no_grad():
        net.bn1.weight[0], net.bn1.bias[0] = 0., -1.
    model = convert_ann(net, _images(8, 3, 8, 8), rule=rule)
    assert model.act1.scale.flatten()[0] == 1. and model.act1.scale.flatten()[1:].ne(1.).all()


@pytest.mark.parametrize('rule', list_threshold_rules())
def test_failure_leaves_the_ann(rule):
    net, x = _net(_Norms), _images(8, 3, 8, 8)
    with torch.no_grad():
        net.bn2.bias[0] = float('inf')
    before, classes = copy.deepcopy(net.state_dict()), [type(m) for m in net.modules()]
    with pytest.raises(ValueError, match='act2 are not finite'):
        convert_ann(net, x, rule=rule)
    assert [type(m) for m in net.modules()] == classes
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize('kwargs, message', [
    (dict(rule='maximum'), "rule='maximum': must be one of ltb, percentile, spike_norm"),
    (dict(rule='rms'), "rule='rms'"), (dict(rule=nn.ReLU), 'rule='), (dict(rule=3), 'rule=3'),
    (dict(factor=0.), 'factor=0.0'), (dict(factor=float('inf')), 'factor=inf'),
    (dict(rule='ltb', percentile=99.), "percentile=99.0: is of rule='percentile'"),
    (dict(percentile=0.), 'percentile=0')])
def test_bad_arguments_of_convert_ann_are_named(kwargs, message):
    net = _net()
    with pytest.raises((ValueError, TypeError), match=message):
        convert_ann(net, _images(2, 1, 2, 3), **kwargs)
    assert type(net) is _Plain and type(net.act1) is nn.ReLU


@pytest.mark.parametrize('kwargs, message', [
    (dict(rule='max'), "rule='max': must be one of rms, ltb"),
    (dict(rule='percentile'), "rule='percentile'.*spike_norm"), (dict(factor=-1.), 'factor=-1')])
def test_bad_arguments_of_calibrate_are_named(kwargs, message):
    model = convert_to_spiking(_net(), input_size=(1, 2, 3))
    with pytest.raises(ValueError, match=message):
        calibrate(model, _images(2, 1, 2, 3), **kwargs)
    assert model.act1.gain is None


class _Constant(ThresholdRule):
    def __init__(self, value=3.):
        self.value = value

    def measure(self, x, axis):
        self.like = x

    def threshold(self):
        return self.like.new_tensor(self.value)


def test_rule_of_ones_own_by_name_class_and_partial():
    x = _images(2, 1, 2, 3)
    assert convert_ann(_net(), x, rule=_Constant).act1.scale == 3.
    assert convert_ann(_net(), x, rule=partial(_Constant, value=2.)).act3.scale == 2.
    register_threshold_rule('test_constant')(_Constant)
    try:
        assert 'test_constant' in list_threshold_rules()
        assert convert_ann(_net(), x, rule='test_constant').act2.scale == 3.
    finally:
        unregister_threshold_rule('test_constant')
    assert 'test_constant' not in list_threshold_rules()
    with pytest.raises(TypeError, match='ThresholdRule'):
        register_threshold_rule('test_relu')(nn.ReLU)
