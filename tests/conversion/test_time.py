"""Time folded into the batch, against a stateful run step by step; frames and other numbers of timesteps."""
import copy
from typing import Optional

import pytest
import timm
import torch
import torch.nn as nn

from spiking_families import (
    ANALOG, B, FAMILIES, K, Net, ROUND_OFF, T, ann_of, give_statistics, images_of, neurons_of, small_families,
    spiking_of)
from timm_sscl import convert_to_spiking


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
    ann = ann_of(family).double()
    model = convert_to_spiking(copy.deepcopy(ann), timesteps=steps, **neuron)
    x = images_of(family, frames=frames).double()
    give_statistics(model, x)
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
    model, x = spiking_of(family), images_of(family)
    for timesteps in (1, 2, 5):
        model.set_timesteps(timesteps)
        fresh = convert_to_spiking(ann_of(family), timesteps=timesteps, **FAMILIES[family].neuron).eval()
        fresh.load_state_dict(model.state_dict())
        assert model.timesteps == fresh.timesteps == timesteps
        assert model(x, per_step=True).shape == (timesteps, B, K)
        assert torch.equal(model(x, per_step=True), fresh(x, per_step=True))  # exact: the same operations


@pytest.mark.parametrize('timesteps', [0, -1, 2.5, True])
def test_set_timesteps_refuses(timesteps):
    model = spiking_of('test_resnet')
    with pytest.raises(ValueError, match='timesteps'):
        model.set_timesteps(timesteps)
    assert model.timesteps == T and {m.timesteps for m in neurons_of(model)} == {T}


@small_families
@torch.no_grad()
def test_equal_frames_equal_the_static_image(family):
    model, x = spiking_of(family), images_of(family)
    frames = x[:, None].repeat(1, T, 1, 1, 1)
    assert torch.equal(model(frames), model(x))  # exact: the folded input is the same tensor
    assert torch.equal(model(frames, per_step=True), model(x, per_step=True))
    assert torch.equal(model.forward_features(frames), model.forward_features(x))
    final, intermediates = model.forward_intermediates(frames)
    assert torch.equal(final, model.forward_features(x)) and intermediates[0].shape[0] == B


@torch.no_grad()
def test_frames_reach_their_own_step():
    model, x = spiking_of('test_resnet', torch.float64), images_of(frames=T).double()
    model.set_timesteps(T)
    for module in neurons_of(model):
        module.tau = 0.  # no memory: a step sees its own frame only
    out = model(x, per_step=True)
    model.set_timesteps(1)
    for t in range(T):
        torch.testing.assert_close(out[t], model(x[:, t]), **ROUND_OFF)


def test_wrong_input_raises():
    model = spiking_of('test_resnet')
    with pytest.raises(ValueError, match=r'set_timesteps\(4\)'):
        model(images_of(frames=T + 1))
    with pytest.raises(TypeError, match='dict'):
        model(dict(image=images_of()))
    plain = convert_to_spiking(Net(), timesteps=T)
    with pytest.raises(ValueError, match='set_timesteps'):
        plain(images_of(frames=T - 1))
    with pytest.raises(TypeError, match='list'):
        plain([images_of()])


class _Spectrogram(nn.Module):
    """Takes (B, H, W), as timm's config of it says."""
    pretrained_cfg = dict(input_size=(8, 8))

    def __init__(self):
        super().__init__()
        self.conv, self.act = nn.Conv2d(1, 4, 3), nn.ReLU()

    def forward(self, x):
        return self.act(self.conv(x.unsqueeze(1))).mean((2, 3))


@torch.no_grad()
def test_an_image_without_its_batch_axis():
    for name, kwargs in (('spiking_test_resnet', {}), ('spiking_test_vit', {}),
                         ('spiking_test_resnet', dict(features_only=True))):
        model = timm.create_model(name, timesteps=1, **kwargs).eval()
        image = torch.randn(*model.pretrained_cfg['input_size'])
        for call in (model, getattr(model, 'forward_features', model)):
            with pytest.raises(ValueError, match=r'\(B, C, H, W\).*shape \(3, 160, 160\).*x\[None\]'):
                call(image)
            with pytest.raises(ValueError, match=r'\(B, C, H, W\).*shape \(160, 160\)\.$'):
                call(image[0])
        assert len(model(image[None])) in (1, 5)  # logits of one image, or the maps of five stages


@torch.no_grad()
def test_three_axes_where_the_model_takes_them():
    """A model that adds the channels itself, and timm's NaFlex transformer, which takes patches (B, N, P * P * C)."""
    model = convert_to_spiking(_Spectrogram(), timesteps=2, input_size=(8, 8))
    assert model(torch.randn(3, 8, 8)).shape == (3, 4)
    flexible = timm.create_model(
        'spiking_naflexvit_base_patch16_gap', timesteps=2, num_classes=5, embed_dim=32, depth=1, num_heads=2).eval()
    coordinates = torch.tensor([(0, 0), (0, 1), (1, 0), (1, 1)]).expand(3, 4, 2)
    tokens = flexible.forward_features(torch.randn(3, 4, 16 * 16 * 3), patch_coord=coordinates)
    assert tokens['patches'].shape == (2 * 3, 4 + 4, 32)  # with four register tokens
