"""deploy: a model for int8 inference computes what the model computes, but for the rounding of weights."""
import copy
import io

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

from timm_sscl import FiringRates, calibrate, convert_to_spiking
from timm_sscl.export import DeployReport, deploy, int8_missing
from timm_sscl.export import layers
from timm_sscl.export.int8 import split_weight
from timm_sscl.export.layers import Int8Conv2d, Int8Linear
from timm_sscl.export.levels import Levels

T, B, K = 4, 4, 5

needs_int8 = pytest.mark.skipif(int8_missing() is not None, reason=f'no int8 kernels: {int8_missing()}')


class _Net(nn.Module):
    """Each kind of layer that takes spikes: pooled by maximum and mean, summed with a current, flattened, in groups."""

    def __init__(self):
        super().__init__()
        self.conv1, self.act1, self.pool1 = nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        self.conv2, self.bn2, self.act2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        self.conv3, self.act3, self.pool3 = nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)
        self.conv4, self.act4 = nn.Conv2d(16, 8, 3, stride=2, groups=2), nn.ReLU()
        self.fc5, self.act5, self.head = nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, K)

    def forward(self, x):
        x = self.pool1(self.act1(self.conv1(x)))
        y = self.act2(self.bn2(self.conv2(x)))
        y = self.conv3(y)
        y += x
        x = self.act4(self.conv4(self.pool3(self.act3(y))))
        return self.head(self.act5(self.fc5(x.flatten(1))))


