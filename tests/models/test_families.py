"""timm's contract for spiking twins: a sample of families here, all of them by `pytest -m families`."""
import importlib.util
import pickle
from copy import deepcopy
from pathlib import Path

import pytest
import timm
import torch
from timm.models._hub import save_for_hf

import timm_sscl.conversion.convert  # registers the spiking_ names

_SPEC = importlib.util.spec_from_file_location(
    'coverage_benchmark', Path(__file__).resolve().parents[2] / 'benchmarks' / 'coverage.py')
coverage = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(coverage)
coverage.SHRUNK['crossvit_tiny_240'] = dict(  # in this file
    depth=[[1, 1, 0], [1, 1, 0]], embed_dim=[24, 48])

T, B, K = 2, 2, 10

# different in what matters: norm-act layers, tokens, windows, NHWC, lists of scales, tuples, hidden activations, no BN
SAMPLE = ['test_resnet', 'test_vit', 'test_convnext', 'test_efficientnet', 'test_efficientnet_evos', 'test_nfnet',
          'test_mambaout', 'test_byobnet', 'test_coatnet', 'crossvit_tiny_240', 'efficientvim_m1', 'mobilevitv2_050',
          'starnet_s050']
ALL = sorted({*coverage.REPRESENTATIVES.values(), *coverage.HARD_CASES})


def _params(names):
    return [pytest.param(name, marks=() if name in SAMPLE else pytest.mark.families) for name in names]


every_model = pytest.mark.parametrize('name', _params(dict.fromkeys([*SAMPLE, *ALL])))
sample = pytest.mark.parametrize('name', SAMPLE)


@pytest.mark.slow
@every_model
def test_coverage_checks(name):
    """The benchmark's checks: nothing may fail that timm's own model does not fail too."""
    row = coverage.run_family(('', name))
    failed = {check: row[f'{check}_detail'] for check in coverage.CHECKS if row[check] == 'no'}
    assert not failed


@every_model
def test_conversion_needs_no_audit(name, monkeypatch):
    """The shipped table has all classes of this version of timm's families."""
    def fail(*args, **kwargs):
        raise AssertionError(f'{name} has a class that the table lacks; run benchmarks/audit_table.py')

    monkeypatch.setattr(timm_sscl.conversion.convert, 'audit', fail)
    with torch.device('meta'):
        model = timm.create_model(f'spiking_{name}', **coverage.SHRUNK.get(name, {}))
    assert model.neurons() and not [r for r in model.spiking_report() if 'unknown' in r.reason]


def _pair(name, **kwargs):
    shrunk = coverage.SHRUNK.get(name, {})
    ann = timm.create_model(name, num_classes=K, **shrunk, **kwargs)
    spiking = timm.create_model(f'spiking_{name}', num_classes=K, timesteps=T, **shrunk, **kwargs)
    spiking.load_state_dict(ann.state_dict(), strict=True)
    return ann.eval(), spiking.eval()


def _images(model, channels=3):
    size = coverage.probe_sizes(model)[-1 if model.pretrained_cfg.get('fixed_input_size') else 0]
    return torch.randn(B, channels, *size[1:])


@sample
@torch.no_grad()
def test_classifier_reset(name):
    ann, spiking = _pair(name)
    x = _images(ann)
    for args in ((0,), (0, ''), (7, 'avg')):
        outs = []
        for model in (ann, spiking):
            try:
                model.reset_classifier(*args)
                outs.append(model(x))
            except Exception as error:  # a pooling that timm's own model does not have
                outs.append(error)
        if isinstance(outs[0], Exception):
            continue
        shapes = [o.shape if isinstance(o, torch.Tensor) else [t.shape for t in o] for o in outs]
        assert shapes[0] == shapes[1], args


@sample
@pytest.mark.parametrize('channels', [1, 2, 4])
@torch.no_grad()
def test_input_channels(name, channels):
    _, spiking = _pair(name, in_chans=channels)
    assert coverage.logits(spiking(_images(spiking, channels))).shape == (B, K)


