"""Many timesteps run in chunks that pass the potential on: the same spikes and gradients as in one piece."""
import pytest
import torch
import torch.nn as nn

from timm_sscl import LIF
from timm_sscl.neurons import lif_backend, packed_spikes
from timm_sscl.neurons.kernels import chunks

T = 19  # in chunks of 8, 8 and 3
SETTINGS = {
    'hard': dict(), 'reset to another potential': dict(tau=.6, v_threshold=.7, v_reset=-.2),
    'soft': dict(v_reset=None), 'detached': dict(detach_reset=True),
    'initial potential': dict(tau=1., v_threshold=1., v_reset=None, v_init=.5)}


@pytest.fixture
def pieces(monkeypatch):
    """Return a function that runs another one in one piece and in chunks, on the kernels as plain tensor code."""
    def run(compute):
        whole = compute()
        with monkeypatch.context() as patch:
            patch.setattr(chunks, 'MAX_UNROLLED', 8)
            patch.setattr(chunks, 'compiles', lambda *_: True)
            return whole, compute()

    with lif_backend('eager'):
        yield run


def _gradients(neuron, layers=(), shape=(3, 4, 5, 6), memory_format=torch.contiguous_format):
    """Return output and gradients by the input and the parameters of layers before the neuron."""
    torch.manual_seed(0)
    rows = shape[0] * (1 if neuron.encodes else neuron.timesteps)
    x = torch.randn(rows, *shape[1:], dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    model = nn.Sequential(*layers, neuron, nn.Conv2d(shape[1], 2, 3)).double()
    spikes = []
    hook = neuron.register_forward_hook(lambda _, args, out: spikes.append(out))
    out = model(x)
    hook.remove()
    weights = torch.randn_like(out)
    return [spikes[0].detach(), *torch.autograd.grad(out, [x, *model.parameters()], weights)]


def _assert_equal(pair, tolerance=0.):
    for one, other in zip(*pair, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    assert torch.equal(pair[0][0], pair[1][0])
    assert 0 < pair[0][0].mean() < 1 and all(tensor.abs().max() > 0 for tensor in pair[0])


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('settings', SETTINGS.values(), ids=SETTINGS)
def test_spikes_and_gradients(settings, memory_format, pieces):
    _assert_equal(pieces(lambda: _gradients(LIF(T, **settings), memory_format=memory_format)))


@pytest.mark.parametrize('gain', [torch.tensor(1.4), torch.tensor([.6, 1., 1.4, 2.]).view(4, 1, 1)], ids=['0-d', 'C'])
def test_with_gains(gain, pieces):
    neuron = LIF(T)
    neuron.set_gain(gain.double())
    _assert_equal(pieces(lambda: _gradients(neuron)))


@pytest.mark.parametrize('settings', SETTINGS.values(), ids=SETTINGS)
def test_behind_a_batch_norm(settings, pieces):
    """A chunk begins with the potential of the forward; in one piece all are computed again, up to rounding."""
    _assert_equal(pieces(lambda: _gradients(LIF(T, **settings), [nn.BatchNorm2d(4, affine=False)])), tolerance=1e-13)


def test_with_packed_spikes_and_a_repeated_current(pieces):
    neuron = LIF(T)
    neuron.encodes = True

    def compute():
        with packed_spikes():
            return _gradients(neuron, [nn.BatchNorm2d(4, affine=False)])
    _assert_equal(pieces(compute), tolerance=1e-13)


def test_spikes_as_bytes(pieces):
    torch.manual_seed(0)
    x, neuron = torch.randn(T, 2, 30), LIF(T)
    whole, parts = pieces(lambda: neuron.run_as(x, x.flatten(0, 1), torch.uint8))
    assert whole.dtype == torch.uint8 and torch.equal(whole, parts)


def test_compiled(monkeypatch):
    """The chunks of the compiled neuron against the eager one in one piece."""
    neuron = LIF(T)
    with lif_backend('eager'):
        expected = _gradients(neuron, [nn.BatchNorm2d(4)])
    monkeypatch.setattr(chunks, 'MAX_UNROLLED', 8)
    with lif_backend('compiled'):
        found = _gradients(neuron, [nn.BatchNorm2d(4)])
    assert torch.equal(found[0], expected[0])
    for one, other in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)  # inductor reorders sums of float64
