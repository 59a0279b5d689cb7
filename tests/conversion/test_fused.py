"""Fused paths that would bypass a neuron, and conversions that leave nothing to spike."""
import copy
import pickle

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from timm_sscl import convert_to_spiking

T, B = 2, 3


def _encoder(activation, layers=None, **kwargs):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0., activation=activation, batch_first=True, **kwargs)
    return nn.Sequential(nn.Linear(16, 16), layer if layers is None else nn.TransformerEncoder(layer, layers))


ENCODERS = {
    'gelu module': lambda: _encoder(nn.GELU()),
    'relu module': lambda: _encoder(nn.ReLU(), norm_first=True),
    'gelu function': lambda: _encoder(F.gelu),
    'relu by name': lambda: _encoder('relu'),
    'stack of layers': lambda: _encoder(nn.GELU(), layers=2),
}


@pytest.mark.parametrize('build', ENCODERS.values(), ids=ENCODERS)
@torch.no_grad()
def test_evaluation_spikes_inside_torchs_encoder(build):
    """torch's fused encoder never calls the activation; no hook is left here, which would switch it off."""
    ann = build().eval()
    x = torch.randn(B, 5, 16)
    expected = ann(x)
    model = convert_to_spiking(copy.deepcopy(ann), timesteps=T)
    out = model(x)
    assert not torch.allclose(out, expected, rtol=0, atol=1e-3)  # float32 round-off is 1e-6
    with torch.enable_grad():
        slow = model(x)
    assert torch.allclose(out, slow, rtol=0, atol=1e-5)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(clone(x), out)


@torch.no_grad()
def test_excluded_activation_keeps_the_fused_path():
    model = convert_to_spiking(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), _encoder(nn.GELU())[1]), exclude='2')
    assert model[2].activation_relu_or_gelu == 2
    spiking = convert_to_spiking(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), _encoder(nn.GELU())[1]))
    assert spiking[2].activation_relu_or_gelu == 0
    spiking.load_state_dict(model.state_dict())  # a checkpoint that excludes it
    assert spiking[2].activation_relu_or_gelu == 2 and type(spiking[2].activation) is nn.GELU


def _net():
    return convert_to_spiking(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.GELU()), timesteps=T)


def test_nothing_to_swap_says_why():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Sigmoid())
    with pytest.raises(ValueError, match=r"1 \(ReLU\): excluded by 'ReLU'.*3 \(Sigmoid\): gate"):
        convert_to_spiking(net, exclude='ReLU')
    with pytest.raises(ValueError, match='no activation found'):
        convert_to_spiking(nn.Sequential(nn.Linear(4, 4)))

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 4))

        def forward(self, x):
            return x + self.mlp(torch.ones(6, 2)).mean(0)

    with pytest.raises(ValueError, match=r'mlp\.1 \(ReLU\): its input has no batch axis'):
        convert_to_spiking(Table(), input_size=(4,))


@pytest.mark.parametrize('decoder', [nn.Linear(4, 2), nn.Sequential(nn.Linear(4, 2), nn.ReLU())])
def test_a_model_around_a_spiking_encoder_is_told_so(decoder):
    model = nn.ModuleDict(dict(encoder=_net(), decoder=decoder))
    with pytest.raises(ValueError, match=r"'encoder' \(SpikingSequential\) is a spiking model already"):
        convert_to_spiking(model)
    assert len(model['encoder'].neurons()) == 2
