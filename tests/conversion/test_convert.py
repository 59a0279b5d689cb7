"""convert_to_spiking and what a converted model does: family by family, against the ANN and a stateful reference."""
import copy
import functools
import io
import logging
import pickle
import subprocess
import sys
from typing import Dict, NamedTuple, Optional

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torch.nn.functional import relu

from timm_sscl import LIF, convert_to_spiking, lif

T, B, K = 3, 2, 5

# float64 sums taken in another order (other batch size, memory format, recomputation): values here are below about 100
# and a flipped spike or a wrong step shows at 1e-3 and more.
ROUND_OFF = dict(rtol=1e-9, atol=1e-10)

# by class name, as timm has several classes of one activation
ANALOG = {'ReLU', 'ReLU6', 'LeakyReLU', 'PReLU', 'ELU', 'SELU', 'CELU', 'GELU', 'GELUTanh', 'QuickGELU', 'SiLU',
          'Swish', 'Mish', 'Hardswish', 'HardSwish', 'HardMish', 'Hardtanh', 'Tanh', 'Softplus', 'Softsign'}


class Family(NamedTuple):
    name: str
    kwargs: Dict[str, object] = {}
    size: int = 32
    neuron: Dict[str, object] = {}  # layers behind a LayerNorm have small currents: a low threshold wakes them


LOW = dict(v_threshold=.05)
NARROW = dict(channels=(16, 24, 32, 40))
FAMILIES = {
    'test_resnet': Family('test_resnet'),
    'resnet18': Family('resnet18', NARROW),
    'resnet50': Family('resnet50', dict(NARROW, layers=(1, 2, 1, 1))),
    'resnet10t': Family('resnet10t'),
    'resnetblur18': Family('resnetblur18', NARROW),
    'seresnet18': Family('seresnet18', NARROW),
    'vgg11_bn': Family('vgg11_bn', dict(mlp_ratio=1 / 64)),  # the head's 7x7 convolution has 100 M weights otherwise
    'regnetx_002': Family('regnetx_002'),
    'regnety_002': Family('regnety_002'),
    'test_efficientnet': Family('test_efficientnet'),
    'efficientnet_b0': Family('efficientnet_b0'),
    'mobilenetv2_035': Family('mobilenetv2_035'),
    'mobilenetv3_small_050': Family('mobilenetv3_small_050'),
    # at 32 px nothing is left to pool
    'densenet': Family('densenet121', dict(growth_rate=8, block_config=(2, 3, 2, 2)), 64),
    'densenet121': Family('densenet121', {}, 64),
    'test_convnext': Family('test_convnext', {}, 32, LOW),
    'convnext_atto': Family('convnext_atto', {}, 32, LOW),
    'test_vit': Family('test_vit', dict(img_size=32), 32, LOW),
    'vit_tiny': Family('vit_tiny_patch16_224', dict(img_size=32), 32, LOW),
    'deit_tiny_distilled': Family('deit_tiny_distilled_patch16_224', dict(img_size=32), 32, LOW),
}
# one small model per way of being built, for what need not be repeated over all of them
SMALL = ['test_resnet', 'regnety_002', 'mobilenetv3_small_050', 'densenet', 'test_convnext', 'test_vit']

NO_CHECKPOINTING = {'vgg11_bn'}  # timm's own limit

every_family = pytest.mark.parametrize('family', FAMILIES)
small_families = pytest.mark.parametrize('family', SMALL)


def _images(family: str = 'test_resnet', batch: int = B, seed: int = 1, frames: Optional[int] = None) -> torch.Tensor:
    """Smooth like photographs: a max-pooled spike map of white noise is all ones, which kills DenseNet's stem."""
    size, generator = FAMILIES[family].size, torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch * (frames or 1), 3, size // 8, size // 8, generator=generator)
    x = F.interpolate(coarse, size=(size, size), mode='bicubic')
    return x if frames is None else x.unflatten(0, (batch, frames))


