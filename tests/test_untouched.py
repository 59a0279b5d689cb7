"""A measurement leaves the model, the generators and torch's settings as they were; a change that fails does too."""
import copy
import random
from functools import lru_cache

import numpy as np
import pytest
import timm
import torch
import torch._dynamo
import torch.nn as nn
from torch.nn.utils import parametrizations, prune

from timm_sscl import (SSCLLoss, calibrate, convert_ann, convert_to_spiking, fold_gains, set_stem_pool, share_stem)
from timm_sscl.conversion.from_ann.ann_obstacles import ann_obstacles
from timm_sscl.report import FiringRates, count_macs, estimate_energy
from timm_sscl.features.reader import FeatureReader
from timm_sscl.features.finding import find_taps, named_taps, tap_shapes

K = 5


class _Moving(nn.Module):
    """Writes to all that a forward can write to."""

    def __init__(self):
        super().__init__()
        self.register_buffer('count', torch.zeros(()))
        self.register_buffer('last', torch.zeros(1))
        self.calls, self.shapes, self.cache = 0, [], {}

    def forward(self, x):
        self.calls += 1
        self.shapes.append(tuple(x.shape))
        self.cache[self.calls] = x
        self.mean = x.detach().mean()
        self.last = x.detach().flatten()[:1] + random.random() + np.random.rand() + torch.rand(())
        self.count += 1
        return x


def _model(seed=0, timesteps=4):
    """A spiking ResNet with a bit of everything that a forward, or a mode, moves."""
    torch.manual_seed(seed)
    kwargs = dict(num_classes=K, drop_rate=.5, drop_path_rate=.5)
    model = timm.create_model('spiking_test_resnet', **kwargs)
    source = timm.create_model('spiking_test_resnet', timesteps=timesteps, **kwargs)
    model.load_state_dict(source.state_dict())  # T comes from a checkpoint and was not asked for
    assert model.timesteps == timesteps
    model.conv1 = nn.Sequential(model.conv1, _Moving())
    parametrizations.spectral_norm(model.layer2[0].conv1)
    prune.l1_unstructured(model.layer3[0].conv1, 'weight', .5)
    model.train()
    model(_images())  # running statistics, and gradients that are kept
    model.fc(torch.ones(1, model.fc.in_features)).sum().backward()
    model.layer2.eval()
    model.layer3.requires_grad_(False)
    model.layer4.register_forward_hook(lambda *_: None)
    return model


def _images(n=2):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def _snapshot(model):
    """All that can be seen of a model, of the generators and of torch's settings."""
    model.state_dict()  # which writes the settings of its gains down
    seen = {}
    for name, module in model.named_modules():
        seen[name, 'class'] = type(module)
        for key, value in vars(module).items():
            seen[name, key] = dict(value) if isinstance(value, dict) else copy.copy(value) if isinstance(
                value, (list, set)) else value
    seen = {key: value for key, value in seen.items() if not isinstance(value, torch.Tensor)}
    tensors = {name: (id(value), value.clone()) for name, value in (*model.named_parameters(), *model.named_buffers())}
    tensors.update({f'{name}.grad': (id(p.grad), p.grad.clone()) for name, p in model.named_parameters()
                    if p.grad is not None})
    state = {key: value.clone() for key, value in model.state_dict().items()}
    numpy_state = np.random.get_state()
    world = [
        random.getstate(), numpy_state[1].tolist(), numpy_state[2:], torch.get_rng_state().tolist(),
        torch._dynamo.config.skip_nnmodule_hook_guards, torch.backends.mkldnn.enabled, torch.is_grad_enabled(),
        torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled(), torch.get_default_dtype()]
    grads = {name: p.requires_grad for name, p in model.named_parameters()}
    return seen, tensors, state, world, grads


def _assert_same(before, after):
    for old, new in zip(before, after):
        assert type(old) is type(new) and len(old) == len(new)
        if isinstance(old, list):
            assert old == new
            continue
        assert list(old) == list(new)
        for key, value in old.items():
            if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], torch.Tensor):
                assert value[0] == new[key][0] and torch.equal(value[1], new[key][1]), key
            elif isinstance(value, torch.Tensor):
                assert torch.equal(value, new[key]), key
            elif isinstance(value, dict):
                assert list(value) == list(new[key]) and all(value[k] is new[key][k] for k in value), key
            elif isinstance(value, nn.Module):
                assert value is new[key], key
            else:
                assert value == new[key], key




_MEASURES = {
    'find_taps': find_taps,
    'named_taps': lambda m: named_taps(m, ['layer1', 'layer4']),
    'tap_shapes': lambda m: tap_shapes(m, find_taps(m)),
    'FeatureReader': FeatureReader,
    'count_macs': lambda m: count_macs(m, _images()),
    'estimate_energy': lambda m: estimate_energy(m, _images()),
    'report.macs': lambda m: m.spiking_report().macs(_images()),
    'printed report': lambda m: str(m.spiking_report()),
    'report.as_dict': lambda m: m.spiking_report().as_dict(),
    'ann_obstacles': ann_obstacles,
}


@pytest.fixture
def model():
    return _model()


@pytest.mark.parametrize('name', _MEASURES)
def test_measurement_leaves_no_trace(model, name):
    larger = _model(1, timesteps=8).state_dict()
    torch._dynamo.config.skip_nnmodule_hook_guards = True
    before = _snapshot(model)
    _MEASURES[name](model)
    _assert_same(before, _snapshot(model))
    model.load_state_dict(larger)
    assert model.timesteps == 8


