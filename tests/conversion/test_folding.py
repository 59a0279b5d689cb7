"""Time is folded into the batch once, whichever way a converted model is entered, and nowhere outside of it."""
import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from timm_sscl import LIF, calibrate, convert_to_spiking

T = 2


class _Net(nn.Module):
    """A block of its own, a method besides forward, dropout."""

    def __init__(self, use_reentrant=None):
        super().__init__()
        self.use_reentrant = use_reentrant
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU())
        self.drop = nn.Dropout(.5)
        self.fc = nn.Linear(4, 5)

    def features(self, x):
        x = self.stem(x)
        return self.block(x) if self.use_reentrant is None else checkpoint(
            self.block, x, use_reentrant=self.use_reentrant)

    def forward(self, x):
        return self.fc(self.drop(self.features(x).mean((2, 3))))


def _net(timesteps=T, **kwargs):
    torch.manual_seed(0)
    return convert_to_spiking(_Net(**kwargs), timesteps=timesteps, v_threshold=.1)


def _images(batch, size=9):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def _leaves(out):
    if isinstance(out, torch.Tensor):
        return [out]
    return [leaf for part in (out.values() if isinstance(out, dict) else out) for leaf in _leaves(part)]


def _assert_samples_apart(run, images):
    """The batch equals its parts of 1, T and an odd number of samples, and samples differ."""
    whole = _leaves(run(images))
    assert all(w.shape[0] == len(images) for w in whole)
    assert any((w[0] != w[1]).any() for w in whole)
    for batch in (1, 2, 3, 4):
        # round-off of sums in float64
        assert all(torch.allclose(w[:batch], part, rtol=0, atol=1e-12)
                   for w, part in zip(whole, _leaves(run(images[:batch])), strict=True))


def _entry_points(model):
    yield lambda x: model(x)
    yield lambda x: model.forward_head(model.forward_features(x))
    yield lambda x: model.forward_head(model.forward_features(x), pre_logits=True)
    yield lambda x: model.forward_intermediates(x)[1]
    yield lambda x: model.forward_intermediates(x, intermediates_only=True)
    yield lambda x: model.forward_head(model.forward_intermediates(x)[0])


@pytest.mark.parametrize('timesteps', [1, T])
@torch.no_grad()
def test_samples_stay_apart_through_every_entry_point(timesteps):
    torch.manual_seed(0)
    model = timm.create_model('spiking_test_resnet', timesteps=timesteps, num_classes=5).eval()
    calibrate(model, _images(4, 32))
    model.double()
    for run in _entry_points(model):
        _assert_samples_apart(run, _images(4, 32).double())


@pytest.mark.parametrize('feature_cls', ['hook', 'list', 'dict', 'getter', 'fx'])
@torch.no_grad()
def test_samples_stay_apart_in_every_features_only_wrapper(feature_cls):
    torch.manual_seed(0)
    model = timm.create_model('spiking_test_resnet', timesteps=T, features_only=True, feature_cls=feature_cls).eval()
    calibrate(model, _images(4, 32))
    _assert_samples_apart(model.double(), _images(4, 32).double())


@torch.no_grad()
def test_a_forward_that_bypasses_forward_features():
    """HRNet's features_only."""
    torch.manual_seed(0)
    model = timm.create_model('spiking_hrnet_w18_small', timesteps=T, features_only=True).eval()
    calibrate(model, _images(4, 32))
    _assert_samples_apart(model.double(), _images(4, 32).double())


@pytest.mark.parametrize('batch', [1, T, 3, 2 * T])
def test_a_part_outside_of_its_model_raises_whatever_the_batch(batch):
    model, x = _net(), _images(batch)
    paths = [nn.Sequential(model.stem, model.block), model.features, lambda x: model.stem[2](model.stem[:2](x)),
             copy.deepcopy(model).features, lambda x: model.train().drop(x)]
    for path in paths:
        with pytest.raises(RuntimeError, match='outside'):
            path(x)
    assert model(x).shape == (batch, 5)  # an error leaves nothing behind
    with pytest.raises(RuntimeError, match='outside'):
        model.features(x)


def test_an_error_inside_the_model_leaves_nothing_folded():
    model = _net()
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 7, 9, 9))
    with pytest.raises(RuntimeError, match='outside'):
        model.features(_images(4))


def test_functional_activation_outside_of_its_model_raises():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return F.relu(self.conv(x))

    model = convert_to_spiking(nn.Sequential(Block(), nn.Flatten()), timesteps=T)
    assert model(_images(3)).shape[0] == 3
    with pytest.raises(RuntimeError, match='outside'):
        model[0](_images(4))