@sample
@torch.no_grad()
def test_intermediates_and_pruning(name):
    ann, spiking = _pair(name)
    x = _images(ann)
    expected = ann.forward_intermediates(x, intermediates_only=True)
    final, maps = spiking.forward_intermediates(x)
    assert [m.shape for m in maps] == [m.shape for m in expected]
    only = spiking.forward_intermediates(x, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(maps, only))
    steps = spiking.forward_intermediates(x, intermediates_only=True, per_step=True)
    assert all(torch.equal(s.mean(0), m) for s, m in zip(steps, maps))
    pruned = deepcopy(spiking)
    pruned.prune_intermediate_layers([1])
    kept = pruned.forward_intermediates(x, indices=[1], intermediates_only=True)
    assert torch.equal(kept[0], spiking.forward_intermediates(x, indices=[1], intermediates_only=True)[0])


@sample
@torch.no_grad()
def test_copies_pickles_and_saved_folders(name, tmp_path):
    _, spiking = _pair(name)
    x = _images(spiking)
    timm_sscl.calibrate(spiking, x)
    expected = coverage.logits(spiking(x))
    for clone in (deepcopy(spiking), pickle.loads(pickle.dumps(spiking))):
        assert torch.equal(coverage.logits(clone(x)), expected)
    save_for_hf(spiking, tmp_path / 'saved', safe_serialization=True)
    loaded = timm.create_model(f'local-dir:{tmp_path / "saved"}', pretrained=True).eval()
    assert torch.equal(coverage.logits(loaded(x)), expected)


@sample
@torch.no_grad()
def test_timesteps_change(name):
    _, spiking = _pair(name)
    x = _images(spiking)
    spiking.set_timesteps(3)
    assert coverage.logits(spiking(x, per_step=True)).shape[0] == 3
    frames = x[:, None].expand(-1, 3, -1, -1, -1)
    assert torch.equal(coverage.logits(spiking(frames)), coverage.logits(spiking(x)))


@pytest.mark.parametrize('name', ['test_vit', 'swin_tiny_patch4_window7_224'])
@torch.no_grad()
def test_set_input_size(name):
    ann, spiking = _pair(name)
    size = 64 if 'swin' in name else 96
    for model in (ann, spiking):
        model.set_input_size((size, size), **({'window_size': 4} if 'swin' in name else {}))
    x = torch.randn(B, 3, size, size)
    assert spiking(x).shape == ann(x).shape
    spiking.load_state_dict(ann.state_dict(), strict=True)


@pytest.mark.parametrize('name', ['test_resnet', 'test_vit', 'test_convnext', 'mobilevitv2_050'])
@torch.no_grad()
def test_export(name):
    ann, spiking = _pair(name)
    x = _images(ann)
    exported = torch.export.export(spiking, (x,), strict=False)
    assert torch.allclose(exported.module()(x), spiking(x), rtol=1e-4, atol=1e-5)  # other kernels after decomposition


@torch.no_grad()
def test_features_only_wrappers():
    x = torch.randn(B, 3, 64, 64)
    for kind in ('list', 'dict', 'hook', 'getter'):
        ann = timm.create_model('test_resnet', features_only=True, feature_cls=kind).eval()
        spiking = timm.create_model('spiking_test_resnet', timesteps=T, features_only=True, feature_cls=kind).eval()
        maps, expected = spiking(x), ann(x)
        maps, expected = (list(m.values()) if isinstance(m, dict) else m for m in (maps, expected))
        assert [m.shape for m in maps] == [m.shape for m in expected] and len(maps) == 5


def test_mask_is_one_over_time_or_repeated():
    """Hiera masks units of the image, by its own noise in training or by a mask that it is given."""
    torch.manual_seed(0)
    model = timm.create_model('spiking_hiera_tiny_224', timesteps=T, num_classes=K, patch_drop_rate=.5).train()
    steps = model(torch.randn(B, 3, 224, 224), per_step=True)
    assert steps.shape == (T, B, K)
    seen = []
    draw = model.get_random_mask
    model.get_random_mask = lambda *args, **kwargs: seen.append(draw(*args, **kwargs)) or seen[-1]
    model(torch.randn(B, 3, 224, 224))
    mask = seen[0].unflatten(0, (T, B))
    assert torch.equal(mask[0], mask[1]) and not torch.equal(mask[0, 0], mask[0, 1])
