"""Mean and repetition over time: values, gradients, and the memory format of what comes out."""
import pytest
import torch
import torch.nn as nn

from timm_sscl import LIF
from timm_sscl.losses.projections import PooledProjection
from timm_sscl.time_axis import mean_over_time, repeat_over_time

T = 3
ORDERS = {
    'contiguous': (0, 1, 2, 3), 'channels_last': (0, 2, 3, 1), 'rows last': (0, 1, 3, 2), 'batch last': (1, 2, 3, 0)}


def _in_order(order, *before):
    """Return a float64 tensor whose axes, after those before, are stored in this order."""
    torch.manual_seed(0)
    sizes = (2, 5, 4, 6)
    axes = [*range(len(before)), *(len(before) + axis for axis in order)]
    stored = torch.randn(*before, *(sizes[axis] for axis in order), dtype=torch.float64)
    return stored.permute([axes.index(axis) for axis in range(len(axes))])


@pytest.mark.parametrize('order', ORDERS.values(), ids=ORDERS)
def test_mean_has_the_memory_format_of_its_steps(order):
    x = _in_order(order, T)
    mean = mean_over_time(x)
    assert mean.stride() == x[0].stride()
    assert torch.allclose(mean, sum(x.unbind()) / T, rtol=1e-14, atol=1e-15)
    assert torch.autograd.gradcheck(mean_over_time, x.clone().requires_grad_())


@pytest.mark.parametrize('order', ORDERS.values(), ids=ORDERS)
def test_gradient_of_a_repetition_is_the_sum_in_the_memory_format_of_the_input(order):
    x = _in_order(order).requires_grad_()
    repeated, weights = repeat_over_time(x, T), _in_order(order, T)
    assert torch.equal(repeated, torch.stack([x] * T)) and repeated.stride() == (0, *x.stride())
    grad, = torch.autograd.grad(repeated, x, weights)
    assert torch.allclose(grad, weights.sum(0), rtol=1e-14, atol=1e-15) and grad.stride() == x.stride()


@pytest.mark.parametrize('shape', [(), (1,), (1, 1), (0, 3), (4, 1, 3)], ids=str)
def test_shapes_with_few_or_single_or_no_elements(shape):
    x = torch.randn(shape, dtype=torch.float64)
    assert repeat_over_time(x, T).shape == (T, *shape)
    assert torch.equal(mean_over_time(repeat_over_time(x, 1)), x)


def test_gradient_of_a_neuron_that_encodes_stays_in_channels_last():
    """Another format makes the backward of the batch norm before it several times slower."""
    torch.manual_seed(0)
    neuron, norm = LIF(timesteps=4), nn.BatchNorm2d(8).double()
    neuron.encodes = True
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    current = norm(x)
    grads = []
    current.register_hook(grads.append)
    out = neuron(current)
    weights = torch.randn_like(out)
    out.backward(weights)
    assert grads[0].is_contiguous(memory_format=torch.channels_last)
    same = norm(x).detach().contiguous().requires_grad_()
    neuron(same).backward(weights.contiguous())
    assert torch.allclose(grads[0], same.grad, rtol=1e-12)


@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-14), (torch.float16, 2 ** -11)])
def test_pooled_feature_is_the_mean_over_space_and_time_rounded_once(dtype, tolerance):
    x = _in_order(ORDERS['channels_last'], T).to(dtype)
    pooled = PooledProjection.condense(None, x)
    assert pooled.dtype == dtype
    expected = x.double().mean((0, 3, 4))
    assert ((pooled.double() - expected).abs() <= tolerance * expected.abs() + 1e-7).all()