def _ann(family: str, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    f = FAMILIES[family]
    return _wake_branches(timm.create_model(f.name, num_classes=K, **{**f.kwargs, **kwargs}))


def _wake_branches(model: nn.Module) -> nn.Module:
    """Scales that start at 0 (a residual branch's last norm) or 1e-6 (layer scale) hide the branch from a test."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1 and name.endswith(('weight', 'gamma')) and p.abs().max() < 1e-3:
                p.fill_(1.)
    return model


def _give_statistics(model: nn.Module, x: torch.Tensor) -> None:
    """Fill every BatchNorm with the statistics of x: with stock ones, deep layers are silent in eval mode."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # a plain average instead of a slow exponential one
    model.train()
    with torch.no_grad():
        for _ in range(2):
            model(x)
    for m, momentum in zip(norms, momenta):
        m.momentum = momentum


@functools.lru_cache(maxsize=None)
def _cached(family: str) -> nn.Module:
    model = convert_to_spiking(_ann(family), timesteps=T, **FAMILIES[family].neuron)
    _give_statistics(model, _images(family, batch=8, seed=2))
    return model.eval()


def _spiking(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A converted model that fires, in eval mode; the caller may change it."""
    return copy.deepcopy(_cached(family)).to(dtype)


def _neurons(model: nn.Module):
    return [m for m in model.modules() if isinstance(m, LIF)]


def _count(model: nn.Module, names) -> int:
    return sum(type(m).__name__ in names for m in model.modules())


class _Net(nn.Module):
    """A plain module: convolution, norm, activation, classifier."""

    def __init__(self, act: Optional[nn.Module] = None):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.act = nn.ReLU() if act is None else act
        self.fc = nn.Linear(4, K)

    def forward(self, x):
        return self.fc(self.act(self.bn(self.conv(x))).mean((2, 3)))


# ---------------------------------------------------------------------------------------------------- every family

@every_family
@torch.no_grad()
def test_forward_and_its_parts(family):
    model, x = _spiking(family), _images(family)
    out = model(x)
    assert out.shape == (B, K)
    assert out.std() > 0 and not torch.equal(out[0], out[1])  # alive: the equalities below are not 0 == 0
    steps = model(x, per_step=True)
    assert steps.shape == (T, B, K)
    assert torch.equal(steps.mean(0), out)  # exact: the same numbers in the same reduction
    features = model.forward_features(x)
    assert features.shape[0] == T * B
    assert torch.equal(model.forward_head(features), out)
    assert torch.equal(model.forward_head(features, per_step=True), steps)


@every_family
@torch.no_grad()
def test_pre_logits_have_the_anns_shape(family):
    model, x = _spiking(family), _images(family)
    features = model.forward_features(x)
    pre = model.forward_head(features, pre_logits=True)
    ann = _ann(family).eval()
    assert pre.shape == ann.forward_head(ann.forward_features(x), pre_logits=True).shape
    assert pre.shape[0] == B and pre.ndim == 2
    steps = model.forward_head(features, pre_logits=True, per_step=True)
    assert steps.shape == (T,) + pre.shape
    assert torch.equal(steps.mean(0), pre)


@every_family
@torch.no_grad()
def test_forward_intermediates(family):
    model, x = _spiking(family), _images(family)
    expected = _ann(family).eval().forward_intermediates(x)[1]
    final, intermediates = model.forward_intermediates(x)
    assert final.shape[0] == T * B
    assert torch.equal(final, model.forward_features(x))
    assert [i.shape for i in intermediates] == [i.shape for i in expected]
    _, steps = model.forward_intermediates(x, per_step=True)
    assert [s.shape for s in steps] == [(T,) + i.shape for i in expected]
    assert all(torch.equal(s.mean(0), i) for s, i in zip(steps, intermediates))
    only = model.forward_intermediates(x, intermediates_only=True)
    assert all(torch.equal(o, i) for o, i in zip(only, intermediates))


@every_family
@torch.no_grad()
def test_every_neuron_spikes_and_no_activation_is_left(family):
    model, x, outputs = _spiking(family), _images(family), {}
    for name, module in model.named_modules():
        if isinstance(module, LIF):
            module.register_forward_hook(lambda m, i, o, name=name: outputs.__setitem__(name, o))
    model(x)
    assert outputs and len(outputs) == len(_neurons(model)) == _count(_ann(family), ANALOG)
    assert all(((o == 0) | (o == 1)).all() for o in outputs.values())
    assert all(o.shape[0] == T * B for o in outputs.values())
    # most of them fire, on this input: binary is not merely zero
    assert sum(bool(o.any()) for o in outputs.values()) > len(outputs) / 2
    assert _count(model, ANALOG) == 0
    report = model.spiking_report()
    assert {r.name for r in report if r.now == 'LIF'} == set(outputs)


@every_family
def test_parameters_and_state_dict_are_the_anns(family):
    ann, model = _ann(family), _spiking(family)
    shapes = [(n, p.shape) for n, p in ann.named_parameters()]
    assert [(n, p.shape) for n, p in model.named_parameters()] == shapes
    ours, theirs = model.state_dict(), ann.state_dict()
    assert set(theirs) <= set(ours) and all('spiking_' in key for key in set(ours) - set(theirs))
    result = model.load_state_dict(theirs, strict=True)
    assert not result.missing_keys and not result.unexpected_keys
    assert all(torch.equal(v, theirs[k]) for k, v in model.state_dict().items() if k in theirs)
    assert model.timesteps == T  # an ANN's checkpoint says nothing about the neurons


@every_family
def test_gradients_and_checkpointing(family):
    """Every parameter learns; gradient checkpointing changes neither the loss nor a gradient."""
    x, y = _images(family, batch=3).double(), torch.tensor([0, 1, 2])
    losses, grads = [], []
    for checkpointing in (False, True):
        model = _spiking(family, torch.float64).train()
        if checkpointing and family in NO_CHECKPOINTING:
            with pytest.raises(AssertionError, match='not supported'):
                model.set_grad_checkpointing(True)
            continue
        model.set_grad_checkpointing(checkpointing)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        losses.append(loss.detach())
        grads.append({n: p.grad for n, p in model.named_parameters()})
    plain, checkpointed = grads[0], grads[-1]
    assert not [n for n, g in plain.items() if g is None or not g.isfinite().all()]
    assert sum(bool(g.any()) for g in plain.values()) > .9 * len(plain)  # a silent layer may have none, not the model
    torch.testing.assert_close(losses[0], losses[-1], **ROUND_OFF)
    for name, grad in plain.items():
        torch.testing.assert_close(checkpointed[name], grad, msg=lambda m: f'{name}: {m}', **ROUND_OFF)


@every_family
@torch.no_grad()
def test_batch_equals_its_samples(family):
    model, x = _spiking(family, torch.float64), _images(family, batch=3).double()
    out = model(x, per_step=True)
    alone = torch.cat([model(sample[None], per_step=True) for sample in x], dim=1)
    torch.testing.assert_close(out, alone, **ROUND_OFF)


@every_family
@torch.no_grad()
def test_features_only(family):
    f = FAMILIES[family]
    x = _images(family)
    expected = timm.create_model(f.name, features_only=True, **f.kwargs).eval()(x)
    model = timm.create_model(f'spiking_{f.name}', features_only=True, timesteps=T, **f.neuron, **f.kwargs)
    _give_statistics(model, x)
    model.eval()
    features = model(x)
    assert isinstance(features, list) and _neurons(model) and _count(model, ANALOG) == 0
    assert [i.shape for i in features] == [i.shape for i in expected]
    steps = model(x, per_step=True)
    assert [s.shape for s in steps] == [(T,) + i.shape for i in expected]
    assert all(torch.equal(s.mean(0), i) for s, i in zip(steps, features))
    assert features[-1].any()


@every_family
@torch.no_grad()
def test_reset_classifier(family):
    model, x = _spiking(family), _images(family)
    neurons = len(_neurons(model))
    model.reset_classifier(7)
    assert model(x).shape == (B, 7) and model(x, per_step=True).shape == (T, B, 7)
    model.reset_classifier(0)
    assert model(x).shape == model.forward_head(model.forward_features(x), pre_logits=True).shape
    assert len(_neurons(model)) == neurons and _count(model, ANALOG) == 0


# ---------------------------------------------------------------------------------------------------- time

class _Stateful(nn.Module):
    """One step of the neuron per call, with its membrane kept between calls."""

    def __init__(self, tau: float, v_threshold: float, v_reset: Optional[float]):
        super().__init__()
        self.tau, self.v_threshold, self.v_reset = tau, v_threshold, v_reset
        self.v = None

    def forward(self, x):
        if self.v is None:
            self.v = torch.full_like(x, 0. if self.v_reset is None else self.v_reset)
        u = self.tau * self.v + x
        spikes = (u >= self.v_threshold).to(x.dtype)
        self.v = u - self.v_threshold * spikes if self.v_reset is None else u * (1 - spikes) + self.v_reset * spikes
        return spikes


@pytest.mark.parametrize('neuron', [
    dict(tau=.9, v_threshold=.3, v_reset=0.),
    dict(tau=.9, v_threshold=.3, v_reset='soft'),
    dict(tau=.5, v_threshold=.2, v_reset=-.1),
], ids=['hard', 'soft', 'below'])
@pytest.mark.parametrize('frames', [None, 4], ids=['static', 'event'])
@small_families
@torch.no_grad()
def test_folded_time_equals_a_stateful_run(family, frames, neuron):
    steps = 4
    ann = _ann(family).double()
    model = convert_to_spiking(copy.deepcopy(ann), timesteps=steps, **neuron)
    x = _images(family, frames=frames).double()
    _give_statistics(model, x)
    model.eval()
    out = model(x, per_step=True)
    # what is compared has a dynamic: the same image gives other logits at other steps
    assert all((out[t] - out[0]).abs().max() > 1e-3 for t in (2, 3))

    ann.load_state_dict({k: v for k, v in model.state_dict().items() if k in ann.state_dict()})
    v_reset = None if neuron['v_reset'] == 'soft' else neuron['v_reset']
    for name, module in list(ann.named_modules()):
        if type(module).__name__ in ANALOG:
            ann.set_submodule(name, _Stateful(neuron['tau'], neuron['v_threshold'], v_reset))
    ann.eval()
    reference = torch.stack([ann(x if frames is None else x[:, t]) for t in range(steps)])
    torch.testing.assert_close(out, reference, **ROUND_OFF)
    torch.testing.assert_close(model(x), reference.mean(0), **ROUND_OFF)


@small_families
@torch.no_grad()
def test_set_timesteps_equals_a_fresh_conversion(family):
    model, x = _spiking(family), _images(family)
    for timesteps in (1, 2, 5):
        model.set_timesteps(timesteps)
        fresh = convert_to_spiking(_ann(family), timesteps=timesteps, **FAMILIES[family].neuron).eval()
        fresh.load_state_dict(model.state_dict())
        assert model.timesteps == fresh.timesteps == timesteps
        assert model(x, per_step=True).shape == (timesteps, B, K)
        assert torch.equal(model(x, per_step=True), fresh(x, per_step=True))  # exact: the same operations


@pytest.mark.parametrize('timesteps', [0, -1, 2.5, True])
def test_set_timesteps_refuses(timesteps):
    model = _spiking('test_resnet')
    with pytest.raises(ValueError, match='timesteps'):
        model.set_timesteps(timesteps)
    assert model.timesteps == T and {m.timesteps for m in _neurons(model)} == {T}


@small_families
@torch.no_grad()
def test_equal_frames_equal_the_static_image(family):
    model, x = _spiking(family), _images(family)
    frames = x[:, None].repeat(1, T, 1, 1, 1)
    assert torch.equal(model(frames), model(x))  # exact: the folded input is the same tensor
    assert torch.equal(model(frames, per_step=True), model(x, per_step=True))
    assert torch.equal(model.forward_features(frames), model.forward_features(x))
    final, intermediates = model.forward_intermediates(frames)
    assert torch.equal(final, model.forward_features(x)) and intermediates[0].shape[0] == B


@torch.no_grad()
def test_frames_reach_their_own_step():
    model, x = _spiking('test_resnet', torch.float64), _images(frames=T).double()
    model.set_timesteps(T)
    for module in _neurons(model):
        module.tau = 0.  # no memory: a step sees its own frame only
    out = model(x, per_step=True)
    model.set_timesteps(1)
    for t in range(T):
        torch.testing.assert_close(out[t], model(x[:, t]), **ROUND_OFF)


def test_wrong_input_raises():
    model = _spiking('test_resnet')
    with pytest.raises(ValueError, match=r'set_timesteps\(4\)'):
        model(_images(frames=T + 1))
    with pytest.raises(TypeError, match='dict'):
        model(dict(image=_images()))
    plain = convert_to_spiking(_Net(), timesteps=T)
    with pytest.raises(ValueError, match='set_timesteps'):
        plain(_images(frames=T - 1))
    with pytest.raises(TypeError, match='list'):
        plain([_images()])


# ---------------------------------------------------------------------------------------------------- it stays a model

def _pickled(model):
    return pickle.loads(pickle.dumps(model))


def _saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize('clone', [copy.deepcopy, _pickled, _saved])
@small_families
@torch.no_grad()
def test_copies_are_the_same_model_and_independent(family, clone):
    model, x = _spiking(family), _images(family)
    out = model(x)
    other = clone(model)
    assert type(other) is type(model) and other.timesteps == T and not other.training
    assert torch.equal(other(x), out)
    assert not {id(m) for m in model.modules()} & {id(m) for m in other.modules()}
    other.set_timesteps(1)
    assert model.timesteps == T and torch.equal(model(x), out)


@every_family
def test_instance_of_its_own_class(family):
    ann = _ann(family)
    cls = type(ann)
    model = convert_to_spiking(ann)
    assert model is ann and isinstance(model, cls) and type(model) is not cls
    assert model.timesteps == 4
    other = convert_to_spiking(_ann(family), timesteps=2)
    assert type(other) is type(model) and model.timesteps == 4


def test_methods_of_the_ann_still_work():
    for family in SMALL:
        ann, model = _ann(family), _spiking(family)
        if hasattr(ann, 'no_weight_decay'):
            assert model.no_weight_decay() == ann.no_weight_decay()
        assert model.group_matcher() == ann.group_matcher()
        assert list(model.feature_info) == list(ann.feature_info)
        assert model.get_classifier().out_features == K
        groups = timm.models.group_parameters(model, model.group_matcher())
        assert groups == timm.models.group_parameters(ann, ann.group_matcher())


def test_torchscript_says_what_to_use_instead():
    with pytest.raises(RuntimeError, match='torch.compile'):
        torch.jit.script(_spiking('test_resnet'))


@small_families
@torch.no_grad()
def test_channels_last(family):
    model, x = _spiking(family, torch.float64), _images(family).double()
    out = model(x)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), out, **ROUND_OFF)
    model = model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), out, **ROUND_OFF)


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
@small_families
def test_dtypes(family, dtype):
    model, x = _spiking(family, dtype).train(), _images(family).to(dtype)
    out = model(x)
    assert out.dtype == dtype and out.shape == (B, K) and out.isfinite().all()
    out.float().sum().backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in model.parameters())
    other = convert_to_spiking(_ann(family)).to(dtype)
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
    model, x = _spiking('deit_tiny_distilled'), _images('deit_tiny_distilled')
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
    model, x = _spiking('test_vit'), _images('test_vit')
    _, intermediates = model.forward_intermediates(x, return_prefix_tokens=True)
    tokens = model.num_prefix_tokens
    assert all(prefix.shape[:2] == (B, tokens) and spatial.shape[0] == B for spatial, prefix in intermediates)
    out = model.forward_intermediates(x, output_dict=True)
    assert out['image_features'].shape[0] == T * B
    assert all(i.shape[0] == B for i in out['image_intermediates'])


# ---------------------------------------------------------------------------------------------------- refusals

@pytest.mark.parametrize('name,value', [
    ('timesteps', 0), ('timesteps', -1), ('timesteps', 2.5), ('timesteps', True),
    ('tau', -.1), ('tau', 1.5), ('tau', float('nan')),
    ('v_threshold', 0.), ('v_threshold', -1.), ('v_threshold', float('nan')),
    ('v_reset', 'hard'), ('v_reset', .5), ('v_reset', 2.),
])
def test_bad_settings_name_the_argument_and_change_nothing(name, value):
    model = _Net()
    with pytest.raises(ValueError, match=name):
        convert_to_spiking(model, **{name: value})
    assert type(model) is _Net and type(model.act) is nn.ReLU


def test_nothing_to_swap_raises_and_changes_nothing():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(.5))
    with pytest.raises(ValueError, match='Sequential'):
        convert_to_spiking(model, timesteps=4)
    assert [type(m) for m in model] == [nn.Linear, nn.Dropout] and type(model) is nn.Sequential
    assert model.train()(torch.ones(3, 4)).shape == (3, 4)


def test_converting_twice_raises():
    model = _spiking('test_resnet')
    with pytest.raises(ValueError, match='set_timesteps'):
        convert_to_spiking(model)
    assert model(_images()).shape == (B, K)


def test_compiled_model_raises():
    with pytest.raises(ValueError, match='compile'):
        convert_to_spiking(torch.compile(_Net()))
    model = _Net()
    model.compile()
    with pytest.raises(ValueError, match='compile'):
        convert_to_spiking(model)
    inside = nn.Sequential(nn.Conv2d(3, 3, 1), torch.compile(_Net()))
    with pytest.raises(ValueError, match="'1'"):
        convert_to_spiking(inside)
    assert type(model.act) is nn.ReLU


class _CallsRelu(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return F.relu(self.conv(x))


class _CallsGelu(_CallsRelu):
    def forward(self, x):
        return torch.nn.functional.gelu(self.conv(x))


class _CallsTanh(_CallsRelu):
    def forward(self, x):
        return torch.tanh(self.conv(x))


class _CallsMethod(_CallsRelu):
    def forward(self, x):
        return self.conv(x).relu()


class _CallsImported(_CallsRelu):
    def forward(self, x):
        return relu(self.conv(x))


class _CallsInHelper(_CallsRelu):
    def _activated(self, x):
        return F.relu(self.conv(x))

    def forward(self, x):
        return self._activated(x)


class _HoldsFunction(_CallsRelu):
    def __init__(self):
        super().__init__()
        self.activation = F.relu

    def forward(self, x):
        return self.activation(self.conv(x))


class _InPlace(_CallsRelu):
    def forward(self, x):
        x = self.conv(x)
        F.relu(x, inplace=True)
        return x


class _InPlaceMethod(_CallsRelu):
    def forward(self, x):
        return self.conv(x).relu_() * 1.


class _Module(_CallsRelu):
    def __init__(self):
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(self.conv(x))


PARTS = [_CallsRelu, _CallsGelu, _CallsTanh, _CallsMethod, _CallsImported, _CallsInHelper, _HoldsFunction, _InPlace,
         _InPlaceMethod]


@pytest.mark.parametrize('root', [True, False], ids=['itself', 'inside'])
@pytest.mark.parametrize('part', PARTS)
def test_functional_activation_is_a_neuron_as_a_module_is(part, root):
    """The same weights with the activation as a module: same output and gradients, bit for bit."""
    def build(kind):
        torch.manual_seed(1)
        net = kind() if root else nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), kind())
        return convert_to_spiking(net, timesteps=T)

    model, reference = build(part), build(_Module)
    torch.manual_seed(2)
    x = torch.randn(3, 4, 5, 5)
    outputs = []
    for net in (model, reference):
        y = net(x, per_step=True)
        y.square().sum().backward()
        outputs.append((y.detach(), [p.grad for p in net.parameters()]))
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert all(torch.equal(a, b) for a, b in zip(outputs[0][1], outputs[1][1]))
    assert set(outputs[0][0].unique().tolist()) <= {0., 1.}
    record = model.spiking_report()[-1]
    assert record.name.endswith('functional_act') and record.now == 'LIF' and 'function' in record.reason
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(clone(x), model(x))
        clone.set_timesteps(2)
        assert clone(x, per_step=True).shape[0] == 2 and model(x, per_step=True).shape[0] == T


def test_function_outside_the_model_is_untouched():
    convert_to_spiking(_CallsRelu(), timesteps=T)(torch.randn(2, 4, 3, 3))
    assert torch.equal(F.relu(torch.tensor([-1., 2.5])), torch.tensor([0., 2.5]))
    plain = _CallsRelu()  # nor is another instance of the class
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(plain(x), plain.conv(x).clamp(min=0))


def test_analog_module_inside_a_module_with_functions_is_refused_by_name():
    class Outer(_CallsRelu):
        def __init__(self):
            super().__init__()
            self.inner = nn.ReLU6()

        def forward(self, x):
            return F.relu(self.inner(self.conv(x)))

    model = Outer()
    with pytest.raises(NotImplementedError, match="'inner'"):
        convert_to_spiking(model, exclude='inner')
    assert type(model) is Outer and type(model.inner) is nn.ReLU6 and 'functional_act' not in model._modules


class _MentionsRelu(_Net):
    def forward(self, x):
        """Unlike the original, which called F.relu(x) here, the activation is a module."""
        return super().forward(x)


def test_a_comment_is_no_activation():
    model = convert_to_spiking(_MentionsRelu(), timesteps=T)
    assert isinstance(model.act, LIF) and model(_images()).shape == (B, K)


@pytest.mark.parametrize('training', [True, False])
def test_activation_inside_a_torch_layer(training):
    """nn.TransformerEncoderLayer calls its activation as a function, and in eval mode a fused kernel without it."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0., batch_first=True, dtype=torch.float64)
    linear2 = layer.linear2
    model = convert_to_spiking(nn.Sequential(nn.Linear(8, 8, dtype=torch.float64), layer), timesteps=T).train(training)
    assert [r.was for r in model.spiking_report().neurons] == ['relu']
    seen = []
    linear2.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    with torch.no_grad():
        out = model(x)
        assert set(seen[0].unique().tolist()) == {0., 1.}
        assert torch.allclose(out, torch.cat([model(x[i:i + 1]) for i in range(3)]), rtol=0, atol=1e-12)  # round-off


def test_recurrent_layer_stays_analog_and_is_reported():
    class Recurrent(_Net):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(3, 3, batch_first=True)

        def forward(self, x):
            b, c, h, w = x.shape
            x = self.lstm(x.flatten(2).transpose(1, 2))[0].transpose(1, 2).reshape(b, c, h, w)
            return super().forward(x)

    model = convert_to_spiking(Recurrent(), timesteps=T)
    record, = [r for r in model.spiking_report() if r.name == 'lstm']
    assert record.now == 'LSTM' and 'recurrent' in record.reason
    assert model(_images()).shape == (B, K)


def test_refusal_of_noise_changes_nothing():
    """AlphaDropout cannot share its mask: it is refused before the activation ahead of it is swapped."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Dropout(.5), nn.AlphaDropout(.5))
    with pytest.raises(NotImplementedError, match='AlphaDropout'):
        convert_to_spiking(model)
    assert [type(m) for m in model] == [nn.Linear, nn.ReLU, nn.Dropout, nn.AlphaDropout]


# ---------------------------------------------------------------------------------------------------- any nn.Module

@torch.no_grad()
def test_plain_module():
    net = _Net()
    model = convert_to_spiking(net, timesteps=T).eval()
    assert model is net and isinstance(model.act, LIF)
    x = _images()
    assert model(x).shape == (B, K) and model(x, per_step=True).shape == (T, B, K)
    assert torch.equal(model(x, per_step=True).mean(0), model(x))
    assert torch.equal(model(x[:, None].repeat(1, T, 1, 1, 1)), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x)) and torch.equal(_pickled(model)(x), model(x))
    assert model.load_state_dict(_Net().state_dict(), strict=True)


@pytest.mark.parametrize('build', [torchvision.models.resnet18, torchvision.models.mobilenet_v3_small])
def test_torchvision(build):
    torch.manual_seed(0)
    ann = build(num_classes=K)
    state = copy.deepcopy(ann.state_dict())
    model = convert_to_spiking(ann, timesteps=T)
    model.load_state_dict(state, strict=True)
    assert _neurons(model) and _count(model, ANALOG) == 0
    x = _images()
    out = model.train()(x)
    out.sum().backward()
    assert out.shape == (B, K) and model(x, per_step=True).shape == (T, B, K)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


class _Outputs(NamedTuple):
    logits: torch.Tensor
    features: torch.Tensor


class _Structured(_Net):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        features = self.act(self.bn(self.conv(x)))
        logits = self.fc(features.mean((2, 3)))
        if self.kind is dict:
            return dict(logits=logits, features=[features])
        return _Outputs(logits, features) if self.kind is _Outputs else self.kind([logits, features])


@pytest.mark.parametrize('kind', [list, tuple, dict, _Outputs])
def test_structured_output_is_decoded_entry_by_entry(kind):
    model, x = convert_to_spiking(_Structured(kind), timesteps=T), _images()
    out, steps = model(x), model(x, per_step=True)
    assert type(out) is type(steps) is kind
    logits, features = (out['logits'], out['features'][0]) if kind is dict else out
    assert logits.shape == (B, K) and features.shape[:2] == (B, 4)
    assert (steps['logits'] if kind is dict else steps[0]).shape == (T, B, K)


class _Shared(nn.Module):
    """One activation under two names, one of them called twice."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.act = nn.ReLU()
        self.same_act = self.act

    def forward(self, x):
        x = self.act(self.conv1(x))
        x = self.act(self.conv2(x))
        return self.same_act(x - .1).mean((2, 3))


@torch.no_grad()
def test_shared_activation_stays_one_neuron_without_memory():
    torch.manual_seed(0)
    model = convert_to_spiking(_Shared(), timesteps=T, v_threshold=.05)
    assert model.act is model.same_act and len(_neurons(model)) == 1
    assert len([r for r in model.spiking_report() if r.now == 'LIF']) == 1
    x = _images()
    out = model(x)
    assert out.any() and torch.equal(model(x), out)  # a call leaves nothing behind
    other = copy.deepcopy(model)
    assert other.act is other.same_act and torch.equal(other(x), out)
    # every place starts from rest, as three separate neurons would
    neuron = dict(timesteps=T, v_threshold=.05)
    h = LIF(**neuron)(model.conv1(torch.cat([x] * T)))
    h = LIF(**neuron)(model.conv2(h))
    lone = LIF(**neuron)(h - .1).mean((2, 3)).unflatten(0, (T, B)).mean(0)
    assert torch.equal(out, lone)


def test_forward_hooks_survive_the_swap():
    net, seen = _Net(), []
    handle = net.act.register_forward_hook(lambda m, i, o: seen.append((type(m), o)))
    pre = net.act.register_forward_pre_hook(lambda m, i: seen.append('pre'))
    model = convert_to_spiking(net, timesteps=T)
    model(_images())
    assert seen[0] == 'pre' and seen[1][0] is LIF and seen[1][1].shape[0] == T * B
    handle.remove()
    pre.remove()
    model(_images())
    assert len(seen) == 2


def test_backward_hooks_survive_the_swap():
    net, seen = _Net(), []
    handle = net.act.register_full_backward_hook(lambda m, grad_in, grad_out: seen.append(grad_out[0].shape))
    model = convert_to_spiking(net, timesteps=T)
    model(_images()).sum().backward()
    assert seen and seen[0][0] == T * B
    handle.remove()
    model(_images()).sum().backward()
    assert len(seen) == 1


@pytest.mark.parametrize('training', [True, False])
def test_training_flag_is_kept(training):
    net = _Net().train(training)
    net.bn.eval()  # a frozen norm stays frozen
    model = convert_to_spiking(net)
    assert model.training is training and model.act.training is training and model.bn.training is False


def test_requires_grad_and_parameter_identity_are_kept():
    net = _Net()
    net.conv.weight.requires_grad_(False)
    before = {n: id(p) for n, p in net.named_parameters()}
    model = convert_to_spiking(net)
    assert {n: id(p) for n, p in model.named_parameters()} == before  # an optimizer made before still trains it
    assert not model.conv.weight.requires_grad


class RelPosMlp(nn.Module):
    """Named as timm's: its input is a table of coordinates and has no batch axis."""

    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(2, 8), nn.GELU(), nn.Linear(8, 4)
        self.drop = nn.Dropout(0.)

    def forward(self):
        return self.fc2(self.act(self.fc1(torch.ones(T * 3, 2)))).mean(0)


class _WithBias(_Net):
    def __init__(self):
        super().__init__()
        self.rel_pos = RelPosMlp()

    def forward(self, x):
        return self.fc(self.act(self.bn(self.conv(x))).mean((2, 3)) + self.rel_pos())


def test_position_bias_stays_analog_and_is_reported():
    net = _WithBias()
    bias = net.rel_pos()
    model = convert_to_spiking(net, timesteps=T)
    assert type(model.rel_pos.act) is nn.GELU and isinstance(model.act, LIF)
    assert torch.equal(model.rel_pos(), bias)
    record, = [r for r in model.spiking_report() if r.name.startswith('rel_pos')]
    assert record.now != 'LIF' and 'position bias' in record.reason
    assert model(_images()).shape == (B, K)


@torch.no_grad()
def test_swinv2_cr_position_bias():
    """timm's own: with T dividing the table's rows a neuron there would mix positions in silence."""
    kwargs = dict(img_size=32, window_size=2, embed_dim=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), num_classes=K)
    torch.manual_seed(0)
    model = timm.create_model('spiking_swinv2_cr_tiny_224', timesteps=T, **kwargs).eval()
    biases = [r for r in model.spiking_report() if 'position bias' in r.reason]
    assert len(biases) == 4 and all('meta_mlp' in r.name for r in biases)
    assert _count(model, ANALOG) == 4 and _neurons(model)
    assert model(_images()).shape == (B, K)


@pytest.mark.parametrize('family,gate', [('seresnet18', 'Sigmoid'), ('regnety_002', 'Sigmoid'),
                                         ('efficientnet_b0', 'Sigmoid'), ('mobilenetv3_small_050', 'Hardsigmoid')])
def test_squeeze_excite_gate_stays_analog_and_is_reported(family, gate):
    ann, model = _ann(family), _spiking(family)
    gates = [n for n, m in ann.named_modules() if 'sigmoid' in type(m).__name__.lower()]
    assert gates and [type(model.get_submodule(n)) for n in gates] == [type(ann.get_submodule(n)) for n in gates]
    records = {r.name: r for r in model.spiking_report() if 'gate' in r.reason}
    assert set(records) == set(gates) and all(r.now == r.was for r in records.values())
    # the gate's input is the spiking squeeze: real values leave it
    seen = []
    model.get_submodule(gates[0]).register_forward_hook(lambda m, i, o: seen.append(o))
    model(_images(family))
    assert seen and ((seen[0] > 0) & (seen[0] < 1)).any()


def test_conversion_is_logged(caplog):
    with caplog.at_level(logging.INFO, logger='timm_sscl'):
        convert_to_spiking(_Net(), timesteps=2)
    assert '1 activations became LIF' in caplog.text and 'timesteps=2' in caplog.text


def test_token_mixing_over_the_batch_is_refused():
    class Mixing(_Net):
        mix_token = True

    with pytest.raises(NotImplementedError, match='without mix_token'):
        convert_to_spiking(Mixing())


class _WithTable(_Net):
    """A position bias that no name tells: T divides the rows of its table."""

    def __init__(self):
        super().__init__()
        self.table = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 4))
        self.table2 = _Table()

    def forward(self, x):
        table = self.table(torch.ones(T * 3, 2, device=x.device)) + self.table2(torch.ones(T * 3, 2, device=x.device))
        return self.fc(self.act(self.bn(self.conv(x))).mean((2, 3)) + table.mean(0))


