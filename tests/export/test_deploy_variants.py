"""deploy of models with norm variants and neurons of one's own: the model itself, but for the rounding of weights."""
import copy

import pytest
import torch
import torch.nn as nn

from timm_sscl import LIF, convert_to_spiking, fold_gains, fold_norms, register_neuron
from timm_sscl.export import deploy, int8_missing
from timm_sscl.export.layers import Int8Conv2d
from timm_sscl.neurons import unregister_neuron

pytestmark = pytest.mark.skipif(int8_missing() is not None, reason=f'no int8 kernels: {int8_missing()}')


class LateLIF(LIF):
    """A LIF with a threshold three times as high."""

    @staticmethod
    def step(x, state, constants, t, settings):
        return LIF.step(x / 3, state, constants, t, settings)


@pytest.fixture
def late_lif():
    register_neuron('late_lif')(LateLIF)
    yield
    unregister_neuron('late_lif')


class _Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.act1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.conv2, self.bn2, self.act2 = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8), nn.ReLU()
        self.conv3, self.act3, self.head = nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Linear(8, 5)

    def forward(self, x):
        x = self.act1(self.bn1(self.conv1(x)))
        x = x + self.act2(self.bn2(self.conv2(x)))
        return self.head(self.act3(3 * self.conv3(x)).mean((2, 3)))


def _trained(**options):
    """A model whose norms have statistics and parameters of their own, of both signs."""
    torch.manual_seed(0)
    model = convert_to_spiking(_Net(), timesteps=3, **options).train()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=.3)
        for _ in range(5):
            model(torch.randn(8, 3, 12, 12))
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize('options', [
    *(dict(norm=norm) for norm in ('tdbn', 'tebn', 'bntt', 'tab', 'mpbn')), dict(neuron='late_lif')],
    ids=lambda options: ''.join(options.values()))
def test_as_the_folded_model_with_rounded_weights(late_lif, options):
    model, images = _trained(**options), torch.randn(4, 3, 12, 12)
    deployed, rounded = deploy(model, images[:1]), fold_norms(fold_gains(copy.deepcopy(model), images), images)
    for name, layer in deployed.named_modules():
        if isinstance(layer, Int8Conv2d):
            rounded.get_submodule(name).weight.copy_(layer.float_weight())
    for timesteps in (3, 1, 5):
        expected = rounded.double().set_timesteps(timesteps)(images.double(), per_step=True).float()
        # a potential within float32 rounding of the threshold may fire or not: one spike is 1 / 144 of a mean
        torch.testing.assert_close(deployed.set_timesteps(timesteps)(images, per_step=True), expected,
                                   rtol=0, atol=.02)
        assert expected.std() > .1
    assert set(deployed.deploy_report.levels) or options.get('norm') in ('bntt', 'tab')


@torch.no_grad()
@pytest.mark.parametrize('surrogate', ['rectangle', 'atan'])
def test_step_of_ones_own_is_what_runs(surrogate):
    neuron, x = LateLIF(3, surrogate=surrogate), 3 * torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(neuron(x), LIF(3, surrogate=surrogate)(x / 3))
    assert not torch.equal(neuron(x), LIF(3, surrogate=surrogate)(x))


class _Masked(_Net):
    def forward(self, x):
        current = self.conv1(x)
        return self.head(self.act3(self.conv3(self.act1(current) + (current > 0))).mean((2, 3)))


@torch.no_grad()
def test_sum_of_spikes_and_truth_values():
    torch.manual_seed(0)
    model = convert_to_spiking(_Masked(), timesteps=3, allow_analog=True).eval()
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(deploy(model, images)(images), model(images))  # nothing takes known spikes


@torch.no_grad()
def test_hooks_are_left_out_of_every_layer(caplog):
    """Whether a layer is in int8 or not, and whatever its hook changes."""
    torch.manual_seed(0)
    model = convert_to_spiking(_Net(), timesteps=3).eval()
    images, plain = torch.randn(2, 3, 8, 8), copy.deepcopy(model)
    for name in ('conv1', 'conv2', 'act1', 'head'):
        model.get_submodule(name).register_forward_hook(lambda module, args, out: out * .5)
    deployed = deploy(model, images)
    assert 'those of conv1, act1, conv2, head were left out' in caplog.text
    assert torch.equal(deployed(images), deploy(plain, images)(images))
    assert len(model.conv1._forward_hooks) == 1
