"""The paper's small networks: parameters, stages and outputs against plain torch, timm's contract, spiking twins."""
import copy

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models import group_parameters

from timm_sscl import LIF
from timm_sscl.features.finding import find_taps

NAMES = ['resnet20_cifar', 'resnet19_cifar', 'resnet19_cifar_fc', 'vgg16_cifar']
K = 5

# of the networks with 10 and 100 classes
PARAMETERS = {
    'resnet20_cifar': {10: 11_247_946, 100: 11_294_116}, 'resnet19_cifar': {10: 12_569_226, 100: 12_615_396},
    'resnet19_cifar_fc': {10: 12_697_994, 100: 12_721_124}, 'vgg16_cifar': {10: 14_728_266, 100: 14_774_436}}

# stages at 32 x 32 and width 8: channels, size
STAGES = {
    'resnet20_cifar': [(8, 32), (8, 16), (16, 8), (32, 4), (64, 2)],
    'resnet19_cifar': [(8, 32), (8, 32), (16, 16), (32, 8)],
    'resnet19_cifar_fc': [(8, 32), (8, 32), (16, 16), (32, 8)],
    'vgg16_cifar': [(8, 32), (16, 16), (32, 8), (64, 4), (64, 2), (64, 1)]}
HIDDEN = {'resnet20_cifar': 64, 'resnet19_cifar': 32, 'resnet19_cifar_fc': 256, 'vgg16_cifar': 64}  # of pre_logits
NEURONS = {'resnet20_cifar': 3 + 16, 'resnet19_cifar': 1 + 16, 'resnet19_cifar_fc': 1 + 16 + 1, 'vgg16_cifar': 13}


# ---- plain torch, from the layer lists

class _Block(nn.Module):
    def __init__(self, inplanes, planes, stride, pooled_shortcut):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False), nn.BatchNorm2d(planes)
        self.shortcut = nn.Identity()
        if pooled_shortcut and inplanes != planes:
            self.shortcut = nn.Sequential(
                nn.AvgPool2d(stride), nn.Conv2d(inplanes, planes, 1, bias=False), nn.BatchNorm2d(planes))
        elif inplanes != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


def _conv(inplanes, planes, bias=False):
    return [nn.Conv2d(inplanes, planes, 3, padding=1, bias=bias), nn.BatchNorm2d(planes), nn.ReLU()]


def _stages(blocks, width, pooled_shortcut):
    layers, inplanes = [], width
    for stage, n in enumerate(blocks):
        planes = width * 2 ** stage
        for block in range(n):
            layers.append(_Block(inplanes, planes, 2 if stage and not block else 1, pooled_shortcut))
            inplanes = planes
    return layers


GAP = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]


def _reference(name, width, classes):
    if name == 'vgg16_cifar':
        layers, inplanes = [], 3
        for planes, n in ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3)):
            for _ in range(n):
                layers += _conv(inplanes, planes * width, bias=True)
                inplanes = planes * width
            layers.append(nn.AvgPool2d(2))
        return nn.Sequential(*layers, *GAP, nn.Linear(inplanes, classes))
    if name == 'resnet20_cifar':
        stem = _conv(3, width) + _conv(width, width) + _conv(width, width) + [nn.AvgPool2d(2)]
        return nn.Sequential(*stem, *_stages([2, 2, 2, 2], width, True), *GAP, nn.Linear(8 * width, classes))
    body = [*_conv(3, width), *_stages([3, 3, 2], width, False), *GAP]
    if name == 'resnet19_cifar':
        return nn.Sequential(*body, nn.Linear(4 * width, classes))
    return nn.Sequential(*body, nn.Linear(4 * width, 256), nn.ReLU(), nn.Linear(256, classes))