class _Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 4)

    def forward(self, x):
        return F.gelu(self.fc(x))


def test_activation_without_a_batch_axis_is_found_by_a_probe():
    net = _WithTable()
    calls = []
    net.act.register_forward_hook(lambda *_: calls.append(1))
    net.train()
    state = torch.get_rng_state()
    model = convert_to_spiking(net, timesteps=T)
    assert torch.equal(torch.get_rng_state(), state) and not calls and model.training and model.act.training
    assert type(model.table[1]) is nn.ReLU and 'functional_act' not in model.table2._modules
    assert isinstance(model.act, LIF)
    reasons = {r.name: r.reason for r in model.spiking_report()}
    assert 'no batch axis' in reasons['table.1'] and 'no batch axis' in reasons['table2.functional_act']
    model(_images())
    assert calls == [1]


def test_probe_of_an_input_that_cannot_be_guessed():
    class Odd(_Net):
        def forward(self, x):
            assert x.shape[-1] == 77
            return super().forward(x)

    with pytest.raises(ValueError, match='example_inputs.*input_size'):
        convert_to_spiking(Odd())
    assert isinstance(convert_to_spiking(Odd(), input_size=(3, 77, 77)).act, LIF)
    assert isinstance(convert_to_spiking(Odd(), example_inputs=torch.zeros(1, 3, 77, 77)).act, LIF)


