"""Taps: a hooked module returns the very feature that forward_intermediates and forward_head give, in every family."""
import copy
import math

import pytest
import timm
import torch
import torch.nn as nn
from timm.models.vgg import VGG

import timm_sscl  # noqa: F401  registers the spiking_ names
from timm_sscl import LIF, convert_to_spiking
from timm_sscl.features.stages import POOLED, stage_indices
from timm_sscl.features.reader import FeatureReader
from timm_sscl.features.finding import find_taps, named_taps
from timm_sscl.features.tap import fold_feature

T = 2


def _tiny_vgg(**kwargs):
    return VGG([8, 'M', 8, 'M', 16, 16, 'M', 16, 'M', 24, 'M'], norm_layer=nn.BatchNorm2d, **kwargs)


# name, options, input size, whether it can checkpoint, the modules that end the stages
FAMILIES = {
    'resnet': ('test_resnet', dict(layers=(2, 1, 1, 2)), 32, True, ['layer1.1', 'layer2.0', 'layer3.0', 'layer4.1']),
    'vgg': (_tiny_vgg, {}, 32, False, None),
    'regnetx': ('regnetx_002', {}, 32, True, ['s1', 's2', 's3', 's4']),
    'regnety': ('regnety_002', {}, 32, True, ['s1', 's2', 's3', 's4']),
    'efficientnet': ('test_efficientnet', {}, 32, True, ['blocks.1.0', 'blocks.2.0', 'blocks.3.0', 'blocks.4.0']),
    'mobilenetv3': ('mobilenetv3_small_050', {}, 32, True, ['blocks.0.0', 'blocks.1.1', 'blocks.3.1', 'blocks.5.0']),
    'densenet': ('densenet121', dict(growth_rate=8, block_config=(2, 2, 2, 2)), 32, True, None),
    'convnext': ('test_convnext', {}, 32, True, ['stages.0', 'stages.1', 'stages.2', 'stages.3']),
    'byobnet': ('test_byobnet', {}, 32, True, ['stages.0.0', 'stages.1.0', 'stages.2.0', 'final_conv']),
    'nfnet': ('test_nfnet', {}, 32, True, ['stages.0.0', 'stages.1.0', 'stages.2.0', 'final_conv']),
    'swin': ('swin_tiny_patch4_window7_224',
             dict(img_size=32, depths=(1, 1, 2, 1), embed_dim=24, num_heads=(1, 2, 2, 4), window_size=2), 32, True,
             ['layers.0', 'layers.1', 'layers.2', 'layers.3']),
    'vit': ('test_vit', dict(img_size=32), 32, True, ['blocks.1', 'blocks.2', 'blocks.4', 'blocks.5']),
    'deit distilled': ('deit_tiny_distilled_patch16_224', dict(img_size=32, depth=5, embed_dim=48), 32, True,
                       ['blocks.1', 'blocks.2', 'blocks.3', 'blocks.4']),
}

# spiking models whose stages end in no spikes, and the neurons behind that take their outputs
BEHIND = {'nfnet': ['stages.1.0.act1', 'stages.2.0.act1', 'stages.3.0.act1', 'final_act']}


