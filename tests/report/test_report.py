"""How spiking a network is: kinds of inputs, MAC counts against closed forms, and the printed report."""
import copy
import json

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

import timm_sscl
from timm_sscl import convert_to_spiking
from timm_sscl.report import count_macs
from timm_sscl.report.macs import input_kind

T, B = 3, 2


def _spikes(*shape, p=.4):
    return torch.bernoulli(torch.full(shape, p), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize('x,kind', [
    (_spikes(4, 5), 'binary'), (torch.zeros(3, 3), 'binary'), (_spikes(4, 8, 8, 3).permute(0, 3, 1, 2), 'binary'),
    (F.avg_pool2d(_spikes(2, 3, 14, 14), 7), 'fractional'), (F.avg_pool2d(_spikes(2, 3, 8, 8), 2), 'fractional'),
    (F.adaptive_avg_pool2d(_spikes(2, 3, 32, 32), 1), 'fractional'),
    (_spikes(4, 4) + _spikes(4, 4, p=.9), 'fractional'),
    (F.avg_pool2d(_spikes(2, 3, 8, 8), 2).bfloat16(), 'fractional'), (_spikes(9, 9) / 9, 'fractional'),
    (torch.randn(50, generator=torch.Generator().manual_seed(0)), 'analog'),
    (torch.rand(50, generator=torch.Generator().manual_seed(0)), 'analog'), (torch.full((3,), 1e9), 'analog'),
    (torch.cat([_spikes(100), torch.tensor([.314159])]), 'analog')])
def test_input_kind(x, kind):
    assert input_kind(x) == kind


@pytest.mark.parametrize('layer,shape,macs', [
    (nn.Conv2d(3, 8, 3, padding=1), (B, 3, 10, 10), 3 * 8 * 9 * 100),
    (nn.Conv2d(4, 8, 3, stride=2, groups=2), (B, 4, 11, 11), 2 * 8 * 9 * 25),
    (nn.Conv2d(6, 6, 5, groups=6, padding=2), (B, 6, 7, 7), 6 * 25 * 49),
    (nn.Linear(7, 5), (B, 7), 35), (nn.Linear(7, 5, bias=False), (B, 7), 35), (nn.Linear(7, 5), (B, 9, 7), 9 * 35),
    (nn.LSTM(4, 6, batch_first=True), (B, 5, 4), 5 * 4 * 6 * (4 + 6))])
def test_macs_per_image(layer, shape, macs):
    counted = count_macs(layer, torch.randn(*shape))
    assert counted.total == macs and sum(sum(kinds.values()) for kinds in counted.by_module.values()) == macs


def test_attention():
    dim, tokens = 8, 5
    attention = timm.layers.Attention(dim, num_heads=2)
    counted = count_macs(attention, torch.randn(B, tokens, dim))
    assert counted.total == tokens * dim * 3 * dim + 2 * tokens * tokens * dim + tokens * dim * dim
    assert counted.analog == counted.total


class _Net(nn.Module):
    """Analog stem, binary conv, fractional conv behind average pooling, analog head behind a norm."""

    def __init__(self):
        super().__init__()
        self.stem, self.act1 = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()
        self.conv, self.act2, self.pool = nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)
        self.point, self.norm, self.head = nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8), nn.Linear(8 * 16, 5)

    def forward(self, x):
        x = self.pool(self.act2(self.conv(self.act1(self.stem(x)))))
        return self.head(self.norm(self.point(x)).flatten(1))


@pytest.mark.parametrize('layer, shape, macs', [
    (nn.Conv2d(4, 8, 3), (4, 6, 6), 8 * 4 * 9 * 16), (nn.Linear(5, 7), (3, 5), 3 * 5 * 7)])
def test_macs_in_inference_mode(layer, shape, macs):
    with torch.inference_mode():
        assert count_macs(layer, torch.randn(2, *shape)).total == macs


class Product(nn.Module):
    def __init__(self, product):
        super().__init__()
        self.product, self.act = product, nn.ReLU()
        self.weight = nn.Parameter(torch.ones(6))
        self.attention, self.bilinear = nn.MultiheadAttention(8, 2, batch_first=True), nn.Bilinear(8, 8, 3)

    def forward(self, x):
        return self.product(self, self.act(x))


@pytest.mark.parametrize('product, shape, macs', [
    (lambda m, x: m.attention(x, x, x, need_weights=False)[0], (5, 8), 4 * 5 * 8 * 8 + 2 * 5 * 5 * 8),  # fused in torch
    (lambda m, x: x @ m.weight, (5, 6), 5 * 6),  # by a vector
    (lambda m, x: m.bilinear(x, x), (5, 8), 5 * 3 * 8 * 8),
])
def test_products_that_torch_fuses_or_does_not_count(product, shape, macs):
    model = convert_to_spiking(Product(product), timesteps=3, example_inputs=torch.randn(2, *shape))
    assert count_macs(model, torch.randn(2, *shape)).total == 3 * macs