# -------------------------------------------------------------------------------------------- hidden in norms, split

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


# -------------------------------------------------------------------------------------------------------- the policy

def _left(model):
    return {r.name for r in model.spiking_report() if r.now != 'LIF'}


def test_exclude_by_name_class_and_surrounding():
    create = functools.partial(timm.create_model, 'spiking_seresnet18', num_classes=K)
    every = {r.name for r in create().spiking_report()}
    gates = _left(create())
    assert _left(create(exclude='layer4')) - gates == {n for n in every if n.startswith('layer4.')} - gates
    assert _left(create(exclude=['layer1.0.act1', 'act1'])) - gates == {'layer1.0.act1', 'act1'}
    se = {n for n in every if '.se.' in n} - gates
    assert se and _left(create(exclude=['squeeze_excite'])) - gates == se == _left(create(exclude=['SEModule'])) - gates
    model = create(include=['layer*', 'act1'], exclude='SEModule')
    assert _left(model) == gates | se and isinstance(model.act1, LIF)
    assert _left(create(include='act1')) == every - {'act1'}
    assert isinstance(create(include=['*', 'Sigmoid']).layer1[0].se.gate, LIF)
    assert not isinstance(create(include='*').layer1[0].se.gate, LIF)


def test_groups_attention_and_head():
    model = timm.create_model('spiking_efficientvit_b0', exclude=['attention', 'head'])
    kernels = [n for n in _left(model) if 'context_module' in n]
    assert (kernels and any(n.startswith('head.') for n in _left(model))
            and not any('local_module' in n for n in _left(model)))
    plain = timm.create_model('spiking_efficientvit_b0')
    assert all(n.endswith('.div') for n in _left(plain))  # what linear attention divides by
    head = timm.create_model('spiking_mobilenetv3_small_050', exclude='head')
    assert 'act2' in _left(head) and 'bn1.act' not in _left(head)


