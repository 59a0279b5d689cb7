"""A model's own classes, registered or not, and what the errors say of them."""
import pytest
import timm
import torch
import torch.nn as nn

from timm_sscl import (
    LIF, SpikingNeuron, Variant, convert_to_spiking, register_activation, register_neuron, register_variant,
    unregister_activation)
from timm_sscl.conversion.settings import SpikingSettings


class Scaled(nn.Module):
    """An activation, or with another `weight` a layer."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, x):
        return torch.relu(x * self.weight.mean())


def _net(act):
    return nn.Sequential(nn.Conv2d(3, 4, 3), act, nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))


@pytest.fixture
def registered():
    register_activation(Scaled)
    yield
    unregister_activation(Scaled)


@pytest.mark.parametrize('layer', [nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.Sequential, nn.MaxPool2d])
def test_layers_of_torch_are_no_activations(layer):
    with pytest.raises(ValueError, match=rf"register_activation\({layer.__name__}\): this is a layer of torch's"):
        register_activation(layer)
    model = convert_to_spiking(_net(nn.ReLU()), input_size=(3, 8, 8))
    assert isinstance(model[0], nn.Conv2d) and isinstance(model[1], LIF)


@pytest.mark.parametrize('weight, words', [
    (nn.Parameter(torch.ones(4, 4)), r'\(weight\)'), (nn.BatchNorm2d(4), r'\(weight.weight, weight.bias\)')])
def test_registered_class_with_weights_is_refused_and_the_model_left(registered, weight, words):
    model = _net(Scaled(weight))
    with pytest.raises(ValueError, match=rf"'1' \(Scaled\) has weights {words}"):
        convert_to_spiking(model, input_size=(3, 8, 8))
    assert type(model) is nn.Sequential and isinstance(model[1], Scaled)


def test_registered_class_with_slopes_becomes_a_neuron(registered):
    model = convert_to_spiking(_net(Scaled(nn.Parameter(torch.ones(4)))), input_size=(3, 8, 8))
    assert isinstance(model[1], LIF)


def test_activation_that_nobody_registered_is_named():
    class Bend(nn.Module):
        def forward(self, x):
            return x

    words = r'nothing would spike, .* Its own classes are Bend\. .*register_activation\(Bend\)'
    with pytest.raises(ValueError, match=words):
        convert_to_spiking(nn.Sequential(nn.Linear(3, 4), Bend()), example_inputs=torch.zeros(1, 3))


def test_variant_without_its_methods():
    class Half(Variant):
        def apply(self, model, settings):
            pass

    register_variant('norm', 'half')(Half)
    with pytest.raises(ValueError, match=r'Half has no method remove; a variant needs apply\(self, model, settings\)'):
        timm.create_model('spiking_test_resnet', norm='half')


def test_names_and_options_of_variants_are_named_as_they_are_given():
    with pytest.raises(ValueError, match="norm='tebm': .*Did you mean 'tebn'"):
        timm.create_model('spiking_test_resnet', norm='tebm')
    with pytest.raises(ValueError, match='^steps=0: must be a whole number'):
        timm.create_model('spiking_test_resnet', norm='tebn', norm_kwargs=dict(steps=0))


def test_settings_show_what_the_neuron_has():
    class Fire(SpikingNeuron):
        @staticmethod
        def step(x, state, constants, t, settings):
            return settings.spike(x, .5), state

    register_neuron('fire')(Fire)
    assert 'tau=0.25' in repr(SpikingSettings()) and 'v_threshold=0.5' in repr(SpikingSettings())
    assert str(SpikingSettings(tau=.5)) == 'timesteps=4, tau=0.5' and str(SpikingSettings()) == 'timesteps=4'
    shown = repr(SpikingSettings(neuron='fire'))
    assert "neuron='fire'" in shown and 'timesteps=4' in shown and 'tau' not in shown and 'v_threshold' not in shown