@pytest.mark.parametrize('name', [name for name in _MEASURES if name not in (
    'printed report', 'report.as_dict', 'ann_obstacles')])
def test_measurement_that_fails_leaves_no_trace(model, name):
    model.layer3.register_forward_hook(lambda *_: 1 / 0)
    torch._dynamo.config.skip_nnmodule_hook_guards = True
    before = _snapshot(model)
    with pytest.raises((ZeroDivisionError, ValueError)):
        _MEASURES[name](model)
    _assert_same(before, _snapshot(model))


def test_firing_rates_leave_no_hook(model):
    model.eval()
    before = _snapshot(model)
    with pytest.raises(ZeroDivisionError), FiringRates(model):
        1 / 0
    _assert_same(before, _snapshot(model))


def test_calibration_sets_gains_only(model):
    calibrate(model, _images())
    before = _snapshot(model)
    calibrate(model, _images())  # the same gains once more, and nothing revived
    after = _snapshot(model)
    for key in [k for k in before[1] if k.endswith('gain')]:
        assert torch.equal(before[1].pop(key)[1], after[1].pop(key)[1])
    for snapshot in (before, after):
        for key in [k for k in snapshot[0] if k[1] in ('_buffers', '_seen')]:  # what a gain is held in
            snapshot[0][key] = {k: v for k, v in snapshot[0][key].items() if 'gain' not in k}
    _assert_same(before, after)


def test_dynamo_is_told_once():
    """Attaching a loss turns dynamo's guards on hooks on; a second one does not throw its graphs away."""
    torch._dynamo.config.skip_nnmodule_hook_guards = True
    models = [timm.create_model('test_resnet', num_classes=K) for _ in range(3)]
    SSCLLoss(models[0], models[1])
    assert not torch._dynamo.config.skip_nnmodule_hook_guards
    resets = []
    original, torch._dynamo.reset = torch._dynamo.reset, lambda: resets.append(1)
    try:
        SSCLLoss(models[2], models[1])
    finally:
        torch._dynamo.reset = original
    assert not resets


# ---- changes that fail in the middle

def _ann():
    torch.manual_seed(0)
    return timm.create_model('resnet10t', num_classes=K)


def _spiking():
    model = convert_to_spiking(_ann(), timesteps=2)
    calibrate(model, _images())
    return model


@lru_cache(maxsize=None)
def _tdbn_state():
    return convert_to_spiking(_ann(), norm='tdbn').state_dict()


def _break_forward(model, monkeypatch):
    model.layer3.register_forward_hook(lambda *_: 1 / 0)


def _break(target, good_calls=1):
    """A function of the package fails after some calls."""
    def apply(model, monkeypatch):
        module, name = target.rsplit('.', 1)
        calls, original = [], getattr(__import__(module, fromlist=[name]), name)

        def fails(*args, **kwargs):
            calls.append(1)
            return 1 / 0 if len(calls) > good_calls else original(*args, **kwargs)
        monkeypatch.setattr(target, fails)
    return apply


_CHANGES = {
    'convert_to_spiking': (_ann, convert_to_spiking, _break('timm_sscl.conversion.finding.plan._replacement')),
    'convert_to_spiking, late': (
        _ann, lambda m: convert_to_spiking(m, stem_pool='avg', norm='tdbn'),
        _break('timm_sscl.conversion.variants.batch_norms.mix_in', 0)),
    'convert_to_spiking, half of the norms': (
        _ann, lambda m: convert_to_spiking(m, norm='tdbn'), _break('timm_sscl.conversion.variants.batch_norms.mix_in')),
    'load_state_dict of another norm': (
        lambda: (_tdbn_state(), _spiking())[1], lambda m: m.load_state_dict(_tdbn_state()),
        _break('timm_sscl.conversion.variants.batch_norms.mix_in')),
    'convert_ann': (_ann, lambda m: convert_ann(m, _images()), _break_forward),
    'convert_ann, late': (
        _ann, lambda m: convert_ann(m, _images()), _break('timm_sscl.conversion.from_ann.thresholds._threshold')),
    'convert_ann of a spiking model': (
        lambda: convert_to_spiking(_ann()), lambda m: convert_ann(m, _images(), 16), _break_forward),
    'calibrate': (_spiking, lambda m: calibrate(m, _images()), _break_forward),
    'fold_gains': (_spiking, lambda m: fold_gains(m, _images()), _break_forward),
    'fold_gains, late': (
        _spiking, lambda m: fold_gains(m, _images()), _break('timm_sscl.conversion.scales.gain_folding._fold_gain')),
    'share_stem': (_spiking, share_stem, _break('timm_sscl.conversion.variants.shared_stem._outputs')),
}


@pytest.mark.parametrize('name', _CHANGES)
def test_change_that_fails_leaves_the_model(name, monkeypatch):
    create, change, sabotage = _CHANGES[name]
    model = create()
    sabotage(model, monkeypatch)
    before = _snapshot(model)
    with pytest.raises((ZeroDivisionError, ValueError, TypeError)):
        change(model)
    _assert_same(before, _snapshot(model))


def test_stem_pool_that_fails_leaves_the_model():
    model = _ann()
    model.maxpool.dilation = 2
    before = _snapshot(model)
    with pytest.raises(ValueError, match='stem'):
        set_stem_pool(model, 'avg')
    _assert_same(before, _snapshot(model))
