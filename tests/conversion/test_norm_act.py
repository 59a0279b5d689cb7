"""Activations hidden in norms (EvoNorm, FilterResponseNorm), and norms that split the batch."""
import copy
import pickle

import pytest
import timm
import torch
import torch.nn as nn

from spiking_families import B, K, T
from timm_sscl import convert_to_spiking, lif


EVONORMS = [timm.layers.EvoNorm2dS0, timm.layers.EvoNorm2dS0a, timm.layers.EvoNorm2dS1, timm.layers.EvoNorm2dS1a,
            timm.layers.EvoNorm2dS2, timm.layers.EvoNorm2dS2a]


def _norm_net(norm):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.Conv2d(8, K, 1)).double()
    for p in net[1].parameters():
        nn.init.normal_(p, .5)
    return net


@pytest.mark.parametrize('cls', EVONORMS)
def test_evonorm_becomes_group_norm_and_a_neuron(cls):
    net = _norm_net(cls(8, groups=2))
    ann_state = copy.deepcopy(net.state_dict())
    x = torch.randn(B, 3, 6, 6, dtype=torch.float64)
    current = net[0](x).unflatten(1, (2, 4))
    mean = current.mean((2, 3, 4), keepdim=True)
    var = (current - mean).square().mean((2, 3, 4), keepdim=True)
    normed = ((current - mean) / (var + net[1].eps).sqrt()).flatten(1, 2)
    normed = normed * net[1].weight.view(1, -1, 1, 1) + net[1].bias.view(1, -1, 1, 1)
    expected = net[2](lif(torch.stack([normed] * T)).flatten(0, 1)).unflatten(0, (T, B))
    model = convert_to_spiking(net, timesteps=T)
    # round-off of another order of sums; a spike flips at a tie only
    assert torch.allclose(model(x, per_step=True), expected, rtol=0, atol=1e-12)
    assert model.spiking_report()[0][:3] == ('1.act', cls.__name__, 'LIF')
    model.load_state_dict(ann_state, strict=True)  # v belongs to an activation that is gone
    assert not any(name.endswith('.v') for name, _ in model.named_parameters())
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(clone(x), model(x)) and isinstance(clone[1], cls)


def test_filter_response_norm_becomes_itself_without_threshold_and_a_neuron():
    net = _norm_net(timm.layers.FilterResponseNormTlu2d(8))
    ann_state = copy.deepcopy(net.state_dict())
    x = torch.randn(B, 3, 6, 6, dtype=torch.float64)
    current = net[0](x)
    normed = current / (current.square().mean((2, 3), keepdim=True) + net[1].eps).sqrt()
    normed = normed * net[1].weight.view(1, -1, 1, 1) + net[1].bias.view(1, -1, 1, 1)
    expected = net[2](lif(torch.stack([normed] * T)).flatten(0, 1)).unflatten(0, (T, B))
    model = convert_to_spiking(net, timesteps=T)
    assert torch.allclose(model(x, per_step=True), expected, rtol=0, atol=1e-6)  # its mean is taken in float32
    model.load_state_dict(ann_state, strict=True)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


def test_norm_without_activation_stays():
    net = nn.Sequential(_norm_net(timm.layers.EvoNorm2dS0(8, groups=2, apply_act=False)), nn.ReLU())
    model = convert_to_spiking(net, timesteps=T)
    assert type(model[0][1]) is timm.layers.EvoNorm2dS0 and [r.name for r in model.spiking_report()] == ['1']


def test_batch_evonorm_is_refused_by_name():
    net = nn.Sequential(nn.Conv2d(3, 8, 1), timm.layers.EvoNorm2dB0(8), nn.ReLU())
    with pytest.raises(NotImplementedError, match=r"'1' \(EvoNorm2dB0\).*EvoNorm2dS0"):
        convert_to_spiking(net)
    assert type(net[2]) is nn.ReLU


@pytest.mark.parametrize('name', ['test_efficientnet_evos', 'resnetv2_50d_frn', 'resnetv2_50d_evos'])
def test_models_with_hidden_activations(name):
    kwargs = dict(layers=(1, 1, 1, 1), channels=(128, 128, 128, 128), stem_chs=64) if 'resnetv2' in name else {}
    model = timm.create_model(f'spiking_{name}', timesteps=2, num_classes=K, **kwargs)
    out = model(torch.randn(B, 3, 64, 64))
    out.sum().backward()
    assert out.shape == (B, K) and all(p.grad is not None for p in model.parameters())
    assert not [n for n, _ in model.named_parameters() if n.endswith(('.v', '.tau'))]


def test_split_batch_norm_splits_samples_not_time():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), timm.layers.BatchNormAct2d(4), nn.Conv2d(4, K, 1)).double()
    split = timm.layers.convert_splitbn_model(copy.deepcopy(net), num_splits=2)
    model = convert_to_spiking(split.double(), timesteps=T).train()
    halves = [convert_to_spiking(copy.deepcopy(net), timesteps=T).train() for _ in range(2)]
    x = torch.randn(4, T, 3, 5, 5, dtype=torch.float64)
    x[2:] += 3.  # another distribution: only its own norm sees it
    out = model(x, per_step=True)
    expected = torch.cat([half(x[2 * i:2 * i + 2], per_step=True) for i, half in enumerate(halves)], dim=1)
    assert torch.allclose(out, expected, rtol=0, atol=1e-12)  # round-off
    assert torch.allclose(model[1].running_mean, halves[0][1].running_mean)
    assert torch.allclose(model[1].aux_bn[0].running_mean, halves[1][1].running_mean)
    with pytest.raises(ValueError, match='3 samples.*num_splits=2'):
        model(x[:3])
