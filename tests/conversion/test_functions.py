"""Activations that a forward calls as functions become neurons as modules do."""
import copy
import pickle

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.functional import relu

from spiking_families import B, K, Net, T, images_of, neurons_of
from timm_sscl import LIF, convert_to_spiking


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


class _MentionsRelu(Net):
    def forward(self, x):
        """Unlike the original, which called F.relu(x) here, the activation is a module."""
        return super().forward(x)


def test_a_comment_is_no_activation():
    model = convert_to_spiking(_MentionsRelu(), timesteps=T)
    assert isinstance(model.act, LIF) and model(images_of()).shape == (B, K)


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


class _This(nn.Module):
    """A method whose first argument has another name."""

    def __init__(this):
        super().__init__()
        this.relu, this.fc = nn.ReLU(), nn.Linear(4, 4)

    def forward(this, x):
        return this.relu(this.fc(x))


def test_own_modules_are_no_functions_whatever_the_first_argument_is_called():
    model = convert_to_spiking(_This(), timesteps=T)
    assert [r.name for r in model.spiking_report()] == ['relu'] and len(neurons_of(model)) == 1