def test_kinds_by_hand():
    torch.manual_seed(0)
    ann, images = _Net(), torch.randint(0, 256, (B, 3, 8, 8)) / 255  # pixels are multiples of 1 / 255, but no spikes
    stem, conv, point, head = 27 * 4 * 64, 36 * 6 * 64, 6 * 8 * 16, 128 * 5
    assert count_macs(ann, images)[:3] == (0, 0, stem + conv + point + head)
    model = convert_to_spiking(ann, timesteps=T).train()
    model.bn = None
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    counted = model.spiking_report().macs(images)
    assert counted[:3] == (T * conv, T * point, T * (stem + head))
    assert counted.by_module['conv'] == dict(binary=T * conv, fractional=0, analog=0)
    assert [m.training for m in model.modules()] == modes and torch.equal(torch.get_rng_state(), state)
    assert sum(counted.share(kind) for kind in ('binary', 'fractional', 'analog')) == pytest.approx(1)
    model.act1.set_gain(None, 1 + torch.rand(4, 1, 1))  # a scale folds into the weights: the input is binary still
    assert model.spiking_report().macs(images)[:3] == counted[:3] and model.act1.scale is not None


def test_binary_event_frames_make_the_stem_binary():
    model = convert_to_spiking(_Net(), timesteps=T)
    frames = _spikes(B, T, 3, 8, 8)
    assert model.spiking_report().macs(frames).by_module['stem']['binary'] == T * 27 * 4 * 64


def test_report_is_a_sequence_that_prints_a_summary():
    model = timm.create_model('spiking_seresnet18', num_classes=5, exclude=['layer4.1.act2'])
    report = model.spiking_report()
    assert len(report) == len(report.neurons) + len(report.analog) and report[0].name == 'act1'
    assert {r.was for r in report.analog} == {'Sigmoid', 'ReLU'}
    assert report.as_dict()['macs'] is None and json.dumps(report.as_dict())
    text = str(report)
    assert '24 neuron layers (24 ReLU)' in text and '9 activations stay analog' in text
    assert 'gate' in text and "excluded by 'layer4.1.act2'" in text and 'MACs' not in text
    assert 'does not apply' in text and 'applies' in str(convert_to_spiking(_Net()).spiking_report())
    assert sum(report.macs()[:3]) == report.macs().total == sum(report.as_dict()['macs'].values())
    assert json.dumps(report.as_dict()['macs']) and '% binary' in str(report)


def test_printing_a_report_runs_nothing(monkeypatch):
    model = timm.create_model('spiking_test_resnet', num_classes=5)
    report = model.spiking_report()
    text = str(report)
    monkeypatch.setattr(type(model), 'forward', lambda *args, **kwargs: 1 / 0)
    model.set_timesteps(2)
    model.act1 = None
    assert str(report) == text and repr(report) == repr(list(report)) and 'T=4' in text


def test_public_functions_return_the_model_and_the_report_has_what_they_found():
    model = timm.create_model('spiking_resnet18', num_classes=5)
    assert model.spiking_report().drives == [] and model.spiking_report().folds == []
    x = torch.randn(2, 3, 32, 32)
    assert timm_sscl.calibrate(model, x) is model and timm_sscl.share_stem(model) is model
    assert model.set_timesteps(2) is model and model.set_stem(model.settings.stem) is model
    report = model.spiking_report()
    assert {d.name for d in report.drives} == model.neurons().keys() and report.stem == 'act1'
    assert all(model.get_submodule(d.name).gain.item() == pytest.approx(d.gain) for d in report.drives)
    timm_sscl.fold_gains(model, x)
    folds = model.spiking_report().folds
    assert {f.name for f in folds if f.done} and all(
        (model.get_submodule(f.name).gain is None) == f.done for f in folds if f.factor == 'gain')
    assert [d.name for d in copy.deepcopy(model).spiking_report().drives] == [d.name for d in report.drives]


def test_name_of_0_1_0_warns_and_gives_the_same_class():
    with pytest.warns(DeprecationWarning, match='timm_sscl.conversion.SpikingReport'):
        from timm_sscl.report import SpikingReport
    assert SpikingReport is timm_sscl.conversion.SpikingReport
    with pytest.raises(AttributeError, match='nothing'):
        timm_sscl.report.nothing


def test_report_without_numbers_on_the_meta_device():
    with torch.device('meta'):
        model = timm.create_model('spiking_resnet18')
    assert model.spiking_report().macs() is None and 'MACs' not in str(model.spiking_report())


def test_the_report_says_for_which_images_it_counted():
    """At 8 x 8 pixels: 6 * 6 positions of the first convolution, 4 * 4 of the second, T = 3."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                        nn.Flatten(), nn.Linear(8, 5))
    model = convert_to_spiking(net, timesteps=3)
    report = model.spiking_report()
    macs = 3 * (36 * 8 * 27 + 16 * 8 * 72 + 8 * 5)
    assert report.macs(torch.rand(2, 3, 8, 8)).total == macs
    assert f'MACs per image of shape (3, 8, 8): {macs:.3g}' in str(report)
    guessed = model.spiking_report()
    assert guessed.macs() is not None and f'MACs per image of shape {guessed.mac_size}: ' in str(guessed)
