"""Average pooling in the stem of a ResNet: what it computes, that it travels, and what has no such stem."""
import copy
import logging
import pickle

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

from timm_sscl import convert_ann, convert_to_spiking, set_stem_pool, share_stem

K = 5
NARROW = dict(num_classes=K, channels=(16, 24, 32, 40))


def _images(dtype=torch.float32, size=64):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0), dtype=dtype)


def _randomized(name, **kwargs):
    torch.manual_seed(1)
    model = timm.create_model(name, **NARROW, **kwargs)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(.05 * torch.randn_like(p))
    return model.train()


def _by_hand(model, x):
    """resnet18's forward with the pooling written out: nine shifted sums over zero padding, every second row."""
    x = model.act1(model.bn1(model.conv1(x)))
    height, width = x.shape[-2:]
    padded = F.pad(x, (1, 1, 1, 1))
    x = sum(padded[..., i:i + height:2, j:j + width:2] for i in range(3) for j in range(3)) / 9
    return model.forward_head(model.layer4(model.layer3(model.layer2(model.layer1(x)))))


@pytest.mark.parametrize('name', ['resnet18', 'resnet34', 'resnet18d', 'seresnet18'])
def test_average_of_the_same_windows(name):
    model = _randomized(name).double()
    x = _images(torch.float64)
    before = model(x)
    set_stem_pool(model, 'avg')
    # float64, additions in another order
    torch.testing.assert_close(model(x), _by_hand(model, x), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(model(x), before)
    set_stem_pool(set_stem_pool(model, 'avg'), None)
    assert type(model.maxpool) is nn.MaxPool2d
    torch.testing.assert_close(model(x), before, rtol=1e-9, atol=1e-9)  # running statistics moved, outputs do not


def test_spiking_model_takes_timms_weights_and_pools_spikes():
    ann = timm.create_model('resnet18', **NARROW)
    model = timm.create_model('spiking_resnet18', **NARROW, stem_pool='avg', timesteps=2)
    model.load_state_dict(ann.state_dict(), strict=True)
    seen = []
    model.maxpool.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    model.train()(_images())
    (spikes, pooled), = seen
    assert set(spikes.unique().tolist()) == {0., 1.} and spikes.shape[-1] == 2 * pooled.shape[-1]
    assert torch.equal(pooled, F.avg_pool2d(spikes, 3, 2, 1))
    report = model.spiking_report()
    assert report.as_dict()['stem_pool'] == 'avg' and 'average pooling' in str(report)
    plain = timm.create_model('spiking_resnet18', **NARROW).spiking_report()
    assert plain.as_dict()['stem_pool'] is None and 'average pooling' not in str(plain)


def test_hooks_of_the_pooling_stay():
    model, calls = timm.create_model('resnet18', **NARROW), []
    handle = model.maxpool.register_forward_hook(lambda m, args, out: calls.append(m))
    convert_to_spiking(model, stem_pool='avg')(_images())
    handle.remove()
    model(_images())
    assert calls == [model.maxpool]


def _trained(**kwargs):
    model = _randomized('spiking_resnet18', timesteps=2, **kwargs)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = None
    model(_images())
    return model.eval()


def test_it_travels_with_the_checkpoint(tmp_path, caplog):
    model, x = _trained(stem_pool='avg'), _images()
    torch.save(model.state_dict(), tmp_path / 'model.pth')
    file = str(tmp_path / 'model.pth')
    with torch.no_grad():
        expected = model(x)
        restored = timm.create_model('spiking_resnet18', **NARROW, checkpoint_path=file).eval()
        assert torch.equal(restored(x), expected) and restored.settings.stem_pool == 'avg'
        overlay = dict(file=file, num_classes=K)
        pretrained = timm.create_model(
            'spiking_resnet18', **NARROW, pretrained=True, pretrained_cfg_overlay=overlay).eval()
        assert torch.equal(pretrained(x), expected)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(copied(x), expected) and copied.settings.stem_pool == 'avg'
        # a max-pooling checkpoint takes it back, unless it was asked for
        plain = _trained()
        restored.load_state_dict(plain.state_dict())
        assert torch.equal(restored(x), plain(x)) and type(restored.maxpool) is nn.MaxPool2d
        torch.save(plain.state_dict(), tmp_path / 'plain.pth')
        with caplog.at_level(logging.WARNING, logger='timm_sscl'):
            asked = timm.create_model('spiking_resnet18', **NARROW, stem_pool='avg',
                                      checkpoint_path=str(tmp_path / 'plain.pth')).eval()
        assert 'stem_pool=None' in caplog.text and asked.settings.stem_pool == 'avg'
        assert not torch.equal(asked(x), plain(x))


def test_an_ann_that_pools_so_keeps_it():
    ann = set_stem_pool(timm.create_model('resnet18', **NARROW), 'avg')
    twin = copy.deepcopy(ann)
    model = convert_to_spiking(ann)
    assert model.settings.stem_pool == 'avg' and isinstance(model.maxpool, nn.AvgPool2d)
    model.set_timesteps(2)
    assert isinstance(model.maxpool, nn.AvgPool2d) and twin(_images()).shape == (2, K)


def test_it_goes_with_a_shared_stem_and_features_only():
    model, x = _trained(stem_pool='avg'), _images()
    with torch.no_grad():
        expected = model(x)
        assert share_stem(model).settings.stem == 'act1'
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)  # float32, another batch size
    features = timm.create_model('spiking_resnet18', features_only=True, stem_pool='avg', **NARROW)
    assert isinstance(features.maxpool, nn.AvgPool2d) and features(x)[1].shape == (2, 16, 16, 16)


def test_thresholds_are_those_of_the_ann_that_pools_so():
    model, x = _trained(stem_pool='avg').double(), _images(torch.float64)
    ann = set_stem_pool(timm.create_model('resnet18', **NARROW), 'avg').double().eval()
    ann.load_state_dict({k: v for k, v in model.state_dict().items() if 'spiking_' not in k})
    share_stem(model)
    with torch.no_grad():
        expected = ann(x)
        error = [(convert_ann(model, x, timesteps)(x) - expected).norm() / expected.norm() for timesteps in (4, 256)]
    assert model.settings.stem_pool == 'avg' and model.settings.stem == 'act1'  # they outlive the conversion
    assert error[1] < .2 * error[0] and error[1] < .1  # approaches it: 64 times the steps


@pytest.mark.parametrize('name', ['resnet20_cifar', 'test_vit', 'test_efficientnet', 'vgg16_cifar', 'resnetaa50'])
def test_models_without_that_stem_are_refused_by_name(name):
    with torch.device('meta'):
        kind = type(timm.create_model(name)).__name__
        with pytest.raises(ValueError, match=f"stem_pool='avg': {kind} has no max pooling in its stem"):
            timm.create_model(f'spiking_{name}', stem_pool='avg')
        ann = timm.create_model(name)
        with pytest.raises(ValueError, match='no max pooling'):
            convert_to_spiking(ann, stem_pool='avg')
    assert type(ann).__name__ == kind and any(isinstance(m, (nn.ReLU, nn.GELU, nn.SiLU)) for m in ann.modules())


def test_an_unknown_kind_is_refused():
    for make in (lambda: timm.create_model('spiking_resnet18', stem_pool='max'),
                 lambda: set_stem_pool(timm.create_model('resnet18'), 'max')):
        with pytest.raises(ValueError, match="stem_pool='max'.*'avg'"):
            make()
