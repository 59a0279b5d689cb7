"""What a model writes in place, also through a view or by indices, is neither folded over nor taken for spikes."""
import copy

import pytest
import torch
import torch.nn as nn

from timm_sscl import convert_to_spiking, fold_gains, fold_norms
from timm_sscl.export import deploy
from timm_sscl.export.layers import Int8Conv2d


def _by_indices(x):
    x[:, :4] = .4
    return x


def _by_a_view(x):
    x.chunk(2, 1)[0].mul_(.37)
    return x


def _by_a_view_of_a_view(x):
    x.view(x.shape).unbind(0)[0].fill_(.4)
    return x


WRITES = [_by_indices, _by_a_view, _by_a_view_of_a_view]


class _Net(nn.Module):
    """Two convolutions with neurons. `writes` are functions that change a tensor at a place."""

    def __init__(self, **writes):
        super().__init__()
        self.conv1, self.act1 = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()
        self.norm, self.conv2, self.act2 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(.2, 1)
        self.head = nn.Linear(8, 5)
        self.writes = writes

    def _at(self, place, x):
        return self.writes[place](x) if place in self.writes else x

    def forward(self, x):
        x = self._at('spikes', self.act1(self._at('current', 3 * self.conv1(x))))
        return self.head(self.act2(self.norm(self._at('map', self.conv2(x)))).mean((2, 3)))


def _spiking(**writes):
    torch.manual_seed(0)
    return convert_to_spiking(_Net(**writes), timesteps=3).eval(), torch.randn(2, 3, 8, 8)


@torch.no_grad()
@pytest.mark.parametrize('write', WRITES)
@pytest.mark.parametrize('place', ['spikes', 'map'])
def test_folds(place, write):
    model, images = _spiking(**{place: write})
    model.act1.set_gain(None, torch.tensor(2.))
    model.act2.set_gain(torch.tensor(1.5), None)
    expected = model(images, per_step=True)
    for fold in (fold_gains, fold_norms):
        fold(model, images[:1])
        torch.testing.assert_close(model(images, per_step=True), expected)
    assert (model.act1.scale is None) == (place != 'spikes')
    assert isinstance(model.norm, nn.BatchNorm2d) == (place == 'map')


@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize('write', WRITES)
def test_deployed_model_takes_no_written_values_for_spikes(write, mode):
    model, images = _spiking(spikes=write)
    with mode():
        torch.testing.assert_close(
            deploy(model, images[:1].clone())(images, per_step=True), model(images, per_step=True))


class _Reader(_Net):
    """A model that reads the second convolution's weight outside of it."""

    def __init__(self, read):
        super().__init__()
        self.read = read

    def forward(self, x):
        x = 3 * self.conv2(self.act1(3 * self.conv1(x)))
        return self.head(self.act2(self.read(self.conv2.weight, x)).mean((2, 3)))


@torch.no_grad()
@pytest.mark.parametrize('read', [lambda w, x: x.to(w.dtype), lambda w, x: x * w.square().mean().sqrt()])
def test_deployed_model_reads_weights_elsewhere(read):
    torch.manual_seed(0)
    model, images = convert_to_spiking(_Reader(read), timesteps=3).eval(), torch.randn(2, 3, 8, 8)
    deployed = deploy(copy.deepcopy(model), images[:1])
    assert not isinstance(deployed.conv2, Int8Conv2d)
    torch.testing.assert_close(deployed(images, per_step=True), model(images, per_step=True))
