"""The LIF neuron against a plain-loop float64 reference, hand-computed numbers, closed forms and two peer libraries."""
import copy
import io
import pickle
from typing import Callable, Optional, Tuple

import pytest
import torch
import torch.nn as nn

from timm_sscl.neurons import LIF, lif, rectangle_window

TAUS = [0., 0.25, 1.]
THRESHOLDS = [0.5, 1.]
RESETS = [0., None, -0.25]

# Reference and library order the same float64 operations differently in the backward, nothing else. Gradients here stay
# below about 30, so round-off is some 1e-14; a missing term of the recursion would be 1e-3 and more.
GRAD_TOL = dict(rtol=0., atol=1e-13)


class _Heaviside(torch.autograd.Function):
    """Step at `threshold` (firing on equality) whose derivative is 1 on the closed interval [low, high]."""

    @staticmethod
    def forward(ctx, u, low, threshold, high):
        ctx.save_for_backward(u)
        ctx.ends = low, high
        return (u >= threshold).to(u.dtype)

    @staticmethod
    def backward(ctx, grad):
        u, = ctx.saved_tensors
        low, high = ctx.ends
        return torch.where((low <= u) & (u <= high), grad, torch.zeros_like(grad)), None, None, None


def _reference(
        x: torch.Tensor,
        tau: float = 0.25,
        v_threshold: float = 0.5,
        v_reset: Optional[float] = 0.,
        detach_reset: bool = False,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Spikes and potentials before the reset, in plain differentiable operations."""
    v = torch.zeros_like(x[0]) if v_reset is None else torch.full_like(x[0], v_reset)
    spikes, potentials = [], []
    for x_t in x.unbind(0):
        u = tau * v + x_t
        o = _Heaviside.apply(u, 0., v_threshold, 2 * v_threshold)
        spikes.append(o)
        potentials.append(u.detach())
        gate = o.detach() if detach_reset else o
        v = u - v_threshold * gate if v_reset is None else u * (1 - gate) + v_reset * gate
    return torch.stack(spikes), torch.stack(potentials)


def _randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _currents(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Random currents that drive the potential below, inside and above the window, a fifth of them exactly zero."""
    x = 0.5 + _randn(*shape, seed=seed, dtype=dtype)
    return x.masked_fill(_randn(*shape, seed=seed + 1) < -0.84, 0.)


def _spikes_and_grad(
        fn: Callable[[torch.Tensor], torch.Tensor],
        x: torch.Tensor,
        grad: torch.Tensor,
) -> Tuple[torch.Tensor, torch.Tensor]:
    # autograd.grad, not .grad: the leaf's accumulator would lay the gradient out like the leaf.
    x = x.detach().requires_grad_()
    spikes = fn(x)
    grad_x, = torch.autograd.grad(spikes, x, grad)
    return spikes.detach(), grad_x


# ---------------------------------------------------------------------------------------------------------- reference

@pytest.mark.parametrize('timesteps', [1, 2, 5])
@pytest.mark.parametrize('detach_reset', [False, True])
@pytest.mark.parametrize('v_reset', RESETS)
@pytest.mark.parametrize('v_threshold', THRESHOLDS)
@pytest.mark.parametrize('tau', TAUS)
def test_matches_reference_on_random_input(tau, v_threshold, v_reset, detach_reset, timesteps):
    settings = tau, v_threshold, v_reset, detach_reset
    x = _currents(timesteps, 4, 25)
    grad = _randn(timesteps, 4, 25, seed=7)
    spikes, grad_x = _spikes_and_grad(lambda x: lif(x, *settings), x, grad)
    expected, expected_grad = _spikes_and_grad(lambda x: _reference(x, *settings)[0], x, grad)
    assert spikes.dtype == torch.float64 and spikes.shape == x.shape
    assert 0 < expected.mean() < 1
    assert torch.equal(spikes, expected)
    torch.testing.assert_close(grad_x, expected_grad, **GRAD_TOL)


@pytest.mark.parametrize('timesteps', [1, 2, 5])
@pytest.mark.parametrize('detach_reset', [False, True])
@pytest.mark.parametrize('v_reset', RESETS)
@pytest.mark.parametrize('v_threshold', THRESHOLDS)
@pytest.mark.parametrize('tau', TAUS)
def test_matches_reference_where_potentials_hit_the_edges(tau, v_threshold, v_reset, detach_reset, timesteps):
    # Multiples of 1/16 stay exact under every tau here, so potentials land on 0, U_th and 2 * U_th without round-off.
    settings = tau, v_threshold, v_reset, detach_reset
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(-16, 41, (timesteps, 600), generator=generator).double() / 16
    grad = _randn(timesteps, 600, seed=8)
    spikes, grad_x = _spikes_and_grad(lambda x: lif(x, *settings), x, grad)
    expected, expected_grad = _spikes_and_grad(lambda x: _reference(x, *settings)[0], x, grad)
    u = _reference(x, *settings)[1]
    for region in (u < 0, u == 0, u == v_threshold, u == 2 * v_threshold, u > 2 * v_threshold):
        assert region.any()
    assert torch.equal(spikes, expected)
    torch.testing.assert_close(grad_x, expected_grad, **GRAD_TOL)


def test_defaults_are_the_papers():
    x, grad = _currents(4, 50), _randn(4, 50, seed=5)
    explicit = _spikes_and_grad(lambda x: _reference(x, 0.25, 0.5, 0., False)[0], x, grad)
    for fn in (lif, lambda x: LIF(4)(x.flatten(0, 1)).view_as(x)):
        spikes, grad_x = _spikes_and_grad(fn, x, grad)
        assert torch.equal(spikes, explicit[0])
        torch.testing.assert_close(grad_x, explicit[1], **GRAD_TOL)


# Input 0.25, 0.5, 0, 0.75 with tau 0.25 and U_th 0.5; loss = sum of the spikes. Every number is exact in binary.
#   reset to 0:      U = .25, .5625 (fires, to 0), 0, .75 (fires)
#   reset to -0.25:  U = .1875 (from U_0 = -.25), .546875 (fires, to -.25), -.0625 (outside the window), .734375 (fires)
#   soft reset:      U = .25, .5625 (fires, to .0625), .015625, .75390625 (fires)
# Backward, reset to 0:  dU4 = 1;  dU3 = .25 + 1 + .25 * (0 - 0) = 1.25;  dU2 = 1 + .3125 * (0 - .5625) = .82421875;
#                        dU1 = .2060546875 + 1 + .2060546875 * (0 - .25) = 1.154541015625.
# With the reset detached the products drop out.
@pytest.mark.parametrize('v_reset, detach_reset, expected_grad', [
    (0., False, [1.154541015625, 0.82421875, 1.25, 1.]),
    (0., True, [1.25, 1., 1.25, 1.]),
    (-0.25, False, [1.1336212158203125, 0.9501953125, 0.25, 1.]),
    (-0.25, True, [1.25, 1., 0.25, 1.]),
    (None, False, [1.142578125, 1.140625, 1.125, 1.]),
    (None, True, [1.328125, 1.3125, 1.25, 1.]),
])
def test_hand_computed(v_reset, detach_reset, expected_grad):
    x = torch.tensor([0.25, 0.5, 0., 0.75], dtype=torch.float64)
    spikes, grad_x = _spikes_and_grad(lambda x: lif(x, 0.25, 0.5, v_reset, detach_reset), x, torch.ones_like(x))
    assert spikes.tolist() == [0., 1., 0., 1.]
    assert grad_x.tolist() == expected_grad


# ------------------------------------------------------------------------------------------------------- window's ends

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('v_reset', [0., None])
@pytest.mark.parametrize('v_threshold', [0.3, 0.5, 1.])
def test_threshold_and_window_are_closed(v_threshold, v_reset, dtype):
    # One step from U_0 = 0, so the potential is the input and its gradient is the window.
    zero, fire, high = (torch.tensor(value, dtype=dtype) for value in (0., v_threshold, 2 * v_threshold))
    inf = torch.tensor(float('inf'), dtype=dtype)
    below, above = (lambda value: torch.nextafter(value, -inf)), (lambda value: torch.nextafter(value, inf))
    potentials, expected_spikes, expected_grad = zip(
        (-fire, 0, 0), (below(zero), 0, 0), (-zero, 0, 1), (zero, 0, 1), (above(zero), 0, 1),
        (below(fire), 0, 1), (fire, 1, 1), (above(fire), 1, 1),
        (below(high), 1, 1), (high, 1, 1), (above(high), 1, 0), (2 * high, 1, 0))
    x = torch.stack(potentials)[None]
    spikes, grad_x = _spikes_and_grad(lambda x: lif(x, 0.25, v_threshold, v_reset), x, torch.ones_like(x))
    assert spikes[0].tolist() == list(expected_spikes)
    assert grad_x[0].tolist() == list(expected_grad)
    assert rectangle_window(x[0], v_threshold).tolist() == [bool(inside) for inside in expected_grad]


@pytest.mark.parametrize('v_reset', [0., None])
def test_silent_input_is_trainable(v_reset):
    # All-zero input (padding, empty event frames) sits on the window's lower end at every step. Without a leak term
    # (tau=0) every step's gradient is its own: exactly 1.
    x = torch.zeros(5, 3, dtype=torch.float64)
    spikes, grad_x = _spikes_and_grad(lambda x: lif(x, tau=0., v_reset=v_reset), x, torch.ones_like(x))
    assert not spikes.any()
    assert torch.equal(grad_x, torch.ones_like(x))


# --------------------------------------------------------------------------------------------------------- closed form

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('current, period', [
    # Constant c charges to c / 0.75 * (1 - 0.25^t), so 0.375 is the rheobase; 0.375 itself only tends to U_th.
    (-1., None), (0., None), (0.2, None), (0.37, None), (0.3749, None),
    # First t at which the charge reaches 0.5; the reset to 0 starts over.
    (0.376, 5), (0.39, 3), (0.45, 2),
    # U >= c alone reaches the threshold.
    (0.5, 1), (0.75, 1), (3., 1),
])
def test_constant_current(current, period, dtype):
    spikes = lif(torch.full((60, 2), current, dtype=dtype))
    step = torch.arange(1, 61)
    expected = torch.zeros(60) if period is None else (step % period == 0).float()
    assert torch.equal(spikes, expected.to(dtype)[:, None].expand(60, 2))


@pytest.mark.parametrize('sixteenths', [0, 1, 3, 5, 7, 8])
def test_integrate_and_fire_soft_reset_rate_codes_the_current(sixteenths):
    # No leak and nothing lost in the reset: after t steps of c <= U_th, floor(t * c / U_th) spikes.
    spikes = lif(torch.full((32,), sixteenths / 16, dtype=torch.float64), tau=1., v_threshold=0.5, v_reset=None)
    assert spikes.cumsum(0).tolist() == [t * sixteenths // 8 for t in range(1, 33)]


def test_integrate_and_fire_hard_reset_period():
    spikes = lif(torch.full((12,), 0.1875, dtype=torch.float64), tau=1.)  # 0.1875, 0.375, 0.5625 fires
    assert spikes.tolist() == [0., 0., 1.] * 4


@pytest.mark.parametrize('v_reset', RESETS)
def test_tau_zero_is_memoryless(v_reset):
    x = _currents(6, 40)
    assert torch.equal(lif(x, tau=0., v_threshold=0.5, v_reset=v_reset), (x >= 0.5).double())


# ------------------------------------------------------------------------------------------------- shapes and layouts

@pytest.mark.parametrize('shape', [
    (1,), (5,), (1, 1), (5, 1), (3, 7), (1, 1, 3, 7, 5), (5, 1, 1, 1, 1), (2, 3, 5, 7), (3, 2, 1, 3, 1, 2), (3, 0, 4)])
@pytest.mark.parametrize('v_reset', RESETS)
def test_any_trailing_shape(shape, v_reset):
    x, grad = _currents(*shape), _randn(*shape, seed=9)
    spikes, grad_x = _spikes_and_grad(lambda x: lif(x, v_reset=v_reset), x, grad)
    expected, expected_grad = _spikes_and_grad(lambda x: _reference(x, v_reset=v_reset)[0], x, grad)
    assert spikes.shape == grad_x.shape == shape
    assert torch.equal(spikes, expected)
    torch.testing.assert_close(grad_x, expected_grad, **GRAD_TOL)


@pytest.mark.parametrize('view', [
    pytest.param(lambda base: base.transpose(0, 1), id='transposed'),
    pytest.param(lambda base: base.permute(2, 0, 1), id='permuted'),
    pytest.param(lambda base: base[::2, 1:, ::3], id='sliced'),
    pytest.param(lambda base: base[:, :, 2], id='selected'),
    pytest.param(lambda base: base[:, None].expand(-1, 3, -1, -1), id='expanded-batch'),
    pytest.param(lambda base: base[:1].expand(4, -1, -1), id='expanded-time'),
])
@pytest.mark.parametrize('v_reset', RESETS)
def test_non_contiguous_input(view, v_reset):
    base = _currents(4, 5, 6)
    before = base.clone()
    assert not view(base).is_contiguous()
    grad = _randn(*view(base).shape, seed=4)
    spikes, grad_base = _spikes_and_grad(lambda base: lif(view(base), v_reset=v_reset), base, grad)
    expected, expected_grad = _spikes_and_grad(
        lambda base: _reference(view(base).contiguous(), v_reset=v_reset)[0], base, grad)
    assert torch.equal(spikes, expected)
    torch.testing.assert_close(grad_base, expected_grad, **GRAD_TOL)
    assert torch.equal(base, before)  # integrated without writing to the input


@pytest.mark.parametrize('grad', [
    pytest.param(_randn(6, 5).t(), id='transposed'),
    pytest.param(torch.tensor(0.5, dtype=torch.float64).expand(5, 6), id='expanded'),  # what .mean() sends back
])
def test_non_contiguous_gradient(grad):
    x = _currents(5, 6)
    assert not grad.is_contiguous()
    _, grad_x = _spikes_and_grad(lif, x, grad)
    _, expected = _spikes_and_grad(lif, x, grad.contiguous())
    assert torch.equal(grad_x, expected)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('v_reset', RESETS)
def test_module_keeps_channels_last(v_reset, dtype):
    timesteps, shape = 3, (3 * 2, 4, 5, 7)
    x, grad = _currents(*shape, dtype=dtype), _randn(*shape, seed=2, dtype=dtype)
    neuron = LIF(timesteps, v_reset=v_reset)
    expected, expected_grad = _spikes_and_grad(neuron, x, grad)
    spikes, grad_x = _spikes_and_grad(
        neuron, x.to(memory_format=torch.channels_last), grad.to(memory_format=torch.channels_last))
    assert expected.is_contiguous() and expected_grad.is_contiguous()
    for out, value in ((spikes, expected), (grad_x, expected_grad)):
        assert out.is_contiguous(memory_format=torch.channels_last) and not out.is_contiguous()
        assert torch.equal(out, value)


# ------------------------------------------------------------------------------------------ independence and causality

@pytest.mark.parametrize('v_reset', RESETS)
def test_samples_do_not_interact(v_reset):
    x, grad = _currents(4, 5, 3), _randn(4, 5, 3, seed=6)
    neuron = LIF(4, v_reset=v_reset)

    def run(x, grad):
        return _spikes_and_grad(lambda x: neuron(x.flatten(0, 1)).view_as(x), x, grad)

    spikes, grad_x = run(x, grad)
    for i in range(5):
        alone, grad_alone = run(x[:, i:i + 1], grad[:, i:i + 1])
        assert torch.equal(alone, spikes[:, i:i + 1])
        assert torch.equal(grad_alone, grad_x[:, i:i + 1])
    order = torch.tensor([3, 0, 4, 1, 2])
    permuted, grad_permuted = run(x[:, order], grad[:, order])
    assert torch.equal(permuted, spikes[:, order]) and not torch.equal(permuted, spikes)
    assert torch.equal(grad_permuted, grad_x[:, order])


@pytest.mark.parametrize('v_reset', RESETS)
def test_causal(v_reset):
    x = _currents(6, 50).requires_grad_()
    spikes = lif(x, tau=1., v_reset=v_reset)
    for t in range(1, 6):
        assert torch.equal(spikes[:t], lif(x[:t], tau=1., v_reset=v_reset))
    grad_x, = torch.autograd.grad(spikes[2].sum(), x)
    assert grad_x[:2].any() and grad_x[2].any() and not grad_x[3:].any()


# -------------------------------------------------------------------------------------------------------------- module

@pytest.mark.parametrize('timesteps, shape', [
    (1, (3, 5)), (2, (2,)), (2, (6, 3, 5)), (3, (3, 1, 7)), (5, (5, 2, 3, 5))])
@pytest.mark.parametrize('settings', [
    {}, dict(tau=1., v_threshold=1.), dict(v_reset=None), dict(tau=0.75, v_reset=-0.25, detach_reset=True)])
def test_module_is_lif_on_the_unfolded_batch(timesteps, shape, settings):
    x, grad = _currents(*shape), _randn(*shape, seed=1)
    spikes, grad_x = _spikes_and_grad(LIF(timesteps, **settings), x, grad)
    expected, expected_grad = _spikes_and_grad(
        lambda x: lif(x.view(timesteps, -1, *shape[1:]), **settings).view(shape), x, grad)
    assert spikes.shape == shape
    assert torch.equal(spikes, expected)
    assert torch.equal(grad_x, expected_grad)


def test_module_folds_time_major():
    # Rows are (t0, b0), (t0, b1), (t1, b0), (t1, b1): only sample 0 gets 0.45 twice. Batch-major would fire in row 3.
    x = torch.tensor([[0.45], [0.], [0.45], [0.45]])
    assert LIF(2)(x).flatten().tolist() == [0., 0., 1., 0.]


@pytest.mark.parametrize('timesteps, first_axis', [(2, 3), (4, 6), (4, 1)])
def test_module_refuses_a_batch_that_does_not_divide(timesteps, first_axis):
    with pytest.raises(ValueError, match=f'timesteps={timesteps}'):
        LIF(timesteps)(torch.zeros(first_axis, 3))


def test_module_keeps_no_state():
    neuron = LIF(4)
    x, other = _currents(8, 10), _currents(8, 10, seed=5)
    first = neuron(x)
    assert not torch.equal(neuron(other), first)
    assert torch.equal(neuron(x), first)
    assert torch.equal(neuron.eval()(x), first)
    neuron(_currents(4, 3, 2))  # another shape in between
    assert torch.equal(neuron(x), first)
    assert neuron.state_dict() == {}
    assert not list(neuron.parameters()) and not list(neuron.buffers())


def _through_torch_save(neuron: LIF) -> LIF:
    buffer = io.BytesIO()
    torch.save(neuron, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize('copied', [
    pytest.param(lambda neuron: pickle.loads(pickle.dumps(neuron)), id='pickle'),
    pytest.param(copy.deepcopy, id='deepcopy'),
    pytest.param(_through_torch_save, id='torch.save'),
])
@pytest.mark.parametrize('settings', [dict(tau=0.75, v_threshold=1., v_reset=-0.25, detach_reset=True),
                                      dict(tau=0.75, v_threshold=1., v_reset=None)])
def test_module_copies(copied, settings):
    neuron = LIF(2, **settings)
    neuron(_currents(2, 3))
    twin = copied(neuron)
    assert twin is not neuron and repr(twin) == repr(neuron)
    x, grad = _currents(4, 60), _randn(4, 60, seed=1)
    spikes, grad_x = _spikes_and_grad(neuron, x, grad)
    twin_spikes, twin_grad = _spikes_and_grad(twin, x, grad)
    assert torch.equal(twin_spikes, spikes)
    assert torch.equal(twin_grad, grad_x)


# ----------------------------------------------------------------------------------------------------------- precision

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('v_reset', RESETS)
def test_half_precision_integrates_in_float32(v_reset, dtype):
    settings = dict(tau=0.75, v_threshold=0.5, v_reset=v_reset)
    x, grad = 0.3 * _currents(5, 500, dtype=dtype), _randn(5, 500, seed=3, dtype=dtype)
    # In neuron 0 the potential goes 1 ulp, then 0.5 - ulp + 0.75 * ulp: short of 0.5 by a quarter of an ulp, which half
    # precision would round up to a spike.
    ulp = torch.finfo(dtype).eps / 4  # spacing just below 0.5
    x[:2, 0] = torch.tensor([ulp - 0.75 * (v_reset or 0.), 0.5 - ulp], dtype=dtype)
    spikes, grad_x = _spikes_and_grad(lambda x: lif(x, **settings), x, grad)
    expected, expected_grad = _spikes_and_grad(lambda x: lif(x, **settings), x.float(), grad.float())
    assert spikes.dtype == grad_x.dtype == dtype
    assert torch.equal(spikes.float(), expected)
    assert torch.equal(grad_x, expected_grad.to(dtype))  # rounded once, at the end
    assert spikes[1, 0] == 0 and _reference(x, **settings)[0][1, 0] == 1


def test_autocast():
    torch.manual_seed(0)
    linear, head, neuron = nn.Linear(8, 16), nn.Linear(16, 2), LIF(3)
    x = _currents(6, 8, dtype=torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        current = linear(x)
        spikes = neuron(current)
        loss = head(spikes).float().square().sum()
        plain = neuron(x)
    assert current.dtype == spikes.dtype == torch.bfloat16
    assert torch.equal(spikes.float(), neuron(current.float())) and spikes.any()
    assert plain.dtype == torch.float32 and torch.equal(plain, neuron(x))
    loss.backward()
    assert linear.weight.grad.dtype == torch.float32
    assert linear.weight.grad.isfinite().all() and linear.weight.grad.any()


# ----------------------------------------------------------------------------------------------------------- arguments

@pytest.mark.parametrize('settings, name', [
    (dict(tau=-0.1), 'tau'),
    (dict(tau=1.5), 'tau'),
    (dict(tau=float('nan')), 'tau'),
    (dict(v_threshold=0.), 'v_threshold'),
    (dict(v_threshold=-0.5), 'v_threshold'),
    (dict(v_threshold=float('nan')), 'v_threshold'),
    (dict(v_threshold=0.5, v_reset=0.6), 'v_reset'),
    (dict(v_threshold=0.5, v_reset=0.5), 'v_reset'),
])
def test_invalid_settings(settings, name):
    with pytest.raises(ValueError, match=f'^{name}='):
        lif(torch.zeros(2, 3), **settings)
    with pytest.raises(ValueError, match=f'^{name}='):
        LIF(2, **settings)


@pytest.mark.parametrize('timesteps', [0, -1])
def test_invalid_timesteps(timesteps):
    with pytest.raises(ValueError, match=f'timesteps={timesteps}'):
        LIF(timesteps)


@pytest.mark.parametrize('x, message', [
    (torch.zeros(2, 3, dtype=torch.int64), r'^x has dtype torch\.int64'),
    (torch.zeros(2, 3, dtype=torch.bool), r'^x has dtype torch\.bool'),
    (torch.tensor(0.5), r'^x has shape \(\)'),
    (torch.zeros(0, 3), r'^x has shape \(0, 3\)'),
])
def test_invalid_input(x, message):
    with pytest.raises(ValueError, match=message):
        lif(x)


def test_integer_settings():
    x, grad = _currents(4, 50), _randn(4, 50, seed=2)
    spikes, grad_x = _spikes_and_grad(lambda x: lif(x, tau=1, v_threshold=1, v_reset=0), x, grad)
    expected, expected_grad = _spikes_and_grad(lambda x: lif(x, tau=1., v_threshold=1., v_reset=0.), x, grad)
    assert torch.equal(spikes, expected)
    assert torch.equal(grad_x, expected_grad)


def test_without_gradient():
    x = _currents(4, 50)
    with torch.inference_mode():
        spikes = lif(x)
    assert not spikes.requires_grad and torch.equal(spikes, _reference(x)[0])


def test_second_derivative_is_refused():
    # The backward is written by hand and not differentiable; the loss is quadratic so that a graph through it is asked
    # for.
    x = _currents(2, 10).requires_grad_()
    grad_x, = torch.autograd.grad(lif(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='cannot be differentiated again'):
        grad_x.sum().backward()


# ------------------------------------------------------------------------------------------------------------- compile

@pytest.mark.parametrize('v_reset, detach_reset', [(0., False), (None, False), (-0.25, True)])
def test_compiles_without_graph_break(v_reset, detach_reset):
    torch._dynamo.reset()
    x, grad = _currents(3, 4, 5), _randn(3, 4, 5, seed=1)
    compiled = torch.compile(lif, fullgraph=True, backend='aot_eager')
    spikes, grad_x = _spikes_and_grad(lambda x: compiled(x, 0.25, 0.5, v_reset, detach_reset), x, grad)
    expected, expected_grad = _spikes_and_grad(lambda x: lif(x, 0.25, 0.5, v_reset, detach_reset), x, grad)
    assert torch.equal(spikes, expected)
    torch.testing.assert_close(grad_x, expected_grad, **GRAD_TOL)


# --------------------------------------------------------------------------------------------------------------- peers

def _closed_rectangle(v_threshold: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """The closed window for libraries that hand their surrogate the potential minus the threshold."""
    return lambda shifted: _Heaviside.apply(shifted, -v_threshold, 0., v_threshold)


def _assert_clear_of_edges(potentials: torch.Tensor, v_threshold: float) -> None:
    # Peers round the recursion differently. Potentials exactly on an edge agree (they come from exact operations), and
    # this keeps all others far enough from it that round-off decides no spike and no window.
    for edge in (0., v_threshold, 2 * v_threshold):
        distance = (potentials - edge).abs()
        assert ((distance == 0) | (distance > 1e-9)).all()


@pytest.mark.parametrize('detach_reset', [False, True])
@pytest.mark.parametrize('v_reset', [0., None])
@pytest.mark.parametrize('v_threshold', THRESHOLDS)
def test_equals_spikingjelly(v_threshold, v_reset, detach_reset):
    pytest.importorskip('spikingjelly')
    from spikingjelly.activation_based import functional, neuron
    # SpikingJelly fires at v >= v_threshold too, and without input decay charges v - v / tau + x: tau = 4/3 keeps 1/4.
    # It leaks towards v_reset, which agrees with a leak towards 0 for a reset to 0 only. Its own Rect is open.
    node = neuron.LIFNode(
        tau=4 / 3, decay_input=False, v_threshold=v_threshold, v_reset=v_reset, detach_reset=detach_reset,
        surrogate_function=_closed_rectangle(v_threshold), step_mode='m')
    x, grad = _currents(6, 4, 50), _randn(6, 4, 50, seed=1)
    x[0, :, :2] = v_threshold  # exactly on the edges at the first step; 0 is in _currents
    x[0, :, 2:4] = 2 * v_threshold
    potentials = _reference(x, 0.25, v_threshold, v_reset)[1]
    assert (potentials == 0).any()
    _assert_clear_of_edges(potentials, v_threshold)
    for _ in range(2):  # the peer keeps its potential and needs a reset, ours starts every call afresh
        functional.reset_net(node)
        expected, expected_grad = _spikes_and_grad(node, x, grad)
        spikes, grad_x = _spikes_and_grad(lambda x: lif(x, 0.25, v_threshold, v_reset, detach_reset), x, grad)
        assert torch.equal(spikes, expected)
        torch.testing.assert_close(grad_x, expected_grad, **GRAD_TOL)


# Where snnTorch and this neuron coincide:
# - Its stock surrogates fire at mem > threshold, not >=; a custom one may fire on equality.
# - 'zero', reset_delay=True (its default): the reset of a spike is applied at the start of the next step, to the
#   potential alone, which leaves the spikes as they are; that reset is detached.
# - 'zero', reset_delay=False: reset within the step, gradient through it.
# - 'subtract' with reset_delay=True takes the threshold off after the leak (beta * mem - threshold): another neuron.
#   reset_delay=False takes it off before the leak, as here, but a potential that is still above the threshold after the
#   reset is reset once more in the next step; below 2 * U_th this cannot happen.
SNNTORCH_CASES = [
    # v_reset, snnTorch's mechanism, its reset_delay, our detach_reset, largest input
    pytest.param(0., 'zero', True, True, None, id='zero-delayed'),
    pytest.param(0., 'zero', False, False, None, id='zero'),
    pytest.param(None, 'subtract', False, False, 0.85, id='subtract'),
]


@pytest.mark.parametrize('own_surrogate', [False, True])
@pytest.mark.parametrize('v_reset, mechanism, reset_delay, detach_reset, largest', SNNTORCH_CASES)
def test_equals_snntorch(v_reset, mechanism, reset_delay, detach_reset, largest, own_surrogate):
    snn = pytest.importorskip('snntorch')
    leaky = snn.Leaky(
        beta=0.25, threshold=0.5, reset_mechanism=mechanism, reset_delay=reset_delay,
        spike_grad=_closed_rectangle(0.5) if own_surrogate else None)

    def peer(x):
        mem, spikes = torch.zeros_like(x[0]), []
        for x_t in x.unbind(0):
            spike, mem = leaky(x_t, mem)
            spikes.append(spike)
        return torch.stack(spikes).to(x.dtype)

    x, grad = _currents(6, 4, 50), _randn(6, 4, 50, seed=1)
    if own_surrogate:
        x[0, :, :2] = 0.5  # fires on equality
    if largest is not None:
        x = x.clamp(max=largest - 0.1 * torch.rand(x.shape, generator=torch.Generator().manual_seed(0)).double())
    potentials = _reference(x, 0.25, 0.5, v_reset)[1]
    _assert_clear_of_edges(potentials, 0.5)
    assert own_surrogate or not (potentials == 0.5).any()
    assert largest is None or potentials.max() < 1.
    expected, expected_grad = _spikes_and_grad(peer, x, grad)
    spikes, grad_x = _spikes_and_grad(lambda x: lif(x, 0.25, 0.5, v_reset, detach_reset), x, grad)
    assert 0 < expected.mean() < 1
    assert torch.equal(spikes, expected)
    if own_surrogate:
        torch.testing.assert_close(grad_x, expected_grad, **GRAD_TOL)


def test_module_refuses_integers_as_the_function_does():
    with pytest.raises(ValueError, match='int64'):
        LIF(2)(torch.ones(4, 3, dtype=torch.int64))