def _create(family, spiking, **kwargs):
    name, options, size, _, _ = FAMILIES[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = (name(num_classes=5, **kwargs) if callable(name)
                 else timm.create_model(name, num_classes=5, **options, **kwargs))
        for p in model.parameters():
            if p.ndim == 1 and not p.any():
                nn.init.normal_(p, std=0.5)  # biases and zero-initialised scales: no block is an identity
    return convert_to_spiking(model, timesteps=T) if spiking else model


def _images(family, n=3, seed=0):
    size = FAMILIES[family][2]
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def _functional(model, x, spiking, indices=None):
    """Stage features and pooled feature per step, by timm's own methods, each (T, B, C, ...)."""
    per_step = dict(per_step=True) if spiking else {}
    final, stages = model.forward_intermediates(
        x, indices=stage_indices(model) if indices is None else indices, **per_step)
    features = [*stages, model.forward_head(final, pre_logits=True, **per_step)]
    return features if spiking else [f.unsqueeze(0) for f in features]


def _expected(family, model, x, spiking):
    """`_functional`, with the spikes of the neurons behind the stages where there are any."""
    features = _functional(model, x, spiking)
    for i, name in enumerate(BEHIND.get(family, ()) if spiking else ()):
        with model.time_folded():
            features[i] = model.get_submodule(name)(features[i].flatten(0, 1)).unflatten(0, (T, -1))
    return features


def _hooked(model, x, taps, spiking):
    """The taps' features in one plain model(x), as a user's own hooks would see them."""
    seen = {}
    handles = [
        model.get_submodule(t.module).register_forward_hook(lambda _m, _a, out, n=t.name: seen.setdefault(n, out))
        for t in taps]
    model(x)
    for handle in handles:
        handle.remove()
    per_step = dict(per_step=True) if spiking else {}
    features = []
    for tap in taps:
        out = seen[tap.name]
        if tap.through_head:
            out = model.forward_head(out, pre_logits=True, **per_step)
            features.append(out if spiking else out.unsqueeze(0))
        else:
            features.append(fold_feature(out, T if spiking else 1, tap.channel_axis, tap.prefix_tokens))
    return features


def _assert_equal(hooked, functional):
    assert len(hooked) == len(functional)
    for h, f in zip(hooked, functional):
        # tokens come as (T, B, C, N), the functional feature as the map (T, B, C, H, W)
        assert h.shape[:3] == f.shape[:3]
        assert torch.equal(h.flatten(3) if h.ndim > 3 else h, f.flatten(3) if f.ndim > 3 else f)


# ---- the hooked tensor is the feature

@pytest.mark.parametrize('spiking', [False, True], ids=['ann', 'spiking'])
@pytest.mark.parametrize('family', FAMILIES)
def test_hooked_tensors_are_the_features(family, spiking):
    model = _create(family, spiking).eval()
    taps = find_taps(model)
    x = _images(family)
    with torch.no_grad():
        functional = _expected(family, model, x, spiking)
        hooked = _hooked(model, x, taps, spiking)
    _assert_equal(hooked, functional)
    assert [t.channels for t in taps] == [f.shape[2] for f in functional]
    assert [t.name for t in taps][-1] == POOLED and len(taps) == 5
    stages = BEHIND.get(family, FAMILIES[family][4]) if spiking else FAMILIES[family][4]
    assert stages is None or [t.module for t in taps[:-1]] == stages
    # distinct features: no tap may pass for another
    assert all(not torch.equal(a.flatten(), b.flatten()) for i, a in enumerate(functional[:-1]) for b in functional[:i])
    if spiking:
        assert all(f.any() for f in functional[:-1])


@pytest.mark.parametrize('spiking', [False, True], ids=['ann', 'spiking'])
@pytest.mark.parametrize('family', [name for name, entry in FAMILIES.items() if entry[3]])
def test_taps_run_under_gradient_checkpointing(family, spiking):
    model = _create(family, spiking)
    taps = find_taps(model)
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing(True)
    assert find_taps(twin) == taps  # attached before or after, the same modules
    x = _images(family)
    model.train()
    twin.train()
    torch.manual_seed(0)  # the same dropout in both
    expected = _hooked(model, x, taps, spiking)
    torch.manual_seed(0)
    features = _hooked(twin, x, taps, spiking)
    _assert_equal(features, expected)
    assert all(f.requires_grad for f in features)


@pytest.mark.parametrize('spiking', [False, True], ids=['ann', 'spiking'])
@pytest.mark.parametrize('family', FAMILIES)
def test_reader_gives_the_same_features_and_logits(family, spiking):
    model = _create(family, spiking).eval()
    reader = FeatureReader(model)
    x = _images(family)
    with torch.no_grad():
        logits, features = reader(model, x)
        functional = _expected(family, model, x, spiking)
        whole = model(x, per_step=True) if spiking else model(x).unsqueeze(0)
    assert torch.equal(logits, whole)
    assert all(torch.equal(f, g) for f, g in zip(features, functional)) and len(features) == len(functional)
    assert reader.channels == [f.shape[2] for f in features]
    assert len(reader.names) == 5 and reader.names[-1] == POOLED
    assert reader.names == [t.name for t in find_taps(model)]  # both ways of reading name a layer alike


# ---- which stages

@pytest.mark.parametrize('family', FAMILIES)
def test_stage_rule(family):
    model = _create(family, False)
    reductions = model.feature_info.reduction() if hasattr(model.feature_info, 'reduction') else [
        entry['reduction'] for entry in model.feature_info]
    indices = stage_indices(model)
    if len(set(reductions)) == 1:
        n = len(reductions)
        assert indices == [math.ceil(n * k / 4) - 1 for k in (1, 2, 3, 4)]
    else:
        last = [i for i, r in enumerate(reductions) if i + 1 == len(reductions) or reductions[i + 1] != r]
        assert indices == last[-4:]
    assert stage_indices(model, 2) == (indices[-2:] if len(set(reductions)) > 1 else [
        math.ceil(len(reductions) * k / 2) - 1 for k in (1, 2)])


@pytest.mark.parametrize('depth,expected', [
    (12, [2, 5, 8, 11]), (7, [1, 3, 5, 6]), (6, [1, 2, 4, 5]), (4, [0, 1, 2, 3]),
    (3, [0, 1, 2]), (2, [0, 1]), (1, [0])])
def test_isotropic_stages(depth, expected):
    model = timm.create_model('test_vit', img_size=32, depth=depth)
    assert stage_indices(model) == expected
    assert [t.name for t in find_taps(model)] == [f'blocks.{i}' for i in expected] + [POOLED]


def test_model_without_feature_info_says_to_name_the_modules():
    with pytest.raises(ValueError, match=r'taps=\['):
        stage_indices(nn.Linear(3, 3))


def test_find_taps_of_fewer_stages():
    taps = find_taps(_create('resnet', False), num_stages=2)
    assert [t.module for t in taps] == ['layer3.0', 'layer4.1', 'global_pool']


# ---- the probe leaves no trace

@pytest.mark.parametrize('look', [find_taps, FeatureReader, lambda m: named_taps(m, ['layer1', 'layer2', 'pooled']),
                                  lambda m: pytest.raises(ValueError, find_taps, m, input_size=(3, 0, 0)),
                                  lambda m: pytest.raises(ValueError, named_taps, m, ['layer1', 'layer8'])],
                         ids=['find_taps', 'FeatureReader', 'named_taps', 'failing probe', 'unknown name'])
@pytest.mark.parametrize('spiking', [False, True], ids=['ann', 'spiking'])
def test_probe_leaves_the_model_and_the_random_state_alone(look, spiking):
    model = _create('resnet', spiking, drop_rate=0.5, drop_path_rate=0.5).train()
    model.layer2.eval()  # somebody's frozen stage
    model.layer3.requires_grad_(False)
    calls = []
    model.layer4.register_forward_hook(lambda *args: calls.append(1))
    state = copy.deepcopy(model.state_dict())
    modes = {name: m.training for name, m in model.named_modules()}
    grads = [p.requires_grad for p in model.parameters()]
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    rng = torch.get_rng_state()
    look(model)
    assert torch.equal(torch.get_rng_state(), rng)
    assert {name: m.training for name, m in model.named_modules()} == modes and not modes['layer2.0']
    assert [p.requires_grad for p in model.parameters()] == grads
    assert {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()} == hooks
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())  # BatchNorm's statistics as well
    assert all(p.grad is None for p in model.parameters())
    if spiking:
        assert any(isinstance(m, LIF) for m in model.modules())
        spikes = []
        handle = next(m for m in model.modules() if isinstance(m, LIF)).register_forward_hook(
            lambda _m, _a, out: spikes.append(out))
        model(_images('resnet'))
        handle.remove()
        assert set(spikes[0].unique().tolist()) <= {0., 1.}  # neurons fire again, the probe's bypass is gone


