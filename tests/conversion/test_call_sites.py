"""One ReLU that runs several times: a neuron per call, as in the same network with a ReLU of its own for each."""
import copy
import io
import pickle

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import Bottleneck, ResNet

from timm_sscl import calibrate, convert_ann, convert_to_spiking

T, K = 4, 5


class _OwnReLUs(Bottleneck):
    """torchvision's block with three ReLUs instead of one."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.relu1, self.relu2, self.relu3 = nn.ReLU(), nn.ReLU(), nn.ReLU()
        del self.relu

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(out)))
        return self.relu3(self.bn3(self.conv3(out)) + identity)


def _resnet(block=Bottleneck):
    torch.manual_seed(0)
    net = ResNet(block, [1, 1, 1, 1], num_classes=K, width_per_group=16)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, .5, 2.)
            nn.init.normal_(module.bias)
    return net.double().eval()


def _images(n=6, seed=1):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope='module')
def pair():
    """The same network with shared ReLUs and with separate ones, both converted."""
    return convert_ann(_resnet(), _images(), T), convert_ann(_resnet(_OwnReLUs), _images(), T)


def test_thresholds_are_those_of_separate_relus(pair):
    shared, separate = pair
    assert torch.equal(shared(_images(seed=2)), separate(_images(seed=2)))
    for name, lif in separate.neurons().items():
        block, _, act = name.rpartition('.')
        twin = shared.neurons()[f'{block}.relu.{int(act[-1]) - 1}' if block else name]
        assert torch.equal(twin.scale, lif.scale) and torch.equal(twin.gain, lif.gain)
    assert len(shared.neurons()) == len(separate.neurons()) == 13
    report = shared.spiking_report()
    assert len(report.neurons) == 13 and {r.name for r in report.neurons} == set(shared.neurons())
    assert 'call 2 of 3' in next(r for r in report.neurons if r.name == 'layer1.0.relu.1').reason


def test_copies_and_checkpoints_keep_the_calls(pair):
    shared, x = pair[0], _images(2, seed=2)
    expected = shared(x)
    for twin in (copy.deepcopy(shared), pickle.loads(pickle.dumps(shared))):
        assert torch.equal(twin(x), expected)
    buffer = io.BytesIO()
    torch.save(shared.state_dict(), buffer)
    buffer.seek(0)
    fresh = convert_to_spiking(_resnet())
    fresh.load_state_dict(torch.load(buffer))
    assert torch.equal(fresh.eval()(x), expected) and fresh.settings == shared.settings
    fresh.load_state_dict(_resnet().state_dict(), strict=True)  # an ANN's weights load as before
    assert torch.equal(fresh(x), expected)
    fresh.load_state_dict(convert_to_spiking(_resnet(), timesteps=3).state_dict())  # one neuron per ReLU again
    assert len(fresh.neurons()) == 5 and fresh.timesteps == 3


def test_training_with_checkpointing_and_after_an_error(pair):
    shared, separate = copy.deepcopy(pair[0]).train(), copy.deepcopy(pair[1]).train()
    for bn in (m for model in (shared, separate) for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        bn.eval()
    block, x = shared.layer1[0], _images(2)
    broken = block.conv2.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        shared(x)
    broken.remove()
    forward = block.forward
    block.forward = lambda x: checkpoint(forward, x, use_reentrant=False)
    for model in (shared, separate):
        model(x).square().sum().backward()
    assert torch.equal(shared.conv1.weight.grad, separate.conv1.weight.grad) and shared.conv1.weight.grad.any()


class _Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3), nn.Conv2d(6, 6, 3)
        self.act1, self.act2, self.act3, self.head = nn.ReLU(), nn.ReLU(), nn.ReLU(), nn.Linear(6, K)

    def forward(self, x):
        x = self.act3(self.conv3(self.act2(self.conv2(self.act1(self.conv1(x))))))
        return self.head(x.mean((2, 3)))


class _ThreeNames(_Base):
    def __init__(self):
        super().__init__()
        self.act1 = self.act2 = self.act3


class _OneName(_Base):
    def forward(self, x):
        x = self.act1(self.conv3(self.act1(self.conv2(self.act1(self.conv1(x))))))
        return self.head(x.mean((2, 3)))


class _Functional(_Base):
    def forward(self, x):
        x = F.relu(self.conv3(F.relu(self.conv2(F.relu(self.conv1(x))))))
        return self.head(x.mean((2, 3)))


class _Sequential(_Base):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(self.conv1, self.act1, self.conv2, self.act1, self.conv3, self.act1)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


def _create(cls):
    torch.manual_seed(0)
    return cls().double().eval()


@pytest.mark.parametrize('cls', [_ThreeNames, _OneName, _Functional, _Sequential])
def test_ways_to_share_an_activation(cls):
    x = _images()
    expected, model = convert_ann(_create(_Base), x, T), convert_ann(_create(cls), x, T)
    assert torch.equal(model(_images(seed=2)), expected(_images(seed=2)))


@pytest.mark.parametrize('per_channel', [True, False])
def test_module_that_runs_twice_has_one_threshold(per_channel):
    """A block with shared weights: its neuron's threshold is the largest of both runs."""
    class Twice(_Base):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())

        def forward(self, x):
            return self.head(F.pad(self.block(self.block(self.conv1(x))).mean((2, 3)), (0, 2)))

    net, x = _create(Twice), _images()
    first = net.block(net.conv1(x))
    both = torch.cat([first, net.block(first)]).detach()
    model = convert_ann(net, x, T, per_channel=per_channel)
    assert torch.allclose(model.block[1].scale.flatten(), both.amax((0, 2, 3) if per_channel else (0, 1, 2, 3)))


class _Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(x)


class _After(_Base):
    """The ReLU of a submodule is called from outside as well."""

    def __init__(self):
        super().__init__()
        self.inner = _Inner()

    def forward(self, x):
        return self.head(self.inner.act(self.conv2(self.inner(self.conv1(x)))).mean((2, 3)))


class _Before(_After):
    def forward(self, x):
        return self.head(self.inner(self.conv2(self.inner.act(self.conv1(x)))).mean((2, 3)))


def test_calls_from_outside_of_the_holding_module():
    model = convert_ann(_create(_After), _images(), T)
    assert [model.inner.act[i].scale.numel() for i in range(2)] == [4, 6]
    net, x = _create(_Before), _images()
    before, keys, modules = net(x), list(net.state_dict()), [(m, type(m)) for m in net.modules()]
    with pytest.raises(ValueError, match='inner.act runs on 4 and 6 channels'):
        convert_ann(net, x, T)
    assert [(m, type(m)) for m in net.modules()] == modules and list(net.state_dict()) == keys
    assert torch.equal(net(x), before)
    assert convert_ann(net, x, T, per_channel=False).inner.act.scale.ndim == 0


def test_calibrate_measures_the_calls_one_by_one():
    """A neuron per call stays one after the thresholds are gone."""
    model = convert_ann(_create(_OneName), _images(), T)
    for lif in model.neurons().values():
        lif.set_gain()
    drives = calibrate(model, _images()).spiking_report().drives
    assert [drive.name for drive in drives] == ['act1.0', 'act1.1', 'act1.2']
