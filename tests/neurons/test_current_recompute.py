"""A neuron behind a residual sum saves two bits per element, and its gradients stay those of its input."""
import weakref
from contextlib import nullcontext

import pytest
import timm
import torch
import torch.nn as nn

from timm_sscl.neurons import LIF, create_neuron, lif_backend, packed_spikes
from timm_sscl.neurons.kernels.current_recompute import find_source

T, B, C = 3, 2, 6
SUMS = {
    'in place': lambda x, shortcut: x.add_(shortcut),
    'out of place': lambda x, shortcut: x + shortcut,
    'shortcut first': lambda x, shortcut: shortcut + x,
}


class _Block(nn.Module):
    """A residual block: spikes, branch, sum, neuron."""

    def __init__(self, add='in place', downsample=False, gain=None, **settings):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.act1, self.act2 = (LIF(T, **settings) for _ in range(3))
        self.act2.set_gain(gain)
        self.conv1, self.conv2 = (nn.Conv2d(C, C, 3, padding=1, bias=False) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(C), nn.BatchNorm2d(C)
        projection = nn.Sequential(nn.Conv2d(C, C, 1, bias=False), nn.BatchNorm2d(C))
        self.downsample = projection if downsample else nn.Identity()
        self.add = SUMS.get(add, add)
        self.cut = False  # hides from the neuron where its input comes from
        self.sums = []
        for norm in self.modules():
            if isinstance(norm, nn.BatchNorm2d):
                nn.init.normal_(norm.weight)
                nn.init.normal_(norm.bias)

    def forward(self, x):
        x = self.first(x)
        shortcut = self.downsample(x)
        x = self.add(self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x))))), shortcut)
        x = x * 1 if self.cut else x
        self.sums = [weakref.ref(x)]
        self.source = find_source(x)
        return self.act2(x)


def _data(memory_format=torch.contiguous_format):
    x = torch.randn(T * B, C, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return x.contiguous(memory_format=memory_format).requires_grad_()


def _gradients(block, x, context=nullcontext, cut=False):
    block.cut = cut
    with context():
        out = block(x)
    weight = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(2))
    return torch.autograd.grad((out * weight).sum(), [x, *block.parameters()])


def _assert_same(got, expected):
    for a, b in zip(got, expected):
        # spikes and window are bits; the potentials are made again with other roundings, in a smooth term only
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12 * b.abs().max().item())


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('downsample', [False, True])
@pytest.mark.parametrize('add', SUMS)
def test_gradients_are_those_of_the_saved_input(add, downsample, memory_format):
    for options in (dict(), dict(v_reset=-.2, tau=.6, gain=torch.rand(C, 1, 1) + .5), dict(gain=torch.tensor(1.3))):
        block, x = _Block(add, downsample, **options).double(), _data(memory_format)
        expected = _gradients(block, x, cut=True)
        assert block.source is None
        for context in (nullcontext, packed_spikes):
            _assert_same(_gradients(block, x, context), expected)
            assert len(block.source) == 2


@pytest.mark.parametrize('downsample', [False, True])
def test_compiled(downsample):
    block, x = _Block(downsample=downsample).double(), _data(torch.channels_last)
    with lif_backend('compiled'):
        got = _gradients(block, x)
    _assert_same(got, _gradients(block, x, cut=True))


def test_potentials_matter():
    """The test above can fail: without the reset's gradient, which needs the potentials, others come out."""
    x = _data()
    full, detached = (_gradients(_Block(detach_reset=d).double(), x)[0] for d in (False, True))
    assert (full - detached).abs().max() > 1e-3


def test_the_sum_is_freed():
    block = _Block().double()
    out = block(_data())
    assert block.sums[0]() is None
    out.sum().backward()


@pytest.mark.parametrize('add', [
    lambda x, shortcut: torch.add(x, shortcut, alpha=2), lambda x, shortcut: x - shortcut,
    lambda x, shortcut: x + shortcut * 2, lambda x, shortcut: x + shortcut.mean((0, 2, 3), keepdim=True),
    lambda x, shortcut: x + 1.], ids=['alpha', 'difference', 'scaled', 'broadcast', 'constant'])
def test_other_sums_keep_the_input(add):
    block, x = _Block(add).double(), _data()
    got = _gradients(block, x)
    assert block.source is None
    _assert_same(got, _gradients(block, x, cut=True))


def test_a_change_that_autograd_does_not_see():
    """The sum is doubled without a gradient: the neuron's input is not the sum any more."""
    def add(x, shortcut):
        x += shortcut
        with torch.no_grad():
            return x.mul_(2)
    block, x = _Block(add).double(), _data()
    got = _gradients(block, x)
    assert block.source is None
    _assert_same(got, _gradients(block, x, cut=True))


def test_a_norm_changed_without_a_gradient():
    """A neuron right behind a norm, whose output is shifted without a gradient."""
    block, x = _Block().double(), _data()

    def shift(module, args, out):
        with torch.no_grad():
            out.add_(.3)

    block.bn1.register_forward_hook(shift)
    got = _gradients(block, x)
    block.bn1.register_forward_hook(lambda module, args, out: out * 1)  # hides the norm from the neuron
    _assert_same(got, _gradients(block, x, cut=True))


def test_a_frozen_branch_keeps_the_input():
    block, x = _Block().double(), _data()
    block.conv1.requires_grad_(False)
    block(x).sum().backward()
    assert block.source is None and x.grad.isfinite().all()


def test_shortcut_changed_before_the_backward_is_an_error():
    block = _Block().double()
    spikes = []
    block.first.register_forward_hook(lambda module, args, out: spikes.append(out))
    out = block(_data())
    with torch.no_grad():
        spikes[0].zero_()
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        out.sum().backward()


def test_checkpointing():
    block, x = _Block().double(), _data()
    expected = _gradients(block, x, cut=True)
    block.cut = False
    out = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
    weight = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(2))
    _assert_same(torch.autograd.grad((out * weight).sum(), [x, *block.parameters()]), expected)


def test_no_neuron_of_a_resnet_saves_its_input():
    model = timm.create_model('spiking_test_resnet', num_classes=3, timesteps=2)
    lengths = []
    for neuron in model.neurons().values():
        neuron.register_forward_pre_hook(lambda module, args: lengths.append(len(find_source(args[0]) or ())))
    model(torch.randn(2, 3, 32, 32))
    assert set(lengths) == {1, 2}


@pytest.mark.parametrize('name, backend', [('lif', 'eager'), ('lif', 'compiled'), ('klif', 'compiled')])
@pytest.mark.parametrize('loss', [torch.sum, lambda out: out.square().sum()], ids=['sum', 'squares'])
def test_second_derivative_says_what_is_not_supported(name, backend, loss):
    """Also for a loss whose gradient by the spikes is constant, where torch would take the neuron's for a constant."""
    neuron, x = create_neuron(name, timesteps=T), torch.randn(T * B, C).requires_grad_()
    with lif_backend(backend):
        grad, = torch.autograd.grad(loss(neuron(x)), x, create_graph=True)
        with pytest.raises(RuntimeError, match='Second-order gradients .* are not supported through spiking neurons'):
            grad.sum().backward()