def test_probe_takes_the_models_own_channels_and_size():
    assert len(find_taps(timm.create_model('test_resnet', in_chans=7))) == 5
    assert len(find_taps(timm.create_model('test_vit', img_size=(48, 32)))) == 5
    assert len(find_taps(timm.create_model('test_resnet').double())) == 5
    assert len(find_taps(timm.create_model('test_resnet'), input_size=(3, 40, 24))) == 5


# ---- the reader

def test_reader_by_number():
    model = _create('resnet', True).eval()
    x = _images('resnet')
    all_features = FeatureReader(model)(model, x)[1]
    reader = FeatureReader(model, 2)
    assert reader.names == ['layer3', 'layer4', POOLED] and reader.channels == [192, 96, 96]
    assert all(torch.equal(f, g) for f, g in zip(reader(model, x)[1], all_features[2:]))
    with pytest.raises(ValueError, match='taps=0'):
        FeatureReader(model, 0)


@pytest.mark.parametrize('names,places', [
    (['layer1', 'layer4'], [0, 3]),
    (['layer2', POOLED], [1, 4]),
    (['layer3'], [2]),
    ([POOLED], [4]),
])
def test_reader_by_names(names, places):
    model = _create('resnet', True).eval()
    x = _images('resnet')
    logits, all_features = FeatureReader(model)(model, x)
    reader = FeatureReader(model, names)
    assert reader.names == names
    named_logits, features = reader(model, x)
    assert torch.equal(named_logits, logits)
    assert len(features) == len(places) == len(reader.channels)
    for feature, place, channels in zip(features, places, reader.channels):
        assert torch.equal(feature, all_features[place]) and feature.shape[2] == channels


