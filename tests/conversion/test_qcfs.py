"""QCFS: the activation against its formula, the neuron that convert_ann makes of it, and the one-call replacement."""
import copy
import math

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

from timm_sscl import LIF, convert_ann, convert_to_qcfs, convert_to_spiking
from timm_sscl.conversion import QCFS

K = 5


class _One(nn.Module):
    """One layer of QCFS behind a linear map, and a classifier."""

    def __init__(self, levels, threshold):
        super().__init__()
        self.fc, self.act, self.head = nn.Linear(4, 6), QCFS(levels, threshold), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.act(self.fc(x.flatten(1))))


def _formula(x, threshold, levels):
    """Slow reference in Python's own numbers."""
    return threshold * min(max(math.floor(x * levels / threshold + .5) / levels, 0.), 1.)


def _neuron(timesteps, threshold, x):
    """Mean output of the neuron of convert_ann for a constant current."""
    lif = LIF(timesteps, tau=1., v_threshold=1., v_reset=None, v_init=.5)
    lif.set_gain(1 / threshold, threshold)
    return lif(x.repeat(timesteps, *[1] * (x.ndim - 1))).unflatten(0, (timesteps, -1)).mean(0)


@pytest.mark.parametrize('levels, threshold', [(1, 1.), (4, 1.), (8, 8.), (5, .7)])
def test_output_is_the_formula(levels, threshold):
    x = torch.linspace(-2.03, 11.02, 523, dtype=torch.float64)
    expected = [_formula(value, threshold, levels) for value in x.tolist()]
    y = QCFS(levels, threshold).double()
    y.threshold.data.fill_(threshold)  # float32 rounds .7
    assert torch.allclose(y(x), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)
    assert y(x).unique().numel() == levels + 1


@pytest.mark.parametrize('x, expected', [(.3, .25), (.125, .25), (.9, 1.), (.124, 0.), (-1., 0.), (7., 1.)])
def test_both_sides_by_hand(x, expected):
    """T = L = 4, threshold 1: exactly equal."""
    x = torch.tensor([x], dtype=torch.float64)
    assert QCFS(4, 1.).double()(x).item() == expected
    assert _neuron(4, torch.tensor(1., dtype=torch.float64), x).item() == expected


def test_gradients_are_those_of_the_clip():
    """The floor passes the gradient: dy/dx is 1 inside (0, threshold), dy/dthreshold is (y - x) / threshold inside
    and 1 above.
    """
    x = torch.tensor([-.4, .3, 1.1, 1.7, 2.5], dtype=torch.float64, requires_grad=True)
    act = QCFS(4, 2.).double()
    for i, value in enumerate(x.tolist()):
        x.grad, act.threshold.grad = None, None
        y = act(x)[i]
        y.backward()
        assert x.grad[i] == (1. if 0 < value < 2 else 0.)
        expected = 0. if value < 0 else 1. if value > 2 else (y.item() - value) / 2
        assert act.threshold.grad.item() == pytest.approx(expected, abs=1e-15)


def test_one_layer_equals_its_neurons_to_the_bit():
    """Dyadic weights, inputs and threshold: every sum is exact in float32, so both networks give the same bits."""
    torch.manual_seed(0)
    ann = _One(levels=8, threshold=2.)
    for parameter in (*ann.fc.parameters(), *ann.head.parameters()):
        parameter.data = torch.randint(-16, 17, parameter.shape) / 16
    x = torch.randint(-16, 17, (64, 1, 2, 2)) / 8
    expected = ann(x)
    assert len(ann.act(ann.fc(x.flatten(1))).unique()) > 5
    model = convert_ann(copy.deepcopy(ann), x, timesteps=8)
    assert model.act.scale == 2. and model.act.gain == .5 and model.settings.v_init == .5
    assert torch.equal(model(x), expected)
    assert not torch.equal(model.set_timesteps(3)(x), expected)