def _make_dyadic(model, generator):
    """Set weights to k / 2^m with k up to 127, norms to powers of two, so that nothing is rounded anywhere."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            levels = torch.randint(-127, 128, module.weight.shape, generator=generator).flatten(1)
            levels[:, 0] = 127  # the largest of every channel, so that a level is 1 / 2^m
            fan_in = levels.shape[1]
            size = 2. ** -round(6 + torch.tensor(fan_in / 4.).log2().item() / 2)
            module.weight.data = (levels * size).view(module.weight.shape)
            if module.bias is not None:
                module.bias.data = torch.randint(0, 33, module.bias.shape, generator=generator) / 64
        elif isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-30
            module.running_var.fill_(.25)
            module.running_mean.copy_(torch.randint(-8, 9, module.running_mean.shape, generator=generator) / 16)
            module.weight.data = 2. ** torch.randint(-2, 1, module.weight.shape, generator=generator)
            module.bias.data = torch.randint(-8, 9, module.bias.shape, generator=generator) / 32


def _dyadic(neuron='lif', seed=0, **neuron_kwargs):
    """A model and images in which float32 is exact."""
    generator = torch.Generator().manual_seed(seed)
    net = _Net()
    _make_dyadic(net, generator)
    model = convert_to_spiking(net.eval(), timesteps=T, neuron=neuron, neuron_kwargs=neuron_kwargs)
    return model, torch.randint(-16, 17, (B, 3, 12, 12), generator=generator) / 16


@needs_int8
@torch.no_grad()
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('neuron, kwargs', [
    ('lif', dict(tau=.5)), ('lif', dict(tau=.5, v_reset=None)), ('if', {}), ('ternary', dict(tau=.5)),
    ('ilif', dict(tau=.5))])
def test_exact_on_dyadic_weights(neuron, kwargs, memory_format):
    model, images = _dyadic(neuron, **kwargs)
    model.act1.set_gain(torch.tensor(2.), torch.tensor(1.))
    model.act2.set_gain(torch.tensor(.5), torch.tensor(2.))
    with FiringRates(model) as rates:
        expected = model(images, per_step=True)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    deployed = deploy(model, images[:1])
    assert set(deployed.deploy_report.int8) == {'conv2', 'conv3', 'conv4', 'fc5', 'head'}
    assert set(deployed.deploy_report.float32) == {'conv1'}
    assert all(.02 < rate < .98 for rate in rates.per_layer().values()), rates.per_layer()
    result = deployed(images.contiguous(memory_format=memory_format), per_step=True)
    assert torch.equal(result, expected)
    assert expected.std() > .1
    assert torch.equal(deployed(images), model(images))
    # the model itself stays as it was
    assert type(model.conv2) is nn.Conv2d and isinstance(model.bn2, nn.BatchNorm2d)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(model(images, per_step=True), expected)


@needs_int8
@torch.no_grad()
def test_spikes_are_bytes():
    model, images = _dyadic(tau=.5)
    ternary, _ = _dyadic('ternary', tau=.5)
    for net, dtype in ((model, torch.uint8), (ternary, torch.int8)):
        deployed, seen = deploy(net, images[:1]), {}
        for name in ('act1', 'pool1', 'act2', 'act3', 'pool3', 'act4', 'act5', 'conv1', 'conv2'):
            deployed.get_submodule(name).register_forward_hook(
                lambda m, args, out, name=name: seen.__setitem__(name, out.dtype))
        deployed(images)
        assert {name for name, d in seen.items() if d == dtype} == set(seen) - {'conv1', 'conv2'}
        assert seen['conv1'] == seen['conv2'] == torch.float32


@needs_int8
@torch.no_grad()
def test_input_of_int8_layers_is_whole_in_values():
    """What follows from the functions agrees with the values that a forward really has."""
    for name, size, options in (('test_resnet', 32, {}), ('resnet18', 32, dict(residual='sew')), ('test_vit', 160, {}),
                                ('vgg16_cifar', 32, dict(width=8)), ('test_efficientnet', 32, {})):
        torch.manual_seed(0)
        model = timm.create_model(f'spiking_{name}', num_classes=K, timesteps=2, **options).eval()
        images = torch.randn(2, 3, size, size)
        calibrate(model, images)
        deployed = deploy(model, images[:1])
        layers_ = {n: m for n, m in deployed.named_modules() if isinstance(m, (Int8Conv2d, Int8Linear))}
        assert set(layers_) == set(deployed.deploy_report.int8)
        checked = []
        for n, layer in layers_.items():
            def check(m, args, n=n):
                x = args[0] if not args[0].is_floating_point() else args[0] * m.levels.parts
                assert (x == x.round()).all() and m.levels.low <= x.min() and x.max() <= m.levels.high, n
                checked.append(n)
            layer.register_forward_pre_hook(check)
        assert deployed(images).isfinite().all()
        assert set(checked) == set(layers_), name
        assert len(layers_) > 4 or name == 'test_vit', (name, len(layers_))


@needs_int8
@torch.no_grad()
def test_one_layer_against_float64():
    generator = torch.Generator().manual_seed(0)
    for levels, groups in ((Levels(0, 1), 1), (Levels(-1, 1), 4), (Levels(0, 128), 1), (Levels(0, 4, 4), 16)):
        weight = torch.randn(16, 16 // groups, 3, 3, generator=generator)
        bias = torch.randn(16, generator=generator)
        layer = Int8Conv2d(weight, bias, levels, layers.Geometry((2, 1), (1, 0), (1, 2), groups)).eval()
        whole = torch.randint(levels.low, levels.high + 1, (3, 16, 9, 9), generator=generator)
        exact = layer.weight.double() * layer.weight_scale.double().view(-1, 1, 1, 1)
        assert (exact - weight).abs().amax((1, 2, 3)).le(layer.weight_scale / 2 * (1 + 1e-5)).all()
        expected = F.conv2d(whole.double() / levels.parts, exact, bias.double(), (2, 1), (1, 0), (1, 2), groups)
        # the sums are whole numbers; what rounds is their product with the scale, and the sum with the bias
        bound = 4 * torch.finfo(torch.float32).eps * expected.abs().max()
        for x in (whole.to(levels.dtype), whole / levels.parts, whole.to(levels.dtype)[:, :, :7]):
            rows = F.conv2d(x.double() / (levels.parts if not x.is_floating_point() else 1), exact, bias.double(),
                            (2, 1), (1, 0), (1, 2), groups)
            assert (layer(x).double() - rows).abs().max() <= bound


def test_quantized_weight():
    weight = torch.tensor([[[-1., .5], [.25, .0]], [[0., 0.], [0., 0.]], [[3., -6.], [1e-3, 2.]]])
    (levels,), scale = split_weight(weight, 1)
    assert levels.dtype == torch.int8 and levels.shape == weight.shape
    assert levels[0].tolist() == [[-127, 64], [32, 0]] and not levels[1].any() and levels[2, 0, 1] == -127
    assert torch.equal(scale, torch.tensor([1 / 127, 1., 6 / 127]))


@needs_int8
@torch.no_grad()
def test_copies_and_checkpoints(tmp_path):
    model, images = _dyadic(tau=.5)
    deployed = deploy(model, images[:1])
    expected = deployed(images)
    assert deployed.conv2.weight.dtype == torch.int8 and 'conv2.weight_scale' in deployed.state_dict()
    torch.save(deployed, tmp_path / 'deployed.pth')
    loaded = torch.load(tmp_path / 'deployed.pth', weights_only=False)
    assert loaded.deploy_report == deployed.deploy_report
    for copied in (copy.deepcopy(deployed), loaded, copy.deepcopy(copy.deepcopy(deployed))):
        assert torch.equal(copied(images), expected)
    state = io.BytesIO()
    torch.save(deployed.state_dict(), state)
    other = deploy(_dyadic(seed=1, tau=.5)[0], images[:1])
    assert not torch.equal(other(images), expected)  # it has run, and packed its own weights
    state.seek(0)
    other.load_state_dict(torch.load(state))
    assert torch.equal(other(images), expected)
    # other shapes and numbers of images and timesteps after the first call
    larger = torch.randint(-16, 17, (2, 3, 12, 12)) / 16
    assert torch.equal(deployed(larger), model(larger)) and torch.equal(deployed(images), expected)
    assert torch.equal(deployed.set_timesteps(2)(images), copy.deepcopy(model).set_timesteps(2)(images))


@needs_int8
@torch.no_grad()
def test_export():
    model, images = _dyadic(tau=.5)
    deployed = deploy(model, images[:1])
    expected = deployed(images)
    program = torch.export.export(deployed, (images,))
    assert torch.equal(program.module()(images), expected)
    assert torch.equal(deployed(images), expected)
    assert program.state_dict['conv2.weight'].dtype == torch.int8


@torch.no_grad()
def test_without_int8(monkeypatch, caplog):
    model, images = _dyadic(tau=.5)
    expected = model(images)
    there = deploy(model, images[:1])  # on a machine with int8, if this is one
    monkeypatch.setattr('timm_sscl.export.int8.int8_missing', lambda: 'no such kernels')
    assert torch.equal(there(images), expected)
    here = deploy(model, images[:1])
    assert 'no such kernels' in caplog.text and 'float32' in caplog.text
    assert here.deploy_report.missing == 'no such kernels' and 'no such kernels' in str(here.deploy_report)
    assert not here.deploy_report.int8 and isinstance(here.conv2, nn.Conv2d)
    assert torch.equal(here(images), expected)


class _Odd(nn.Module):
    """Spikes that something else than an int8 layer takes."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.act = nn.ModuleList(nn.ReLU() for _ in range(5))
        self.maps = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(4))
        self.head = nn.Linear(8, K)

    def forward(self, x):
        x = self.act[0](self.conv(x))
        x = self.act[1](self.maps[0](x)).to(x.dtype)  # reads a dtype
        x = self.act[2](self.maps[1](x * 1))
        y = self.maps[2](x)
        x += y  # writes to spikes in place
        x = self.act[3](F.conv2d(x, self.maps[3].weight))  # a map of another module
        return self.head(self.act[4](x).mean((2, 3)))


