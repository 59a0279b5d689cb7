"""A model that activates a feature once more to return it (timm's nasnet, pnasnet, xception): which neuron that is."""
import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from timm_sscl import calibrate, convert_to_spiking

T, B = 3, 2


class _Cell(nn.Module):
    """Activates its input, as nasnet's cells do."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.act = nn.ReLU()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)

    def forward(self, x):
        return self.conv(self.act(x))


class _Net(nn.Module):
    """The smallest model with the methods of pnasnet that matter here."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.cell_0 = _Cell(4, 6)
        self.cell_1 = _Cell(6, 8)
        self.act = nn.ReLU()
        self.fc = nn.Linear(8, 5)
        self.layers = ['stem', 'cell_0', 'cell_1']
        self.feature_info = [dict(num_chs=4, module='cell_0.act'), dict(num_chs=6, module='cell_1.act'),
                             dict(num_chs=8, module='act')]

    def forward_intermediates(self, x, indices=(0, 1, 2), intermediates_only=False):
        features = []
        for i, name in enumerate(self.layers):
            x = getattr(self, name)(x)
            if i in indices:
                features.append(F.relu(x))
        return features if intermediates_only else (x, features)

    def forward_features(self, x):
        for name in self.layers:
            x = getattr(self, name)(x)
        return self.act(x) if len(self.layers) == 3 else F.relu(x)

    def forward_head(self, x):
        return self.fc(x.mean((2, 3)))

    def forward(self, x):
        return self.forward_head(self.forward_features(x))

    def prune_intermediate_layers(self, indices, prune_head=True):
        for name in self.layers[max(indices) + 1:]:
            setattr(self, name, None)
        self.layers, self.fc = self.layers[:max(indices) + 1], nn.Identity()
        return list(indices)


@pytest.fixture
def images():
    return torch.randn(B, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def spiking(images):
    model = convert_to_spiking(_Net().eval(), T)
    calibrate(model, images)
    return model.eval()


@pytest.mark.parametrize('index', [0, 1])
@torch.no_grad()
def test_a_pruned_model_keeps_the_neurons_of_its_features(spiking, images, index):
    expected = spiking.forward_intermediates(images, indices=[index], intermediates_only=True)[0]
    assert 0 < expected.mean() < 1
    pruned = copy.deepcopy(spiking)
    assert pruned.prune_intermediate_layers([index]) == [index]
    for model in (pruned, copy.deepcopy(pruned)):
        assert torch.equal(model.forward_intermediates(images, indices=[index], intermediates_only=True)[0], expected)
        assert torch.equal(model.forward_features(images).unflatten(0, (T, B)).mean(0), expected)
        assert torch.allclose(model(images), expected.mean((2, 3)), atol=1e-6)  # float32, means in another order


@torch.no_grad()
def test_neurons_of_a_pruned_model_follow_its_settings(spiking, images):
    spiking.set_timesteps(5)
    expected = spiking.forward_intermediates(images, indices=[1], intermediates_only=True)[0]
    spiking.set_timesteps(T)
    spiking.prune_intermediate_layers([1])
    spiking.set_timesteps(5)
    assert torch.equal(spiking.forward_intermediates(images, indices=[1], intermediates_only=True)[0], expected)


@pytest.mark.parametrize('name', ['stem', 'cell_1.conv'])
def test_a_function_inside_of_a_layer_is_none_of_these(name):
    """It runs in forward, where the model itself calls none; a neuron of a feature would take its place in silence."""
    model = _Net()
    layer = model.get_submodule(name)
    forward = layer.forward
    layer.forward = lambda x: torch.tanh(forward(x))
    with pytest.raises(ValueError, match=f'unknown: tanh in {name}'):
        convert_to_spiking(model, T)


def test_a_function_on_what_is_no_feature_is_named(spiking, images):
    spiking.stem = nn.Conv2d(3, 7, 3)
    with pytest.raises(RuntimeError, match='on 7 channels, where it has no feature'):
        spiking.forward_intermediates(images, indices=[0])