def test_reader_of_an_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match=r"'layer7'.*layer1.*layer4.*pooled"):
        FeatureReader(_create('resnet', False), ['layer1', 'layer7'])


def test_reader_reads_any_model_of_its_architecture():
    # an EMA copy, say: the reader holds no model
    model = _create('resnet', True).eval()
    reader = FeatureReader(model)
    other = copy.deepcopy(model)
    nn.init.normal_(other.layer4[-1].conv2.weight)
    x = _images('resnet')
    assert torch.equal(reader(other, x)[0], other(x, per_step=True))
    assert not torch.equal(reader(other, x)[1][-1], reader(model, x)[1][-1])


# ---- by name, in any module

class _Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Sequential(nn.Conv2d(6, 8, 3), nn.ReLU()))
        self.pooled = nn.AdaptiveAvgPool2d(1)  # a module that is called like the pooled feature
        self.mixer = nn.Linear(8, 9)
        self.unused = nn.Linear(2, 2)
        self.pair = _Pair()

    def forward(self, x):
        x = self.body(x)
        self.pair(x)
        tokens = self.mixer(x.flatten(2).mT)
        return tokens.mean(1), self.pooled(x)


class _Pair(nn.Module):
    def forward(self, x):
        return x, x


def test_named_taps():
    taps = named_taps(_Net(), ['mixer', 'body', 'body.0', 'pooled'])
    assert [t.name for t in taps] == ['mixer', 'body', 'body.0', 'pooled']  # in the order that was asked for
    assert [t.module for t in taps] == ['mixer', 'body.1.1', 'body.0', 'pooled']  # a container's last block
    assert [(t.channels, t.channel_axis) for t in taps] == [(9, -1), (8, 1), (6, 1), (8, 1)]
    assert not any(t.through_head for t in taps)


@pytest.mark.parametrize('name,match', [
    ('nothing', "'nothing' is no module of _Net.*body"), ('unused', "'unused'.*did not"),
    ('pair', "'pair'.*tensor"), ('', 'no module')])
def test_named_taps_that_cannot_be_read_raise(name, match):
    with pytest.raises(ValueError, match=match):
        named_taps(_Net(), ['body', name])


def test_named_taps_of_a_timm_model():
    model = _create('resnet', False)
    assert named_taps(model, ['layer1', POOLED])[1] == find_taps(model)[-1]
    assert [t.module for t in named_taps(model, ['layer1', 'layer2.0.conv1'])] == ['layer1.1', 'layer2.0.conv1']


def test_input_that_fits_no_probe_asks_for_a_size():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            if x.shape[-1] != 97:  # no size that is guessed
                raise ValueError('97 wide')
            return self.conv(x)

    with pytest.raises(ValueError, match='input_size'):
        named_taps(Odd(), ['conv'])
    assert named_taps(Odd(), ['conv'], input_size=(3, 97, 97))[0].channels == 4


def test_fold_feature():
    x = torch.arange(T * 2 * 5 * 3.).view(T * 2, 5, 3)  # tokens, two of them no patches
    folded = fold_feature(x, T, channel_axis=-1, prefix_tokens=2)
    assert folded.shape == (T, 2, 3, 3)
    for t in range(T):
        for b in range(2):
            assert torch.equal(folded[t, b], x[t * 2 + b, 2:].mT)
    vectors = torch.arange(12.).view(T * 2, 3)
    assert torch.equal(fold_feature(vectors, T), vectors.view(T, 2, 3))
    maps = torch.randn(T * 2, 4, 5, 3)  # channels last
    assert torch.equal(fold_feature(maps, T, channel_axis=-1)[1, 0], maps[2].permute(2, 0, 1))