@pytest.mark.parametrize('name', ['include', 'exclude'])
def test_pattern_that_matches_nothing_raises_and_changes_nothing(name):
    model = _Net()
    with pytest.raises(ValueError, match="'layer9'.*act"):
        convert_to_spiking(model, **{name: ['*', 'layer9']})
    assert type(model) is _Net and type(model.act) is nn.ReLU


def test_nothing_left_to_swap_raises():
    with pytest.raises(ValueError, match='nothing would spike'):
        convert_to_spiking(_Net(), exclude='*')


@pytest.mark.parametrize('name,policy', [
    ('test_efficientnet', dict(exclude=('squeeze_excite', 'head'))), ('test_efficientnet_evos', dict(exclude=('bn1',))),
    ('test_resnet', dict(include=('layer2', 'layer3', 'layer4'))), ('test_resnet', {})])
def test_policy_travels_with_the_checkpoint(name, policy):
    torch.manual_seed(0)
    source = timm.create_model(f'spiking_{name}', num_classes=K, timesteps=2, **policy).eval()
    x = torch.randn(B, 3, 64, 64)
    for own in ({}, dict(exclude=('*1*',))):
        model = timm.create_model(f'spiking_{name}', num_classes=K, **own).eval()
        model._explicit = frozenset()  # as if it had been restored from another checkpoint
        model.load_state_dict(source.state_dict(), strict=True)
        assert torch.equal(model(x), source(x)) and _left(model) == _left(source)
    kept = timm.create_model(f'spiking_{name}', num_classes=K, exclude=('*1*',)).eval()
    kept.load_state_dict(source.state_dict(), strict=False)  # an EvoNorm that stays analog misses its v
    assert kept.settings.exclude == ('*1*',)  # what was asked for stays


