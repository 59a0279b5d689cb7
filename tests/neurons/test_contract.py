"""What a neuron of one's own and its surrogate must return, and which words say what is wrong."""
import pytest
import timm
import torch

from timm_sscl import LIF, SpikingNeuron, register_neuron, register_surrogate
from timm_sscl.neurons import lif_backend, spike


def _neuron(step=None, **members):
    """Class of a neuron that fires at 0.5 from its current alone, with some members of one's own."""
    def fire(x, state, constants, t, settings):
        return settings.spike(x, .5), state

    return type('Own', (SpikingNeuron,), {'step': staticmethod(step or fire), **members})


def _cropped(x, state, constants, t, settings):
    return settings.spike(x, .5)[..., :1], state


def _summed(x, state, constants, t, settings):
    return settings.spike(x, .5).sum(), state


@pytest.mark.parametrize('step, shape', [(_cropped, r'\(3, 1\)'), (_summed, r'\(\)')])
@pytest.mark.parametrize('mode', ['eager', 'compiled'])
def test_output_of_another_shape_is_refused(step, shape, mode):
    with lif_backend(mode), pytest.raises(ValueError, match=rf'Own: the output .* shape {shape}, its current \(3, 4\)'):
        _neuron(step)(2)(torch.randn(6, 4))


def test_model_does_not_run_with_it():
    register_neuron('cropped')(_neuron(_cropped))
    model = timm.create_model('spiking_test_resnet', timesteps=2, num_classes=10, neuron='cropped')
    with pytest.raises(ValueError, match='Own: the output of a step has the shape'):
        model(torch.randn(2, 3, 32, 32))


def test_the_check_breaks_no_graph():
    neuron = LIF(2, surrogate='triangle')
    compiled = torch.compile(neuron, fullgraph=True, backend='eager')
    x = torch.randn(6, 4)
    assert torch.equal(compiled(x), neuron(x))


@pytest.mark.parametrize('members, words', [
    (dict(start=lambda self, x: torch.zeros_like(x)), r'Own.start returned a tensor \(3, 4\); .* a tuple of tensors'),
    (dict(start=lambda self, x: (0.,)), r'Own.start returned \(float\)'),
    (dict(constants=lambda self: torch.ones(())), r'Own.constants returned a tensor \(\)'),
    (dict(step=lambda x, *_: x), r'returned a tensor \(3, 4\); it must return the output, a tensor, and the state'),
    (dict(step=lambda x, *_: (1., ())), r'returned \(float, tuple\)'),
    (dict(step=lambda x, *_: (x, x)), r'as its state, returned a tensor \(3, 4\)'),
])
def test_what_is_no_state_and_no_output_is_named(members, words):
    with pytest.raises(ValueError, match=words):
        _neuron(**members)(2)(torch.randn(6, 4))


def test_class_without_a_step_or_with_a_method_for_it():
    class Nothing(SpikingNeuron):
        pass

    class Method(SpikingNeuron):
        def step(self, x, state, constants, t, settings):
            return x, state

    for cls, words in ((Nothing, 'Nothing has no step; .*@staticmethod'), (Method, 'Method.step: .*@staticmethod')):
        with pytest.raises(ValueError, match=words):
            cls(2)


@pytest.mark.parametrize('slope, got', [
    (lambda u, v: torch.ones_like(u)[..., :1], r'a tensor \(3, 1\)'), (lambda u, v: torch.ones(()), r'a tensor \(\)'),
    (lambda u, v: 1., 'a float')])
def test_surrogate_of_another_shape_is_refused(slope, got):
    register_surrogate('flat')(slope)
    words = rf"surrogate 'flat' returned {got}; it must return a tensor of the shape of the potential, \(3, 4\)"
    with pytest.raises(ValueError, match=words):
        spike(torch.randn(3, 4), .5, slope)
    with pytest.raises(ValueError, match=words):
        LIF(2, surrogate='flat')(torch.randn(6, 4))


def test_surrogates_are_named_as_they_are_registered():
    with pytest.raises(ValueError, match="surrogate 'rectangle'.* its options are width"):
        LIF(2, surrogate_kwargs=dict(widht=1.))
