"""Channels of sequences, maps, volumes and tokens: thresholds, taps and folded factors go along them."""
import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from timm_sscl import SSCLLoss, convert_ann, convert_to_spiking, fold_gains
from timm_sscl.features.channel_axis import ChannelAxes
from timm_sscl.features.finding import named_taps

B, C, T = 6, 5, 4
CONV = {1: nn.Conv1d, 2: nn.Conv2d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d}
SIZES = {1: (7,), 2: (7, 4)}


class _Convs(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.conv1, self.act1 = CONV[n](3, C, 3, padding=1), nn.ReLU()
        self.conv2, self.bn, self.act2 = CONV[n](C, C, 3, padding=1), NORM[n](C), nn.ReLU()
        self.fc, self.act3, self.head = nn.Linear(C, 4), nn.ReLU(), nn.Linear(4, 2)

    def forward(self, x):
        x = self.act1(self.conv1(x))
        x = self.act2(self.bn(self.conv2(x)) + x)
        return self.head(self.act3(self.fc(x.flatten(2).mean(2))))


class _Tokens(nn.Module):
    """A token mixer of batch norms: channels last, and first for the norm and between the two transposes."""

    def __init__(self, tokens=C):
        super().__init__()
        self.embed, self.act1 = nn.Linear(3, C), nn.ReLU()
        self.norm, self.act2 = nn.BatchNorm1d(C), nn.ReLU()
        self.mix, self.act3, self.head = nn.Linear(tokens, 4), nn.ReLU(), nn.Linear(4, 2)

    def forward(self, x):
        x = self.act1(self.embed(x)).transpose(1, 2)
        x = self.act2(self.norm(x))
        return self.head(self.act3(self.mix(x)).mean(1))


def _images(*size):
    return torch.randn(B, 3, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _create(cls, *args):
    torch.manual_seed(0)
    return cls(*args).double().eval()


@pytest.mark.parametrize('n', [1, 2])
def test_thresholds_are_those_of_the_channels(n):
    ann, x = _create(_Convs, n), _images(*SIZES[n])
    a = ann.act1(ann.conv1(x)).detach()
    b = ann.act2(ann.bn(ann.conv2(a)) + a).detach()
    model = convert_ann(copy.deepcopy(ann), x, T)
    for lif, out in ((model.act1, a), (model.act2, b)):
        assert lif.scale.shape == (C, *(1,) * n)
        assert torch.allclose(lif.scale.flatten(), out.transpose(0, 1).flatten(1).amax(1))
    assert model.act3.scale.shape == (4,)


@pytest.mark.parametrize('n', [1, 2])
def test_approaches_the_ann(n):
    ann, x = _create(_Convs, n), _images(*SIZES[n])
    expected = ann(x).detach()
    model = convert_ann(copy.deepcopy(ann), x, 1)
    errors = []
    for timesteps in (1, 256):
        model.set_timesteps(timesteps)
        errors.append(((model(x) - expected).norm() / expected.norm()).item())
    assert errors[1] < errors[0] / 40  # the rounding falls as 1 / T


def test_thresholds_of_tokens():
    ann, x = _create(_Tokens), _images(C).transpose(1, 2).contiguous()
    a = ann.act1(ann.embed(x)).detach()
    b = ann.act2(ann.norm(a.transpose(1, 2))).detach()
    model = convert_ann(copy.deepcopy(ann), x, T)
    assert torch.allclose(model.act1.scale, a.amax((0, 1))) and model.act1.scale.shape == (C,)
    assert torch.allclose(model.act2.scale.flatten(), b.amax((0, 2))) and model.act2.scale.shape == (C, 1)


@pytest.mark.parametrize('cls,args,size', [(_Convs, (1,), (3, 7)), (_Convs, (2,), (3, 7, 4)), (_Tokens, (), (C, 3))])
def test_folding_changes_no_output(cls, args, size):
    """As many tokens as channels: a scale per channel must not go along the tokens."""
    x = torch.randn(B, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model = convert_ann(_create(cls, *args), x, T)
    before = model(x, per_step=True)
    folded = {(f.name, f.factor): f for f in fold_gains(model, x).spiking_report().folds}
    assert folded['act1', 'gain'].done
    assert torch.allclose(model(x, per_step=True), before, rtol=1e-9, atol=1e-9)  # round-off in float64
    if cls is _Tokens:
        assert not folded['act2', 'scale'].done and 'axis' in folded['act2', 'scale'].into


def test_taps_read_channels_of_sequences():
    model = _create(_Convs, 1)
    taps = {tap.name: tap for tap in named_taps(model, ['conv1', 'act2', 'fc'], input_size=(3, 7))}
    assert [(tap.channels, tap.channel_axis) for tap in taps.values()] == [(C, 1), (C, 1), (4, 1)]
    tokens = _create(_Tokens)
    taps = named_taps(tokens, ['embed', 'act1', 'norm', 'act2', 'mix'], input_size=(C, 3))
    assert [(tap.channels, tap.channel_axis) for tap in taps] == [(C, -1), (C, -1), (C, 1), (C, 1), (4, -1)]


def test_loss_on_sequences():
    student, teacher = convert_to_spiking(_Convs(1), timesteps=T), _Convs(1)
    x = _images(7).float()
    sscl = SSCLLoss(student, teacher, taps=['act1', 'act2'], input_size=(3, 7))
    assert [tap.channels for tap in sscl.taps] == [C, C]
    student.train()(x)
    assert sscl(x).isfinite()


def test_volumes_and_unknown_tensors():
    with ChannelAxes() as axes:
        assert axes.axis(F.conv3d(torch.randn(2, 3, 4, 4, 4), torch.randn(C, 3, 3, 3, 3)).transpose(1, 2)) == 2
        assert [axes.axis(torch.randn((2,) * n)) for n in (2, 3, 4, 5)] == [1, 2, 1, 1]


@pytest.mark.parametrize('move,axis', [
    (lambda x: x.permute(0, 2, 3, 1), 3), (lambda x: x.flatten(2), 1), (lambda x: x.flatten(2).mT, 2),
    (lambda x: x.mean((2, 3)), 1), (lambda x: x[:, :, 0], 1), (lambda x: torch.cat([x, x]), 1),
    (lambda x: F.interpolate(x, scale_factor=2.), 1), (lambda x: x.movedim(1, 2) * 2. + 1., 2),
    (lambda x: x.unflatten(3, (2, 2)), 1), (lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (C,)), 3)])
def test_follows_what_is_done_to_a_map(move, axis):
    with ChannelAxes() as axes:
        assert axes.axis(move(F.conv2d(torch.randn(2, 3, 6, 6), torch.randn(C, 3, 3, 3)))) == axis