def _randomized(model):
    """Other weights and statistics than the initial ones, zeros among them, in double precision."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, t in model.state_dict().items():
            if t.is_floating_point():
                noise = torch.rand(t.shape, generator=generator)
                t.copy_(noise + .5 if 'running_var' in name or t.ndim == 1 else (noise - .5) * (6 / t[0].numel()) ** .5)
    return model.double().eval()


@pytest.mark.parametrize('size', [32, 48])
@pytest.mark.parametrize('name', NAMES)
def test_outputs_are_those_of_the_layer_list(name, size):
    model = _randomized(timm.create_model(name, width=8, num_classes=K))
    reference = _reference(name, 8, K).double().eval()
    state = model.state_dict()
    assert [t.shape for t in reference.state_dict().values()] == [t.shape for t in state.values()]
    reference.load_state_dict(dict(zip(reference.state_dict(), state.values())))
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        out = model(x)
        assert out.std() > 1e-3
        torch.testing.assert_close(out, reference(x), rtol=1e-10, atol=1e-10)  # float64, 20 layers


@pytest.mark.parametrize('classes', [10, 100])
@pytest.mark.parametrize('name', NAMES)
def test_parameters(name, classes):
    with torch.device('meta'):
        model = timm.create_model(name, num_classes=classes)
    width = 128 if 'resnet19' in name else 64
    expected = sum(p.numel() for p in _reference(name, width, classes).parameters())
    assert sum(p.numel() for p in model.parameters()) == expected == PARAMETERS[name][classes]


@pytest.mark.parametrize('name', NAMES)
def test_stages_and_feature_info(name):
    model = timm.create_model(name, width=8, num_classes=K)
    final, stages = model.forward_intermediates(torch.randn(2, 3, 32, 32))
    assert [tuple(s.shape[1:]) for s in stages] == [(c, s, s) for c, s in STAGES[name]]
    assert [(info['num_chs'], 32 // info['reduction']) for info in model.feature_info] == STAGES[name]
    assert torch.equal(final, stages[-1])
    assert model.get_submodule(model.feature_info[-1]['module']) is not None
    for last in (1, 2):  # counted from the end, as everywhere in timm
        _, some = model.eval().forward_intermediates(torch.ones(1, 3, 32, 32), indices=last)
        assert [s.shape[1] for s in some] == [c for c, _ in STAGES[name][-last:]]
    early = model.forward_intermediates(
        torch.ones(1, 3, 32, 32), indices=[1], stop_early=True, intermediates_only=True)
    assert [s.shape[1] for s in early] == [STAGES[name][1][0]]
    with pytest.raises(AssertionError):
        model.forward_intermediates(torch.ones(1, 3, 32, 32), indices=[len(STAGES[name])])


@pytest.mark.parametrize('name', NAMES)
def test_features_only(name):
    model = timm.create_model(name, width=8, features_only=True)
    assert [(f.shape[1], f.shape[-1]) for f in model(torch.randn(1, 3, 32, 32))] == STAGES[name]
    assert list(zip(model.feature_info.channels(), (32 // r for r in model.feature_info.reduction()))) == STAGES[name]
    some = timm.create_model(name, width=8, features_only=True, out_indices=(0, 2))
    assert [f.shape[1] for f in some(torch.randn(1, 3, 32, 32))] == [STAGES[name][i][0] for i in (0, 2)]


@pytest.mark.parametrize('name', NAMES)
def test_head(name):
    model = timm.create_model(name, width=8, num_classes=K).eval()
    x = torch.randn(2, 3, 32, 32)
    features = model.forward_features(x)
    assert torch.equal(model(x), model.forward_head(features))
    hidden = model.forward_head(features, pre_logits=True)
    assert hidden.shape == (2, HIDDEN[name]) and model.head_hidden_size == HIDDEN[name]
    assert torch.equal(model.get_classifier()(hidden), model(x))
    assert model.pretrained_cfg['classifier'] + '.weight' in model.state_dict()
    assert model.pretrained_cfg['first_conv'] + '.weight' in model.state_dict()
    assert model.num_features == STAGES[name][-1][0]
    model.reset_classifier(7)
    assert model(x).shape == (2, 7) and model.num_classes == 7
    model.reset_classifier(0)
    assert torch.equal(model(x), hidden)
    model.reset_classifier(0, '')
    assert model(x).shape[-2:] == features.shape[-2:]
    assert timm.create_model(name, width=8, num_classes=0).eval()(x).shape == (2, HIDDEN[name])


@pytest.mark.parametrize('name', NAMES)
def test_pruning(name):
    x = torch.randn(2, 3, 32, 32)
    for index in (0, 1, len(STAGES[name]) - 1):
        model = timm.create_model(name, width=8, num_classes=K).eval()
        expected = model.forward_intermediates(x, indices=[index], intermediates_only=True)[0]
        assert model.prune_intermediate_layers([index]) == [index]
        assert torch.equal(model.forward_features(x), expected) and model.num_features == expected.shape[1]
        assert torch.equal(model(x), expected) and model.num_classes == 0
        assert torch.equal(model.forward_intermediates(x, indices=[index], intermediates_only=True)[0], expected)
    model = timm.create_model(name, width=8, num_classes=K).eval()
    expected = model(x)
    model.prune_intermediate_layers(len(STAGES[name]), prune_head=False)  # all stages: nothing goes
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize('spiking', ['', 'spiking_'])
@pytest.mark.parametrize('name', NAMES)
def test_gradient_checkpointing_changes_no_gradient(name, spiking):
    torch.manual_seed(0)
    model = timm.create_model(spiking + name, width=8, num_classes=K).double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        for loss in (model(x).square().sum(), model.forward_intermediates(x)[0].sum()):
            grads.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
    for plain, checkpointed in zip(grads[:2], grads[2:]):
        assert any(g is not None and g.abs().sum() > 0 for g in plain)
        for a, b in zip(plain, checkpointed):
            assert (a is None) == (b is None)
            if a is not None:  # a neuron behind a norm makes its current again, to round-off, unless checkpointed
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('name', NAMES)
def test_parameter_groups_cover_the_model(name):
    model = timm.create_model(name, width=8, num_classes=K)
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse=coarse))
        assert sorted(sum(groups.values(), [])) == sorted(n for n, _ in model.named_parameters())
        assert len(groups) > 2


@pytest.mark.parametrize('name', NAMES)
def test_a_wrong_width_is_refused(name):
    with pytest.raises(ValueError, match='width=0'):
        timm.create_model(name, width=0)
    if name != 'vgg16_cifar':
        with pytest.raises(ValueError, match='width=7'):
            timm.create_model(name, width=7)


def test_last_norm_of_a_block_starts_at_zero_in_resnet20_only():
    model = timm.create_model('resnet20_cifar', width=8)
    assert all((block.bn2.weight == 0).all() for stage in (model.layer1, model.layer4) for block in stage)
    model = timm.create_model('resnet19_cifar', width=8)
    assert all((block.bn2.weight == 1).all() for stage in (model.layer1, model.layer3) for block in stage)


# ---- their spiking twins

@pytest.mark.parametrize('name', NAMES)
def test_every_activation_becomes_a_neuron(name):
    ann = timm.create_model(name, width=8, num_classes=K)
    activations = {n for n, m in ann.named_modules() if isinstance(m, nn.ReLU)}
    model = timm.create_model(f'spiking_{name}', width=8, timesteps=3, num_classes=K)
    report = model.spiking_report()
    assert len(activations) == NEURONS[name] and {r.name for r in report.neurons} == activations and not report.analog
    assert not [n for n, m in model.named_modules() if isinstance(m, nn.ReLU)]
    assert model.load_state_dict(ann.state_dict(), strict=True)
    assert model.pretrained_cfg['architecture'] == f'spiking_{name}' and timm.is_model(f'spiking_{name}')
    final, stages = model.forward_intermediates(torch.randn(2, 3, 32, 32))
    assert [tuple(s.shape) for s in stages] == [(2, c, s, s) for c, s in STAGES[name]] and len(final) == 3 * 2


@pytest.mark.parametrize('name, fractional', [
    ('resnet20_cifar', ['conv1.0', 'layer1.0.conv1', *(f'layer{i}.0.downsample.1' for i in (2, 3, 4))]),
    ('resnet19_cifar', ['conv1']), ('resnet19_cifar_fc', ['conv1']),
    ('vgg16_cifar', [f'features.{i}' for i in (0, 7, 14, 24, 34)])])
def test_pools_and_convolutions_take_spikes(name, fractional):
    """All but the convolution that sees the image and those behind an average pooling."""
    torch.manual_seed(0)
    model = timm.create_model(f'spiking_{name}', width=8, timesteps=2, num_classes=K)
    seen = {}
    for n, m in model.named_modules():
        if isinstance(m, (nn.Conv2d, nn.AvgPool2d)):
            m.register_forward_pre_hook(lambda m, args, n=n: seen.update({n: set(args[0].unique().tolist())}))
    model.train()(torch.randn(4, 3, 32, 32))
    assert [n for n, values in seen.items() if values != {0., 1.}] == fractional


def test_hidden_layer_of_the_head_is_a_neuron_and_belongs_to_the_head():
    model = timm.create_model('spiking_resnet19_cifar_fc', width=8, timesteps=2, num_classes=K)
    assert isinstance(model.head.pre_logits.act, LIF)
    features = torch.randint(0, 2, (4, 32, 8, 8)).float()
    steps = model.forward_head(features, pre_logits=True, per_step=True)
    assert steps.shape == (2, 2, 256) and set(steps.unique().tolist()) == {0., 1.}
    assert torch.equal(model.forward_head(features, per_step=True), model.head.fc(steps))
    analog = timm.create_model('spiking_resnet19_cifar_fc', width=8, exclude='head').spiking_report().analog
    assert [r.name for r in analog] == ['head.pre_logits.act']
    model.reset_classifier(3)
    assert isinstance(model.head.pre_logits.act, LIF) and model(torch.randn(1, 3, 32, 32)).shape == (1, 3)


@pytest.mark.parametrize('name', NAMES)
def test_event_frames_and_checkpoints(name, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model(f'spiking_{name}', width=8, in_chans=2, timesteps=3, num_classes=K)
    frames = (torch.rand(2, 3, 2, 48, 48, generator=torch.Generator().manual_seed(0)) < .3).float()
    model.train()(frames)  # statistics of its own
    with torch.no_grad():
        out = model.eval()(frames, per_step=True)
        assert out.shape == (3, 2, K)
        torch.save(model.state_dict(), tmp_path / 'model.pth')
        again = timm.create_model(
            f'spiking_{name}', width=8, in_chans=2, num_classes=K, checkpoint_path=tmp_path / 'model.pth').eval()
        assert again.timesteps == 3 and torch.equal(again(frames, per_step=True), out)
        assert torch.equal(copy.deepcopy(model)(frames, per_step=True), out)


@pytest.mark.parametrize('name, taps', [
    ('resnet20_cifar', ['layer1', 'layer2', 'layer3', 'layer4', 'pooled']),
    ('resnet19_cifar', ['layer1', 'layer2', 'layer3', 'pooled']),
    ('resnet19_cifar_fc', ['layer1', 'layer2', 'layer3', 'pooled']),
    ('vgg16_cifar', ['features.22', 'features.32', 'features.42', 'features.43', 'pooled'])])
def test_taps(name, taps):
    found = find_taps(timm.create_model(f'spiking_{name}', width=8, timesteps=2))
    assert [tap.name for tap in found] == taps
    assert [tap.channels for tap in found] == [c for c, _ in STAGES[name][1 - len(taps):]] + [HIDDEN[name]]
