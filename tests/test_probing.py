"""Running a model once on an example: what it may take, and that it leaves no trace."""
import random

import numpy as np
import pytest
import torch
import torch.nn as nn

from timm_sscl import calibrate, convert_ann, convert_to_spiking, estimate_energy
from timm_sscl.probing import ProbeError, examples, probe, undisturbed


class _Restless(nn.Module):
    """Everything that a forward may change."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer('count', torch.zeros(()))
        self.calls, self.seen, self.last = 0, [], None
        self.cache = {}

    def forward(self, x):
        self.count += 1
        self.calls += 1
        self.seen.append(x)
        self.cache['x'] = self.last = x
        random.random(), np.random.rand()
        return self.fc(x) + torch.rand(4)


def test_a_probe_leaves_no_trace():
    model = _Restless().train()
    model.fc.eval()
    hooked = []
    handle = model.register_forward_hook(lambda *_: hooked.append(1))
    hooks, seen = model._forward_hooks, model.seen
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    out = probe(model, lambda example: example(model), batch=3)
    assert out.shape == (3, 4) and not out.requires_grad
    assert model.count == 0 and model.calls == 0 and model.last is None and not model.cache
    assert model.seen is seen and not seen
    assert model.training and not model.fc.training and not hooked and model._forward_hooks is hooks
    assert states[0] == random.getstate() and (states[1] == np.random.get_state()[1]).all()
    assert torch.equal(states[2], torch.get_rng_state())
    model(torch.zeros(2, 4))
    assert hooked == [1]
    handle.remove()


def test_hooks_of_a_probe_go_with_it():
    model, calls = nn.Linear(2, 2), []
    with undisturbed(model):
        model.register_forward_hook(lambda *_: calls.append(1))
        model(torch.zeros(1, 2))
    model(torch.zeros(1, 2))
    assert calls == [1] and not model._forward_hooks


def test_an_error_in_a_probe_leaves_no_trace_either():
    model = _Restless()
    with pytest.raises(ProbeError, match='example_inputs'):
        probe(model, lambda example: model(torch.zeros(2, 7)))
    assert model.calls == 0 and model.count == 0 and model.training


class _Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 8)
        self.rnn = nn.GRU(8, 8, batch_first=True)

    def forward(self, tokens):
        return self.rnn(self.embed(tokens))[0]


class _View(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3 * 8 * 8, 2)

    def forward(self, x):
        b, c, h, w = x.shape
        return self.fc(x.reshape(b, c * h * w))


@pytest.mark.parametrize('model', [
    nn.Sequential(nn.Conv1d(2, 3, 3), nn.Flatten(), nn.LazyLinear(2)).append(nn.ReLU())[:1],
    nn.Sequential(nn.Conv1d(2, 3, 7, stride=4), nn.Conv1d(3, 3, 7, stride=4), nn.Conv1d(3, 3, 7)),
    nn.Sequential(nn.Conv2d(1, 6, 5), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(6 * 12 * 12, 2)),  # 28 pixels
    nn.Conv3d(1, 2, 3), _Tokens(), _View(), nn.LSTM(3, 4, batch_first=True)], ids=lambda m: type(m).__name__)
def test_inputs_are_guessed_from_the_first_layer(model):
    out = probe(model, lambda example: example(model), batch=3)
    assert (out[0] if isinstance(out, tuple) else out).shape[0] == 3


def test_structures_of_inputs():
    class Two(nn.Module):
        def forward(self, image, meta=None, scale=1.):
            return image.mean((1, 2, 3)) + meta * scale

    image, meta = torch.ones(1, 3, 5, 7), torch.ones(1)
    model = Two()
    for given in ((image, meta), [image, meta], (image, meta, 2.), dict(image=image, meta=meta)):
        assert probe(model, lambda example: example(model), 4, example_inputs=given).shape == (4,)
    assert probe(nn.Identity(), lambda example: example(nn.Identity()), 4, example_inputs=image).shape == (4, 3, 5, 7)
    with pytest.raises(ValueError, match='give one'):
        examples(model, 2, (3, 5, 7), image)
    with pytest.raises(ValueError, match='no tensor'):
        examples(model, 2, example_inputs=(3, 5, 7))


def test_lazy_parameters_are_named():
    model = nn.Sequential(nn.LazyLinear(3), nn.ReLU())
    with pytest.raises(ProbeError, match='lazy'):
        probe(model, lambda example: example(model))
    assert type(model[0]) is nn.LazyLinear


@pytest.mark.parametrize('measure', [
    calibrate, estimate_energy, lambda model, images: model.spiking_report().macs(images)])
def test_measuring_on_images_of_other_channels_names_both_numbers(measure):
    model = convert_to_spiking(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), timesteps=2)
    with pytest.raises(ValueError, match=r'images: have shape \(2, 1, 8, 8\), 1 channels, and the model takes 3'):
        measure(model, torch.randn(2, 1, 8, 8))


def test_an_error_inside_the_model_stays_what_it_was():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))
    broken = convert_to_spiking(net, timesteps=2, input_size=(3, 3, 3))
    with pytest.raises(RuntimeError, match='shapes cannot be multiplied'):
        estimate_energy(broken, torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize('measure', [calibrate, convert_ann])
def test_images_that_are_no_tensor(measure):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    model = convert_to_spiking(model, timesteps=2) if measure is calibrate else model
    with pytest.raises(ValueError, match='images: must be a tensor .*got a list'):
        measure(model, [torch.randn(2, 3, 8, 8)])
