"""Neurons that treat elements alone: where compiled, they save their input alone and have eager mode's numbers."""
from dataclasses import dataclass

import pytest
import torch
import torch.nn as nn

from timm_sscl.knobs import knob
from timm_sscl.neurons import NeuronSettings, SpikingNeuron, create_neuron, lif_backend, list_neurons
from timm_sscl.neurons.plif import PLIF

T, B, C = 3, 2, 4


@pytest.fixture(autouse=True)
def _kernels_run_eagerly():
    """The compiled kernels' code, without the compiler, which takes seconds for each; test_every_neuron compiles."""
    with torch.compiler.set_stance('force_eager'):
        yield


def run(neuron, x, grad, backend):
    """(output, gradient by the input, gradients by the parameters)"""
    x = x.detach().requires_grad_()
    with lif_backend(backend):
        out = neuron(x)
        return out, *torch.autograd.grad(out, [x, *neuron.parameters()], grad)


def saves(neuron, x):
    """Tensors that a compiled forward saves, without scalars."""
    saved = []
    with lif_backend('compiled'), torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.append(t) or t, lambda t: t):
        neuron(x)
    return [t for t in saved if t.numel() > 1]


def same(neuron, x, grad):
    eager, compiled = run(neuron, x, grad, 'eager'), run(neuron, x, grad, 'compiled')
    assert eager[0].any() and not eager[0].all()
    torch.testing.assert_close(compiled[0], eager[0], rtol=0, atol=0)
    for a, b in zip(compiled[1:], eager[1:]):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)  # float64; sums in another order
    return compiled[0]


@pytest.fixture
def neuron():
    neuron = create_neuron('plif', timesteps=T).double()
    neuron.set_gain(torch.linspace(1., 3., C, dtype=torch.float64).view(C, 1, 1))
    return neuron


def maps(seed=0):
    return torch.randn(T * B, C, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2


def test_any_memory_format_and_gradient(neuron):
    x, grad = maps(), maps(1)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        out = same(neuron, x.contiguous(memory_format=memory_format), grad)
        assert out.is_contiguous(memory_format=memory_format)
    same(neuron, x.transpose(2, 3), grad.transpose(2, 3))
    mean = grad[:B].expand(T, B, C, 3, 5)  # as of a mean over time: the same memory at every timestep
    x = x.requires_grad_()
    with lif_backend('compiled'):
        compiled, = torch.autograd.grad(neuron(x).unflatten(0, (T, B)), x, mean)
    with lif_backend('eager'):
        eager, = torch.autograd.grad(neuron(x).unflatten(0, (T, B)), x, mean)
    torch.testing.assert_close(compiled, eager, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('name', [name for name in list_neurons() if type(
    create_neuron(name, timesteps=T, channels=(C, 1, 1))).elementwise])
def test_every_elementwise_neuron(name):
    neuron = create_neuron(name, timesteps=T, channels=(C, 1, 1), **({'surrogate': 'atan'} if name in ('lif', 'if')
                                                                     else {})).double()
    x = maps().to(memory_format=torch.channels_last).requires_grad_()
    saved = saves(neuron, x)
    amplitude = dict(neuron.named_parameters()).get('amplitude')
    factors = 0 if amplitude is None else 1 + (amplitude.numel() > 1)  # of the product: output, and amplitude
    assert len(saved) == 1 + factors
    assert any(t.numel() == x.numel() and t.data_ptr() == x.data_ptr() for t in saved)
    same(neuron, x, maps(1))


def test_a_step_that_mixes_elements_is_left_as_it_is():
    class Inhibited(PLIF):
        """The strongest channel inhibits the others; the parent's step treats elements alone."""

        @staticmethod
        def step(x, state, constants, t, settings):
            (v,), (k,) = state, constants
            u = v + k * (x - v) - .1 * x.amax(1, keepdim=True)
            spikes = settings.spike(u, settings.v_threshold)
            return spikes, (settings.reset(u, spikes),)

    assert PLIF.elementwise and not Inhibited.elementwise
    neuron, x = Inhibited(T).double(), maps().to(memory_format=torch.channels_last)
    assert len(saves(neuron, x.requires_grad_())) > 1
    same(neuron, x, maps(1))


def test_constants_per_channel_are_left_as_they_are():
    class PerChannel(SpikingNeuron):
        elementwise, needs_channels = True, True

        @dataclass(frozen=True)
        class Settings(NeuronSettings):
            tau: float = knob(.5, 'decay factor')

        def build(self, shape):
            self.w = nn.Parameter(torch.linspace(.1, .9, shape[0]).view(shape))

        def constants(self):
            return (self.w,)

        def start(self, x):
            return (torch.zeros_like(x),)

        @staticmethod
        def step(x, state, constants, t, settings):
            u = constants[0] * state[0] + x
            spikes = settings.spike(u, 1.)
            return spikes, (u - spikes,)

    neuron, x = PerChannel(T, (C, 1, 1)).double(), maps().to(memory_format=torch.channels_last)
    assert len(saves(neuron, x.requires_grad_())) > 1
    same(neuron, x, maps(1))


def test_only_what_needs_a_gradient_gets_one(neuron):
    x = maps()
    with lif_backend('compiled'):
        neuron.w.requires_grad_(False)
        own = x.clone().requires_grad_()
        neuron(own).sum().backward()
        assert own.grad.any() and neuron.w.grad is None
        neuron.w.requires_grad_(True)
        neuron(x).sum().backward()
        assert neuron.w.grad is not None
        with torch.no_grad():
            assert not neuron(own).requires_grad