def test_policy_holds_for_a_new_head():
    model = timm.create_model('spiking_efficientvit_b0', exclude='head', num_classes=K)
    model.reset_classifier(4)
    assert any(n.startswith('head.') for n in _left(model)) and not any(
        isinstance(m, LIF) for m in model.head.modules())
    assert len({r.name for r in model.spiking_report()}) == len(model.spiking_report())


def test_anns_parameters_of_swapped_activations_load_strictly(caplog):
    ann = timm.create_model('poolformerv2_s12', num_classes=K)
    model = timm.create_model('spiking_poolformerv2_s12', num_classes=K)
    starrelu = [n for n, m in ann.named_modules() if type(m).__name__ == 'StarReLU']
    assert starrelu
    with caplog.at_level(logging.INFO, logger='timm_sscl'):
        model.load_state_dict(ann.state_dict(), strict=True)
    assert f'{2 * len(starrelu)} parameters' in caplog.text
    with pytest.raises(RuntimeError, match='nonsense'):
        model.load_state_dict({**ann.state_dict(), 'nonsense': torch.ones(1)})


# -------------------------------------------------------------------------------------------------------- the report

class _Foreign(nn.Module):
    """A user's own neuron."""

    def forward(self, x):
        return (x > 0).to(x.dtype)


class _OwnLIF(LIF):
    pass