class _Functional(nn.Module):
    """Nothing but functions: no module of it is a neuron."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 6), nn.Linear(6, 5)

    def features(self, x):
        return F.relu(self.fc1(x))

    def forward(self, x):
        return self.fc2(self.features(x))


@pytest.mark.parametrize('batch', [1, T, 3, 2 * T])
@pytest.mark.parametrize('root', [True, False], ids=['itself', 'inside'])
@torch.no_grad()
def test_a_method_with_functional_activations_raises_outside(root, batch):
    model = convert_to_spiking(_Functional() if root else nn.Sequential(_Functional(), nn.Identity()), timesteps=T)
    part, x = model if root else model[0], torch.randn(batch, 6)
    for method in (part.features, copy.deepcopy(part).features, pickle.loads(pickle.dumps(part)).features):
        with pytest.raises(RuntimeError, match='_Functional.features.* outside'):
            method(x)
    assert model(x).shape == (batch, 5)
    excluded = convert_to_spiking(nn.Sequential(_Functional(), nn.ReLU()), timesteps=T, exclude='0')
    assert torch.equal(excluded[0].features(x), excluded[0].fc1(x).relu())  # analog, so it may run anywhere


def test_compiled_part_outside_of_its_model_raises():
    model = _net()
    compiled = torch.compile(model, backend='eager', fullgraph=True)
    x = _images(3)
    assert torch.equal(compiled.eval()(x), model.eval()(x))
    with pytest.raises(RuntimeError, match='outside'):
        torch.compile(model.features, backend='eager')(x)


def test_compiles_again_in_a_thread_that_ran_no_model_before():
    """The compiler's guards hold after its first call, which marks the running model for the first time."""
    model, x = _net(), _images(3)  # a conversion runs the model, in this thread

    def run():
        compiled = torch.compile(model, backend='eager', fullgraph=True)
        compiled(x)
        return torch.equal(compiled.eval()(x), model.eval()(x))

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run).result()


@torch.no_grad()
def test_parts_run_on_folded_tensors_when_asked_to():
    model, x = _net().eval(), _images(3)
    with model.time_folded():
        features = model.features(torch.cat([x] * T))
    logits = model.fc(features.mean((2, 3))).unflatten(0, (T, 3)).mean(0)
    assert torch.equal(logits, model(x))


def test_a_neuron_alone_needs_no_model():
    assert LIF(T)(torch.ones(2 * T, 3)).shape == (2 * T, 3)
    assert nn.Sequential(nn.Linear(3, 3), LIF(T))(torch.ones(2 * T, 3)).shape == (2 * T, 3)


@pytest.mark.parametrize('use_reentrant', [True, False])
def test_gradient_checkpointing_computes_again_in_the_backward(use_reentrant):
    plain, checkpointed = _net().eval(), _net(use_reentrant=use_reentrant).eval()
    for model in (plain, checkpointed):
        model(_images(3).requires_grad_()).square().sum().backward()
    for a, b in zip(plain.parameters(), checkpointed.parameters()):
        assert torch.equal(a.grad, b.grad)


def test_threads_fold_for_themselves():
    """While one thread is inside the model, another is not."""
    model, inside, done, raised = _net().eval(), threading.Event(), threading.Event(), []

    def wait(module, args, out):
        inside.set()
        done.wait(30)

    handle = model.stem.register_forward_hook(wait)
    thread = threading.Thread(target=model, args=(_images(2),))
    thread.start()
    assert inside.wait(30)
    try:
        model.block(torch.ones(4, 4, 5, 5))
    except RuntimeError as error:
        raised.append(error)
    done.set()
    thread.join()
    handle.remove()
    assert raised


class _Two(_Net):
    """A second input with the batch axis, an option without."""

    def forward(self, image, meta, scale=None):
        return super().forward(image) + meta * (1. if scale is None else scale)


def test_further_arguments_and_keywords_are_folded_with_the_images():
    torch.manual_seed(0)
    model = convert_to_spiking(_Two(), timesteps=T, example_inputs=(_images(1), torch.ones(1, 5))).eval()
    image, meta, scale = _images(3), torch.arange(15.).view(3, 5), torch.tensor(2.)
    without = model(image, torch.zeros(3, 5))
    # a mean over equal steps and a sum in another order, of numbers up to 28
    for out in (model(image, meta, scale), model(image, meta=meta, scale=scale),
                model(image=image, meta=meta, scale=scale), model(meta=meta, scale=scale, image=image)):
        torch.testing.assert_close(out, without + 2 * meta, rtol=0, atol=1e-4)
    frames = image[:, None].expand(-1, T, -1, -1, -1)
    torch.testing.assert_close(model(frames, meta), model(image, meta), rtol=0, atol=1e-4)


class _Around(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.decoder = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2))

    def forward(self, x):
        return self.decoder(self.encoder(x))


@torch.no_grad()
def test_a_spiking_part_of_a_converted_model_is_folded_once():
    torch.manual_seed(0)
    encoder = _net().eval()
    model = convert_to_spiking(_Around(_Net()), timesteps=T, input_size=(3, 9, 9), v_threshold=.01).eval()
    model.encoder = encoder
    x, seen = _images(3), []
    handle = encoder.stem.register_forward_hook(lambda m, args, out: seen.append(out.shape[0]))
    out = model(x, per_step=True)
    handle.remove()
    assert seen == [T * 3]  # not T * T * 3
    current = model.decoder[0](encoder(x, per_step=True)).flatten(0, 1)
    assert torch.equal(model.decoder[2](LIF(T, v_threshold=.01)(current)).unflatten(0, (T, 3)), out)
    encoder.set_timesteps(T + 1)
    with pytest.raises(ValueError, match='set_timesteps'):
        model(x)
