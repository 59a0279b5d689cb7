"""A converted model stays what it was: class, copies, dtypes, devices, timm's methods."""
import copy
import io

import pytest
import timm
import torch

from spiking_families import (
    B, FAMILIES, K, ROUND_OFF, SMALL, T, ann_of, every_family, images_of, pickled, small_families, spiking_of)
from timm_sscl import convert_to_spiking


def _saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize('clone', [copy.deepcopy, pickled, _saved])
@small_families
@torch.no_grad()
def test_copies_are_the_same_model_and_independent(family, clone):
    model, x = spiking_of(family), images_of(family)
    out = model(x)
    other = clone(model)
    assert type(other) is type(model) and other.timesteps == T and not other.training
    assert torch.equal(other(x), out)
    assert not {id(m) for m in model.modules()} & {id(m) for m in other.modules()}
    other.set_timesteps(1)
    assert model.timesteps == T and torch.equal(model(x), out)


@every_family
def test_instance_of_its_own_class(family):
    ann = ann_of(family)
    cls = type(ann)
    model = convert_to_spiking(ann)
    assert model is ann and isinstance(model, cls) and type(model) is not cls
    assert model.timesteps == 4
    other = convert_to_spiking(ann_of(family), timesteps=2)
    assert type(other) is type(model) and model.timesteps == 4


def test_methods_of_the_ann_still_work():
    for family in SMALL:
        ann, model = ann_of(family), spiking_of(family)
        if hasattr(ann, 'no_weight_decay'):
            assert model.no_weight_decay() == ann.no_weight_decay()
        assert model.group_matcher() == ann.group_matcher()
        assert list(model.feature_info) == list(ann.feature_info)
        assert model.get_classifier().out_features == K
        groups = timm.models.group_parameters(model, model.group_matcher())
        assert groups == timm.models.group_parameters(ann, ann.group_matcher())


def test_torchscript_says_what_to_use_instead():
    with pytest.raises(RuntimeError, match='torch.compile'):
        torch.jit.script(spiking_of('test_resnet'))


@small_families
@torch.no_grad()
def test_channels_last(family):
    model, x = spiking_of(family, torch.float64), images_of(family).double()
    out = model(x)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), out, **ROUND_OFF)
    model = model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), out, **ROUND_OFF)


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
@small_families
def test_dtypes(family, dtype):
    model, x = spiking_of(family, dtype).train(), images_of(family).to(dtype)
    out = model(x)
    assert out.dtype == dtype and out.shape == (B, K) and out.isfinite().all()
    out.float().sum().backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in model.parameters())
    other = convert_to_spiking(ann_of(family)).to(dtype)
    other.load_state_dict(model.state_dict())
    assert other.timesteps == T  # the settings survive a cast of the model


@every_family
def test_meta_device(family):
    f = FAMILIES[family]
    with torch.device('meta'):
        model = timm.create_model(f'spiking_{f.name}', num_classes=K, timesteps=T, **f.kwargs)
        out = model(torch.empty(B, 3, f.size, f.size))
    assert all(t.is_meta for t in list(model.parameters()) + list(model.buffers()))
    assert out.is_meta and out.shape == (B, K)


@torch.no_grad()
def test_deit_distilled_training_returns_both_heads():
    model, x = spiking_of('deit_tiny_distilled'), images_of('deit_tiny_distilled')
    mean = model(x)
    model.train()
    model.set_distilled_training(True)
    both = model(x)
    assert isinstance(both, tuple) and [o.shape for o in both] == [(B, K)] * 2
    assert [o.shape for o in model(x, per_step=True)] == [(T, B, K)] * 2
    # no norm with statistics, no dropout: training differs from eval in the heads' mean only
    torch.testing.assert_close((both[0] + both[1]) / 2, mean, rtol=1e-5, atol=1e-6)  # float32


@torch.no_grad()
def test_vit_intermediates_with_prefix_tokens():
    model, x = spiking_of('test_vit'), images_of('test_vit')
    _, intermediates = model.forward_intermediates(x, return_prefix_tokens=True)
    tokens = model.num_prefix_tokens
    assert all(prefix.shape[:2] == (B, tokens) and spatial.shape[0] == B for spatial, prefix in intermediates)
    out = model.forward_intermediates(x, output_dict=True)
    assert out['image_features'].shape[0] == T * B
    assert all(i.shape[0] == B for i in out['image_intermediates'])