def test_report_tells_what_the_model_is_now():
    model = convert_to_spiking(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.GELU(), nn.ReLU6()))
    assert len(model.spiking_report().neurons) == 3
    model[1], model[3] = _Foreign(), _OwnLIF(4)
    report = model.spiking_report()
    assert [(r.name, r.was, r.now) for r in report] == [
        ('1', 'ReLU', '_Foreign'), ('3', 'GELU', '_OwnLIF'), ('4', 'ReLU6', 'LIF')]
    assert [r.name for r in report.neurons] == ['3', '4'] and '2 neuron layers' in str(report)
    assert 'replaced by _Foreign' in str(report)
    model.append(nn.SiLU()).append(nn.Sequential(LIF(4)))
    report = model.spiking_report()
    assert [(r.name, r.now) for r in report.analog] == [('1', '_Foreign'), ('5', 'SiLU')]
    assert [r.name for r in report.neurons] == ['3', '4', '6.0'] and 'added after the conversion' in str(report)


class _This(nn.Module):
    """A method whose first argument has another name."""

    def __init__(this):
        super().__init__()
        this.relu, this.fc = nn.ReLU(), nn.Linear(4, 4)

    def forward(this, x):
        return this.relu(this.fc(x))


def test_own_modules_are_no_functions_whatever_the_first_argument_is_called():
    model = convert_to_spiking(_This(), timesteps=T)
    assert [r.name for r in model.spiking_report()] == ['relu'] and len(_neurons(model)) == 1


def test_conversion_of_a_flattening_network_is_quiet():
    """A probe that fails on a first guess says nothing."""
    code = ('import torch.nn as nn; from timm_sscl import convert_to_spiking; '
            'convert_to_spiking(nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.ReLU(), nn.Linear(8, 2))); '
            'convert_to_spiking(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2704, 2)))')
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and not run.stdout and not run.stderr
