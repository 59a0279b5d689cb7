"""What leaves a converted model, in whatever its forward returns."""
import collections
import dataclasses

import pytest
import timm
import torch
import torch.nn as nn

from timm_sscl import convert_to_spiking

T, B = 2, 3


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    features: list


class Box:
    def __init__(self, logits):
        self.logits = logits


class Net(nn.Module):
    """Returns what a function makes of its logits (B, 12)."""

    def __init__(self, wrap=lambda y: y):
        super().__init__()
        self.conv, self.act, self.head, self.wrap = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Linear(8, 12), wrap

    def forward(self, x):
        return self.wrap(self.head(self.act(self.conv(x)).mean((2, 3))))


@pytest.fixture(scope='module')
def images():
    return torch.randn(B, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def spiking(wrap):
    model = convert_to_spiking(Net(), timesteps=T, v_threshold=.01)
    model.load_state_dict({k: torch.full_like(v, .1) if k.endswith('weight') else v
                           for k, v in model.state_dict().items()})
    steps = model(torch.ones(1, 3, 6, 6), per_step=True)
    assert steps.shape == (T, 1, 12)
    model.wrap = wrap
    return model


@pytest.mark.parametrize('wrap, unwrap', [
    (lambda y: Output(y, [y]), lambda out: [out.logits, *out.features]),
    (lambda y: collections.defaultdict(list, y=y), lambda out: [out['y']]),
    (lambda y: collections.deque([y, 3]), lambda out: [out[0]]),
    (lambda y: {'a': (y, {'b': y}), 'c': None}, lambda out: [out['a'][0], out['a'][1]['b']]),
])
def test_containers(images, wrap, unwrap):
    model = spiking(lambda y: y)
    mean, steps = model(images), model(images, per_step=True)
    model.wrap = wrap
    assert type(model(images)) is type(wrap(mean))
    assert all(torch.equal(y, mean) for y in unwrap(model(images)))
    assert all(torch.equal(y, steps) for y in unwrap(model(images, per_step=True)))


@pytest.mark.parametrize('wrap, error, message', [
    (lambda y: y.sum(0)[:10], ValueError, r'\(10,\).*timesteps=2 times 3 samples'),  # 10 rows: two steps of 5
    (lambda y: y.t()[:10], ValueError, r'\(10, 6\)'),
    (lambda y: (y, y.mean()), ValueError, r'shape \(\)'),
    (lambda y: y.argmax(1), ValueError, 'int64.*per_step'),
    (lambda y: Box(y), TypeError, 'Box'), (lambda y: (z for z in (y, y)), TypeError, 'generator'),
    (lambda y: frozenset([y]), TypeError, 'frozenset'), (lambda y: y.detach().numpy(), TypeError, 'ndarray'),
])
def test_what_cannot_be_decoded_is_an_error(images, wrap, error, message):
    model = spiking(wrap)
    with pytest.raises(error, match=message):
        model(images)


def test_features_that_were_averaged_are_the_culprit():
    model = timm.create_model('spiking_test_resnet', num_classes=10, timesteps=3).eval()
    x = torch.rand(2, 3, 32, 32)
    features = model.forward_features(x)
    assert torch.equal(model.forward_head(features), model(x))
    with pytest.raises(ValueError, match=r'forward_head takes .* timesteps=3; got \(2, 96, 1, 1\), as after a mean'):
        model.forward_head(features.unflatten(0, (3, 2)).mean(0))
