"""convert_ann: integrate-and-fire neurons against the ANN that they stand for."""
import copy
import io

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

from timm_sscl import LIF, calibrate, convert_ann, convert_to_spiking
from timm_sscl.conversion.from_ann.ann_obstacles import ann_obstacles

K = 5


class _Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.act1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.conv2, self.bn2, self.act2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.pool, self.head = nn.AvgPool2d(4), nn.Linear(32, K)

    def forward(self, x):
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.act2(self.bn2(self.conv2(x)) + x)
        return self.head(self.pool(x).flatten(1))


class _Functional(_Net):
    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)) + x)
        return self.head(self.pool(x).flatten(1))


def _ann(cls=_Net):
    torch.manual_seed(0)
    net = cls().double()
    for bn in (net.bn1, net.bn2):
        nn.init.uniform_(bn.running_var, .5, 2.)
        nn.init.normal_(bn.bias)
    return net.eval()


def _images(n=16):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize('timesteps', [1, 2, 5, 16])
def test_one_neuron_rounds_and_clips(timesteps):
    """Closed form: a constant current x gives threshold / T * clip(floor(x T / threshold + 1/2), 0, T)."""
    threshold = torch.tensor([.7, 3.], dtype=torch.float64)
    lif = LIF(timesteps, tau=1., v_threshold=1., v_reset=None, v_init=.5)
    lif.set_gain(1 / threshold, threshold)
    x = torch.linspace(-1.03, 4.02, 211, dtype=torch.float64)[:, None].expand(-1, 2)
    mean = lif(x.repeat(timesteps, 1)).unflatten(0, (timesteps, -1)).mean(0)
    expected = threshold / timesteps * (x * timesteps / threshold + .5).floor().clamp(0, timesteps)
    assert torch.allclose(mean, expected, rtol=0, atol=1e-12)  # round-off of T additions


@pytest.mark.parametrize('cls', [_Net, _Functional])
@pytest.mark.parametrize('per_channel', [True, False])
def test_approaches_the_ann(cls, per_channel):
    ann, x = _ann(cls), _images()
    expected = ann(x).detach()
    model = convert_ann(copy.deepcopy(ann), x, per_channel=per_channel)
    errors = []
    for timesteps in (1, 4, 16, 64, 256):
        model.set_timesteps(timesteps)
        errors.append(((model(x) - expected).norm() / expected.norm()).item())
    assert errors[0] > .1  # one step cannot tell
    # the rounding of each layer falls as 1 / T, up to the transient of the layers before it
    assert errors[2] < errors[0] / 4 and errors[4] < errors[0] / 40


def test_thresholds_are_the_activations_maxima_or_percentiles():
    ann, x = _ann(), _images(70)  # more than one chunk of 64
    a = ann.act1(ann.bn1(ann.conv1(x))).detach()
    per_channel = convert_ann(copy.deepcopy(ann), x).act1
    assert torch.allclose(per_channel.scale.flatten(), a.amax((0, 2, 3))) and per_channel.scale.shape == (8, 1, 1)
    assert torch.equal(per_channel.gain, 1 / per_channel.scale)
    per_layer = convert_ann(copy.deepcopy(ann), x, per_channel=False).act1
    assert per_layer.scale.ndim == 0 and torch.allclose(per_layer.scale, a.max())
    few = x[:60]
    quantile = convert_ann(copy.deepcopy(ann), few, percentile=90.).act1.scale.flatten()
    values = np.sort(a[:60].transpose(0, 1).flatten(1).numpy(), axis=1)
    expected = values[:, round(.9 * values.shape[1]) - 1]
    assert np.allclose(quantile.numpy(), np.where(expected > 0, expected, 1.))


def test_silent_channel_gets_a_threshold():
    ann = _ann()
    with torch.no_grad():
        ann.bn1.weight[0], ann.bn1.bias[0] = 0., -1.
    model = convert_ann(ann, _images())
    assert model.act1.scale.flatten()[0] == 1. and model(_images()).isfinite().all()


def test_from_a_spiking_model_with_the_anns_weights():
    ann, x = _ann(), _images()
    first = convert_ann(copy.deepcopy(ann), x, 8)
    spiking = convert_to_spiking(_ann(), timesteps=3, input_size=(3, 8, 8))
    spiking.load_state_dict(ann.state_dict())
    second = convert_ann(spiking, x, 8)
    assert second is spiking and second.timesteps == 8 and torch.equal(first(x), second(x))


def test_leaves_modes_hooks_and_random_state_alone():
    ann, calls = _ann().train(), []
    ann.bn1.eval()
    ann.act1.register_forward_hook(lambda *_: calls.append(1))
    state = torch.get_rng_state()
    before = {k: v.clone() for k, v in ann.state_dict().items()}
    model = convert_ann(ann, _images())
    assert model.training and not model.bn1.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    calls.clear()
    model(_images())
    assert calls == [1]


def test_checkpoint_restores_it_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    images = torch.randn(4, 3, 32, 32)
    model = convert_ann(timm.create_model('resnet18', num_classes=K), images, 4).eval()
    torch.save(model.state_dict(), tmp_path / 'if.pth')
    loaded = timm.create_model('spiking_resnet18', num_classes=K, checkpoint_path=str(tmp_path / 'if.pth')).eval()
    assert loaded.settings == model.settings and torch.equal(loaded(images), model(images))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(images), model(images))


def test_can_be_trained_on():
    model = convert_ann(_ann(), _images(), 2).train()
    model(_images()).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.head.parameters())
    assert model.conv1.weight.grad.any()


@pytest.mark.parametrize('name,parts', [
    ('test_vit', ['GELU', 'LayerNorm', 'Attention']), ('test_convnext', ['GELU', 'Norm']),
    ('seresnet18', ['Sigmoid']), ('mobilenetv3_small_050', ['Hardswish'])])
def test_networks_that_are_no_relu_networks_are_refused_by_part(name, parts):
    kwargs = dict(img_size=32) if 'vit' in name else {}
    model = timm.create_model(f'spiking_{name}', num_classes=K, **kwargs)
    with pytest.raises(ValueError) as error:
        convert_ann(model, torch.randn(2, 3, 32, 32))
    assert all(part in str(error.value) for part in parts) and 'initialisation' in str(error.value)
    assert 'does not apply' in str(model.spiking_report()) and model.spiking_report().obstacles == ann_obstacles(model)
    calibrate(model, torch.randn(2, 3, 32, 32))  # the model can still be used


@pytest.mark.parametrize('percentile', [0., -1., 101.])
def test_percentile_out_of_range(percentile):
    with pytest.raises(ValueError, match='percentile'):
        convert_ann(_ann(), _images(), percentile=percentile)
