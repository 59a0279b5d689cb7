"""A neuron of one's own is run on noise before a conversion: its output, its parameters, its surrogate."""
import logging

import pytest
import timm
import torch
import torch.nn as nn

from timm_sscl import SpikingNeuron, register_neuron, register_surrogate


def _model(**kwargs):
    return timm.create_model('spiking_test_resnet', timesteps=2, **kwargs)


def _register(out, output='binary', **members):
    def step(x, state, constants, t, settings):
        return out(x, constants, settings), state

    register_neuron('own')(type('Own', (SpikingNeuron,), dict(step=staticmethod(step), output=output, **members)))


@pytest.mark.parametrize('output, out, range_', [
    ('binary', lambda x, c, s: x.relu(), '0 to 1'), ('binary', lambda x, c, s: 2 * s.spike(x, .5), '0 to 1'),
    ('ternary', lambda x, c, s: x.sign() / 2, '-1 to 1'), ('integer', lambda x, c, s: -s.spike(x, .5), '0 to 1')])
def test_output_that_the_class_does_not_declare_is_refused(output, out, range_):
    _register(out, output)
    with pytest.raises(ValueError, match=f"neuron 'own' says output='{output}', whole numbers from {range_}, and ret"):
        _model(neuron='own')


@pytest.mark.parametrize('output, out', [
    ('binary', lambda x, c, s: s.spike(x, .5)), ('analog', lambda x, c, s: x.relu()),
    ('ternary', lambda x, c, s: s.spike(x, .5) - s.spike(-x, .5))])
def test_output_that_it_declares_is_not_and_random_numbers_stay(output, out, caplog):
    _register(out, output)
    torch.manual_seed(0)
    plain = timm.create_model('spiking_test_resnet').state_dict()['conv1.0.weight']
    torch.manual_seed(0)
    before = torch.get_rng_state()
    model = _model(neuron='own')
    assert torch.equal(model.state_dict()['conv1.0.weight'], plain) and not torch.equal(before, torch.get_rng_state())
    assert 'gradient' not in caplog.text


def test_parameter_without_a_gradient_is_told(caplog):
    def build(self, shape):
        self.beta, self.gamma = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.ones(shape))

    with caplog.at_level(logging.WARNING):
        _register(lambda x, c, s: s.spike(x, c[0]), build=build, constants=lambda self: (self.gamma,))
        _model(neuron='own')
        assert caplog.text.count("neuron 'own': no gradient reaches beta, which will not train") == 1
        caplog.clear()
        _register(lambda x, c, s: s.spike(x, c[0] + c[1]), build=build, constants=lambda self: (self.gamma, self.beta))
        _model(neuron='own')
        assert 'no gradient' not in caplog.text


def test_surrogate_that_is_not_finite_is_refused():
    @register_surrogate('bell')
    def bell(u, v_threshold, width=.5):
        return torch.exp(-((u - v_threshold) / width) ** 2)

    _model(surrogate='bell')
    for name in ('bell', 'rectangle'):
        with pytest.raises(ValueError, match=f"surrogate '{name}' with width=0.0: its values are not finite"):
            _model(surrogate=name, surrogate_kwargs=dict(width=0))