@needs_int8
@torch.no_grad()
def test_neurons_write_values_where_something_else_takes_them():
    torch.manual_seed(0)
    net = _Odd()
    _make_dyadic(net, torch.Generator().manual_seed(0))
    model = convert_to_spiking(net.eval(), timesteps=T, tau=.5, allow_analog=True)
    images = torch.randint(-16, 17, (B, 3, 8, 8)) / 16
    deployed = deploy(model, images[:1])
    report = deployed.deploy_report
    assert set(report.int8) == {'maps.0', 'maps.2'}
    assert set(report.values) == {f'act.{i}' for i in range(5)} and not report.levels
    assert 'dtype' in report.values['act.0'] and 'add_' in report.values['act.2'] or '__iadd__' in report.values[
        'act.2']
    assert torch.equal(deployed(images), model(images))


@needs_int8
def test_is_for_inference():
    model, images = _dyadic(tau=.5)
    deployed = deploy(model, images[:1])
    with pytest.raises(RuntimeError, match='Int8Conv2d has no gradients.*inference'):
        deployed.train()(images)
    assert torch.equal(deployed.eval()(images), model(images))
    with pytest.raises(RuntimeError, match=r'computes in float32, this one was cast to torch\.float64'):
        copy.deepcopy(deployed).double()(images.double())
    with pytest.raises(ValueError, match='_Net does not spike'):
        deploy(_Net(), images)


@needs_int8
@torch.no_grad()
def test_report_says_what_stayed():
    torch.manual_seed(0)
    model = timm.create_model('spiking_resnet18', num_classes=K, timesteps=2, neuron='liaf').eval()
    report = deploy(model, torch.randn(1, 3, 32, 32)).deploy_report
    assert not report.int8 and 'analog' in report.float32['layer1.0.conv1'] and 'analog' in report.values['act1']
    model = timm.create_model('spiking_test_vit', num_classes=K, timesteps=2).eval()
    report = deploy(model).deploy_report
    assert any('norm' in why for why in report.float32.values())
    assert 'int8' in str(report) and all(name in str(report) for name in report.float32)


def test_report_counts_layers_that_run_in_float32():
    report = DeployReport(weight_bits=24, int8={'a': '', 'b': '', 'c': ''}, float32={'d': 'analog'})
    assert '3 of 4 convolutions and linear maps in int8 (24 bits), ' in str(report)
    report.faster_in_float32 = ('a', 'b')
    assert '3 of 4 convolutions and linear maps with int8 weights (24 bits), 1 of them compute in int8' in str(report)
    assert ' and 2 in float32' in str(report).splitlines()[0] and 'where that is faster: a, b' in str(report)