def test_neuron_is_spikingjellys():
    neuron = pytest.importorskip('spikingjelly.activation_based.neuron')
    if not hasattr(neuron, 'HalfThresholdIFNode'):
        pytest.skip('needs SpikingJelly 2')
    x = torch.randn(12, 7, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + .4
    theirs = neuron.HalfThresholdIFNode(v_threshold=1., step_mode='m')
    theirs.reset()
    threshold = torch.tensor(.5, dtype=torch.float64)
    lif = LIF(12, tau=1., v_threshold=1., v_reset=None, v_init=.5)
    lif.set_gain(1 / threshold, threshold)
    assert torch.equal(lif(x.flatten(0, 1)).view(12, 7, 9), theirs(x / threshold) * threshold)


def test_convert_ann_reads_the_thresholds():
    """QCFS layers use what they learned, with any rule; a ReLU beside them is measured."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), QCFS(4, 1.), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), QCFS(4, 2.))
    net[1].threshold.data.fill_(.625)
    x = torch.randn(8, 3, 8, 8)
    for rule in ('percentile', 'ltb', 'spike_norm'):
        model = convert_ann(copy.deepcopy(net).eval(), x, 4, rule=rule, factor=.5)
        assert model[1].scale == .625 and model[5].scale == 2. and model[3].scale.shape == (4, 1, 1)
    measured = net[3](net[2](net[1](net[0](x)))).amax((0, 2, 3))
    model = convert_ann(copy.deepcopy(net).eval(), x, 4)
    assert torch.allclose(model[3].scale.flatten(), measured, rtol=1e-5)  # convolutions of another batch size


@pytest.mark.parametrize('value', [0., -1., float('nan'), float('inf')])
def test_learned_threshold_that_no_neuron_can_have(value):
    net = _One(4, 1.)
    net.act.threshold.data.fill_(value)
    with pytest.raises(ValueError, match='QCFS act has learned the threshold'):
        convert_ann(net, torch.randn(2, 1, 2, 2))
    assert type(net) is _One and type(net.act) is QCFS
    spiking = convert_to_spiking(_One(4, 1.), input_size=(1, 2, 2))
    spiking.load_state_dict(net.state_dict())
    with pytest.raises(ValueError, match='QCFS act has learned the threshold'):
        convert_ann(spiking, torch.randn(2, 1, 2, 2))


def test_weights_loaded_into_the_spiking_model_bring_the_thresholds():
    """The ANN's state dict has the learned thresholds; the spiking model keeps them for convert_ann."""
    ann, fresh, x = _One(4, 1.), _One(4, 1.), torch.randn(4, 1, 2, 2)
    ann.act.threshold.data.fill_(.75)
    spiking = convert_to_spiking(fresh, input_size=(1, 2, 2))
    spiking.load_state_dict(ann.state_dict(), strict=True)
    assert convert_ann(spiking, x, 4).act.scale == .75


# ---- the one-call replacement

def test_replaces_every_relu_of_a_timm_model():
    torch.manual_seed(0)
    model = timm.create_model('resnet20_cifar', width=4, num_classes=K)
    relus = {name for name, module in model.named_modules() if type(module) is nn.ReLU}
    calls, keys = [], set(model.state_dict())
    handle = model.act1.register_forward_hook(lambda *_: calls.append(1))
    assert convert_to_qcfs(model, levels=4, threshold=2.) is model
    assert {name for name, module in model.named_modules() if isinstance(module, QCFS)} == relus
    assert set(model.state_dict()) - keys == {f'{name}.threshold' for name in relus}
    assert all(model.get_submodule(name).threshold == 2. and model.get_submodule(name).levels == 4 for name in relus)
    x = torch.randn(4, 3, 32, 32)
    model.train()(x).sum().backward()
    handle.remove()
    model(x)
    assert calls == [1] and all(p.grad is not None for p in model.parameters())
    twin = convert_to_qcfs(timm.create_model('resnet20_cifar', width=4, num_classes=K), 4)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin.eval()(x), model.eval()(x))


def test_trained_network_converts():
    """A step of training moves the thresholds; the spiking network has them and loads from its checkpoint."""
    torch.manual_seed(0)
    model = convert_to_qcfs(timm.create_model('test_resnet', num_classes=K), 4, 1.)
    x, y = torch.randn(8, 3, 32, 32), torch.arange(8) % K
    optimizer = torch.optim.SGD(model.parameters(), lr=.05)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    learned = {name: module.threshold.item() for name, module in model.named_modules() if isinstance(module, QCFS)}
    assert len(set(learned.values())) == len(learned)  # all have moved
    spiking = convert_ann(model.eval(), x, 4).eval()
    assert {name: lif.scale.item() for name, lif in spiking.neurons().items()} == learned
    assert {record.was for record in spiking.spiking_report().neurons} == {'QCFS'}
    loaded = timm.create_model('spiking_test_resnet', num_classes=K)
    loaded.load_state_dict(spiking.state_dict())
    assert torch.equal(loaded.eval()(x), spiking(x))


class _Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return F.relu(self.conv(x))


@pytest.mark.parametrize('create, message', [
    (_Functional, r'functional_act \(relu\) is a function call'), (lambda: nn.Linear(3, 3), 'no ReLU'),
    (lambda: timm.create_model('test_vit', img_size=32), 'GELU'), (lambda: timm.create_model('seresnet18'), 'Sigmoid'),
    (lambda: _One(4, 1.), 'already'), (lambda: convert_to_spiking(timm.create_model('test_resnet')), 'no ReLU')])
def test_networks_that_cannot_be_replaced_are_refused(create, message):
    model = create()
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        convert_to_qcfs(model)
    assert [(name, type(module)) for name, module in model.named_modules()] == before


@pytest.mark.parametrize('kwargs, message', [
    (dict(levels=0), 'levels=0'), (dict(levels=2.5), 'levels=2.5'), (dict(levels=True), 'levels=True'),
    (dict(threshold=0.), 'threshold=0.0'), (dict(threshold=float('nan')), 'threshold=nan')])
def test_bad_arguments_are_named(kwargs, message):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    for call in (lambda: QCFS(**kwargs), lambda: convert_to_qcfs(model, **kwargs)):
        with pytest.raises(ValueError, match=message):
            call()
    assert type(model[1]) is nn.ReLU


def test_half_precision_copy_and_repr():
    act = QCFS(4, 2.)
    assert act.bfloat16()(torch.randn(3).bfloat16()).dtype == torch.bfloat16
    assert copy.deepcopy(act).levels == 4 and 'levels=4' in repr(act)
