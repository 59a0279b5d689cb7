"""share_stem: the part before the first neuron once per image, with the numbers of the full expansion."""
import copy
import pickle

import pytest
import timm
import torch

import timm_sscl  # registers the spiking_ names
from timm_sscl import calibrate, share_stem

T, B = 3, 4


def _pair(name='test_resnet', **kwargs):
    torch.manual_seed(0)
    full = timm.create_model(f'spiking_{name}', timesteps=T, num_classes=10, **kwargs)
    images = torch.randn(B, 3, 32, 32)
    calibrate(full, images)
    shared = copy.deepcopy(full)
    share_stem(shared)
    return full.double(), shared.double(), images.double()


def _step(model, images):
    model.train().zero_grad()
    out = model(images, per_step=True)
    out.square().sum().backward()
    return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('name, first', [
    ('test_resnet', 'conv1.2'), ('test_efficientnet', 'bn1.act'), ('resnet20_cifar', 'conv1.2'),
    ('regnetx_002', 'stem.bn.act')])
def test_equals_the_full_expansion(name, first, memory_format):
    full, shared, images = _pair(name, **(dict(width=8) if name == 'resnet20_cifar' else {}))
    assert shared.settings.stem == first
    full, shared, images = (x.to(memory_format=memory_format) for x in (full, shared, images))
    (out, grads), (shared_out, shared_grads) = _step(full, images), _step(shared, images)
    scale = max(g.abs().max() for g in grads.values())
    # the same sums of float64 in another order (batch statistics over B instead of T * B equal rows)
    torch.testing.assert_close(shared_out, out, rtol=1e-9, atol=1e-9)
    for key, grad in grads.items():
        torch.testing.assert_close(shared_grads[key], grad, rtol=0, atol=1e-9 * scale.item(), msg=key)
    full.eval(), shared.eval()
    shared.load_state_dict({k: v for k, v in full.state_dict().items() if k != 'spiking_settings'})
    torch.testing.assert_close(shared(images), full(images), rtol=1e-12, atol=1e-12)


def test_stem_runs_on_the_images_only():
    full, shared, images = _pair()
    rows = []
    for model in (full, shared):
        model.conv1[0].register_forward_hook(lambda m, args, out: rows.append(out.shape[0]))
        model.layer1.register_forward_hook(lambda m, args, out: rows.append(out.shape[0]))
        model(images)
    assert rows == [T * B, T * B, B, T * B]


def test_running_variance_differs_by_the_unbiased_factor():
    full, shared, images = _pair()
    norm, shared_norm = full.conv1[1], shared.conv1[1]
    for n in (norm, shared_norm):
        n.reset_running_stats()
        n.momentum = 1.
    full.train()(images), shared.train()(images)
    rows = B * 16 * 16
    factor = (rows / (rows - 1)) / (T * rows / (T * rows - 1))
    torch.testing.assert_close(shared_norm.running_mean, norm.running_mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(shared_norm.running_var, norm.running_var * factor, rtol=1e-12, atol=0)


@pytest.mark.parametrize('name', ['test_convnext', 'test_vit'])
def test_refused_where_the_stem_reaches_on_another_way(name):
    model = timm.create_model(f'spiking_{name}', timesteps=T)
    before = copy.deepcopy(model.settings), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match='cannot run once per image: what follows takes from before it as well'):
        share_stem(model)
    assert model.settings == before[0] and model.timesteps == T
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before[1].values()))


def test_refused_where_noise_is_drawn_before_the_first_neuron():
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Dropout(.5), torch.nn.ReLU(), torch.nn.Flatten())
    model = timm_sscl.convert_to_spiking(net, timesteps=T)
    with pytest.raises(ValueError, match='1 draws its noise there'):
        share_stem(model)


def test_probe_leaves_the_model_as_it_was():
    torch.manual_seed(0)
    model = timm.create_model('spiking_test_resnet', timesteps=T)
    state, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    calls = []
    model.layer1.register_forward_hook(lambda *args: calls.append(1))
    share_stem(model)
    assert torch.equal(torch.get_rng_state(), rng) and not calls and model.training and model.timesteps == T
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items() if k != 'spiking_settings')
    assert share_stem(model) is model and model.settings.stem == 'conv1.2'  # again: nothing to do


def test_checkpoints_copies_timesteps_and_taking_it_back():
    full, shared, images = _pair()
    shared.eval(), full.eval()
    expected = shared(images)
    fresh = timm.create_model('spiking_test_resnet', num_classes=10).double().eval()
    fresh.load_state_dict(shared.state_dict())
    for model in (fresh, copy.deepcopy(shared), pickle.loads(pickle.dumps(shared))):
        assert model.settings.stem == 'conv1.2' and torch.equal(model(images), expected)
    shared.set_timesteps(2)
    assert shared(images, per_step=True).shape[0] == 2
    shared.set_timesteps(T)
    shared.set_stem(None)
    assert torch.equal(shared(images), full(images))


def test_event_frames_are_refused():
    _, shared, images = _pair()
    with pytest.raises(ValueError, match='event frames differ in time.*set_stem'):
        shared(images[:, None].expand(-1, T, -1, -1, -1))


def test_a_model_that_does_not_spike():
    with pytest.raises(ValueError, match='convert_to_spiking'):
        share_stem(timm.create_model('test_resnet'))
