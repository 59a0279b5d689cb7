"""The contrastive losses against plain Python loops in float64, closed forms and numerical gradients."""
import math
from typing import List, Optional, Tuple

import pytest
import torch

from timm_sscl.losses.critics import info_nce_loss, mi_lower_bound, nce_loss

# The loops use exp and log of the same float64 numbers; scores reach 1 / 0.07 = 14, so round-off is some 1e-15 * 14.
EXACT = dict(rtol=1e-12, atol=1e-12)

NS = [2, 3, 7]
TEMPERATURES = [0.07, 0.1, 1.]


def _literal(s: torch.Tensor, a: torch.Tensor, temperature: float = 0.1) -> torch.Tensor:
    return nce_loss(s, a, temperature, normalize=False)


LOSSES = {'literal': _literal, 'normalised': nce_loss, 'infonce': info_nce_loss}
every_loss = pytest.mark.parametrize('loss', LOSSES.values(), ids=LOSSES)


def _pair(n: int, d: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * seed + n)
    a = torch.randn(n, d, generator=generator, dtype=torch.float64)
    s = a + torch.randn(n, d, generator=generator, dtype=torch.float64)
    return s.to(dtype), a.to(dtype)


def _tensor(value: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor(value, dtype=dtype)


# --------------------------------------------------------------------------------------------------------- references

def _loop_exp_scores(s: torch.Tensor, a: torch.Tensor, temperature: float) -> List[List[float]]:
    """e^{s_i . a_j / t} of the normalised rows; a row of zeros stays one."""
    def unit(row: List[float]) -> List[float]:
        norm = math.sqrt(math.fsum(v * v for v in row))
        return [v / norm for v in row] if norm > 0 else row
    s_rows, a_rows = ([unit(row) for row in x.double().tolist()] for x in (s, a))
    return [[math.exp(math.fsum(u * v for u, v in zip(p, q)) / temperature) for q in a_rows] for p in s_rows]


def _loop_nce(e: List[List[float]], offset: float) -> float:
    """-(1/N) sum_i [log h_ii + sum_{j != i} log(1 - h_ij)] with h = e / (e + offset)."""
    n, total = len(e), 0.
    for i in range(n):
        for j in range(n):
            h = e[i][j] / (e[i][j] + offset)
            # 1 - h written as offset / (e + offset), which does not cancel where h is near 1
            total += math.log(h) if i == j else math.log(offset / (e[i][j] + offset))
    return -total / n


def _loop_literal(s: torch.Tensor, a: torch.Tensor, temperature: float = 0.1, pairs: Optional[float] = None) -> float:
    n = len(s)
    return _loop_nce(_loop_exp_scores(s, a, temperature), n / (n * n if pairs is None else pairs))


def _mean_negative(e: List[List[float]]) -> float:
    negatives = [e[i][j] for i in range(len(e)) for j in range(len(e)) if i != j]
    return math.fsum(negatives) / len(negatives)


def _loop_normalised(s: torch.Tensor, a: torch.Tensor, temperature: float = 0.1) -> float:
    e = _loop_exp_scores(s, a, temperature)
    return _loop_nce(e, (len(e) - 1) * _mean_negative(e))


def _loop_infonce(s: torch.Tensor, a: torch.Tensor, temperature: float = 0.1) -> float:
    e = _loop_exp_scores(s, a, temperature)
    n, total = len(e), 0.
    for i in range(n):
        total -= math.log(e[i][i] / sum(e[i][j] for j in range(n)))
        total -= math.log(e[i][i] / sum(e[j][i] for j in range(n)))
    return total / (2 * n)


REFERENCES = {'literal': _loop_literal, 'normalised': _loop_normalised, 'infonce': _loop_infonce}
every_pair = pytest.mark.parametrize('loss, reference', [(LOSSES[k], REFERENCES[k]) for k in LOSSES], ids=LOSSES)


@pytest.mark.parametrize('temperature', TEMPERATURES)
@pytest.mark.parametrize('n', NS)
@every_pair
def test_matches_loops(loss, reference, n, temperature):
    s, a = _pair(n)
    value = loss(s, a, temperature)
    assert value.shape == () and value.dtype == torch.float64
    torch.testing.assert_close(value, _tensor(reference(s, a, temperature)), **EXACT)


@pytest.mark.parametrize('temperature', TEMPERATURES)
@pytest.mark.parametrize('n', NS)
@every_pair
def test_matches_loops_in_float32(loss, reference, n, temperature):
    s, a = _pair(n, dtype=torch.float32)
    value = loss(s, a, temperature)
    assert value.dtype == torch.float32
    # Scores of 14 carry an error of 14 * 1e-7 into a loss that may be small itself.
    torch.testing.assert_close(value.double(), _tensor(reference(s, a, temperature)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('n', NS)
@pytest.mark.parametrize('num_pairs', [1, 2.5, 50, 10 ** 6, 50000 ** 2])
def test_literal_with_num_pairs_matches_loops(num_pairs, n):
    s, a = _pair(n, seed=1)
    value = nce_loss(s, a, 0.1, num_pairs=num_pairs, normalize=False)
    torch.testing.assert_close(value, _tensor(_loop_literal(s, a, 0.1, num_pairs)), **EXACT)


@pytest.mark.parametrize('n', NS)
def test_num_pairs_is_the_square_of_the_batch_by_default(n):
    s, a = _pair(n, seed=2)
    default = nce_loss(s, a, normalize=False)
    assert torch.equal(default, nce_loss(s, a, num_pairs=n * n, normalize=False))
    assert abs(default - nce_loss(s, a, num_pairs=10 * n * n, normalize=False)) > 1e-2


def test_defaults():
    s, a = _pair(5, seed=3)
    assert torch.equal(nce_loss(s, a), nce_loss(s, a, temperature=0.1, num_pairs=None, normalize=True))
    assert torch.equal(info_nce_loss(s, a), info_nce_loss(s, a, temperature=0.1))


def test_literal_works_without_negatives():
    s, a = _pair(1)
    for pairs in (None, 20):
        value = nce_loss(s, a, num_pairs=pairs, normalize=False)
        torch.testing.assert_close(value, _tensor(_loop_literal(s, a, 0.1, pairs)), **EXACT)


def test_infonce_takes_both_directions():
    s, a = _pair(5, seed=4)
    e = _loop_exp_scores(s, a, 0.1)
    one_way = -sum(math.log(e[i][i] / sum(e[i])) for i in range(5)) / 5
    torch.testing.assert_close(info_nce_loss(s, a), info_nce_loss(a, s), **EXACT)
    assert abs(info_nce_loss(s, a).item() - one_way) > 1e-3


# --------------------------------------------------------------------------------------------------------- properties

@every_loss
def test_rows_are_normalised(loss):
    s, a = _pair(6, seed=5)
    scales = torch.tensor([1e-4, 0.1, 1., 7., 100., 1e4], dtype=torch.float64)[:, None]
    torch.testing.assert_close(loss(s * scales, a * scales.flip(0)), loss(s, a), **EXACT)
    assert abs(loss(-s, a) - loss(s, a)) > 1e-2  # the direction does matter


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@every_pair
def test_zero_row_stays_zero(loss, reference, dtype):
    s, a = _pair(4, seed=6, dtype=dtype)
    s[1], a[2] = 0, 0
    leaves = s.clone().requires_grad_(), a.clone().requires_grad_()
    value = loss(*leaves)
    grads = torch.autograd.grad(value, leaves)
    tol = EXACT if dtype == torch.float64 else dict(rtol=1e-5, atol=1e-5)  # scores of 10 with float32 round-off
    torch.testing.assert_close(value.detach().double(), _tensor(reference(s, a)), **tol)
    assert value.isfinite() and all(g.isfinite().all() for g in grads)


@every_loss
def test_all_zero_features_stay_finite(loss):
    s, a = torch.zeros(3, 4, requires_grad=True), torch.zeros(3, 4)
    value = loss(s, a)
    grad, = torch.autograd.grad(value, s)
    assert value.isfinite() and grad.isfinite().all()


@every_loss
def test_order_of_the_batch_does_not_matter(loss):
    s, a = _pair(7, seed=7)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loss(s[order], a[order]), loss(s, a), **EXACT)
    assert abs(loss(s[order], a) - loss(s, a)) > 1e-2


@pytest.mark.parametrize('temperature', TEMPERATURES)
@every_loss
def test_aligned_pairs_have_the_lower_loss(loss, temperature):
    _, a = _pair(7, seed=8)
    aligned = loss(a, a, temperature)
    for shift in range(1, 7):
        assert aligned < loss(a.roll(shift, 0), a, temperature)


# ---------------------------------------------------------------------------------------------------------- gradients

@pytest.mark.parametrize('n', [2, 4])
@pytest.mark.parametrize('loss', [
    _literal, lambda s, a, t: nce_loss(s, a, t, num_pairs=1000, normalize=False), info_nce_loss,
], ids=['literal', 'literal-pairs', 'infonce'])
def test_gradient_is_the_numerical_one(loss, n):
    s, a = (x.requires_grad_() for x in _pair(n, d=3, seed=9))
    # Central differences of step 1e-6 in float64: error near 1e-9 for curvatures of 1 / t^2 = 25.
    assert torch.autograd.gradcheck(lambda s, a: loss(s, a, 0.2), (s, a), eps=1e-6, atol=1e-6, rtol=1e-5)


def _explicit_normalised(s: torch.Tensor, a: torch.Tensor, temperature: float, m) -> torch.Tensor:
    """The normalised critic in plain differentiable operations, with m given or, where None, differentiated too."""
    n = len(s)
    units = s / s.pow(2).sum(1, keepdim=True).sqrt(), a / a.pow(2).sum(1, keepdim=True).sqrt()
    e = (units[0] @ units[1].T / temperature).exp()
    if m is None:
        m = (e.sum() - e.diagonal().sum()) / (n * (n - 1))
    h = e / (e + (n - 1) * m)
    rest = (n - 1) * m / (e + (n - 1) * m)
    return -(h.diagonal().log().sum() + rest.log().sum() - rest.diagonal().log().sum()) / n


@pytest.mark.parametrize('temperature', TEMPERATURES)
@pytest.mark.parametrize('n', NS)
def test_normalised_gradient_takes_the_mean_for_a_constant(n, temperature):
    s, a = (x.requires_grad_() for x in _pair(n, seed=10))
    m = _mean_negative(_loop_exp_scores(s.detach(), a.detach(), temperature))
    value = nce_loss(s, a, temperature)
    grads = torch.autograd.grad(value, (s, a))
    explicit = _explicit_normalised(s, a, temperature, m)
    expected = torch.autograd.grad(explicit, (s, a))
    through = torch.autograd.grad(_explicit_normalised(s, a, temperature, None), (s, a))
    torch.testing.assert_close(value, explicit, **EXACT)
    for grad, fixed, full in zip(grads, expected, through):
        torch.testing.assert_close(grad, fixed, rtol=1e-10, atol=1e-11)  # float64 sums of terms up to 1 / t
        assert (grad - full).abs().max() > 1e-3  # a gradient through m would be seen


# ------------------------------------------------------------------------------------------- extreme scores, precision

# Rows of the identity: e_ij = 1 off the diagonal, so m = 1, and e^{+-1000} on it, which no float holds. N = 4, K = 3.
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('loss, aligned, opposed', [
    # N / M = 1 / 4: 3 log((1 + 1/4) / (1/4)), and -log h_ii = 1000 + log(1/4)
    (_literal, 3 * math.log(5), 1000 + math.log(0.25) + 3 * math.log(5)),
    # K m = 3: 3 log(4 / 3), and -log h_ii = 1000 + log 3
    (nce_loss, 3 * math.log(4 / 3), 1000 + math.log(3) + 3 * math.log(4 / 3)),
    (info_nce_loss, 0., 1000 + math.log(3)),
], ids=LOSSES)
def test_extreme_scores_have_closed_forms(loss, aligned, opposed, dtype):
    eye = torch.eye(4, dtype=dtype)
    tol = dict(rtol=1e-6, atol=1e-6) if dtype == torch.float32 else EXACT  # a few ulps of 1000
    for s, expected in ((eye, aligned), (-eye, opposed)):
        s = s.clone().requires_grad_()
        value = loss(s, eye, 1e-3)
        grad, = torch.autograd.grad(value, s)
        torch.testing.assert_close(value.detach(), _tensor(expected, dtype), **tol)
        assert grad.isfinite().all()


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@every_loss
def test_extreme_scores_of_any_sign_stay_finite(loss, dtype):
    s, a = _pair(7, seed=11, dtype=dtype)
    for x, y in ((s, a), (a, a), (-a, a), (a.roll(1, 0), a)):
        x = x.clone().requires_grad_()
        value = loss(x, y, 1e-3)
        grad, = torch.autograd.grad(value, x)
        assert value.isfinite() and value >= 0 and grad.isfinite().all()


@pytest.mark.parametrize('n', NS)
@every_pair
def test_autocast_leaves_the_loss_in_float32(loss, reference, n):
    s, a = _pair(n, seed=12, dtype=torch.bfloat16)
    outside = loss(s.float(), a.float())
    with torch.autocast('cpu', torch.bfloat16):
        values = loss(s, a), loss(s.float(), a.float())
    for value in values:
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, outside, rtol=1e-6, atol=1e-6)  # the same operations
        # bfloat16 features are exact in float32, so only float32's error on scores of 10 is left. Scores rounded to
        # bfloat16 (2^-9 of 10) would miss by 1e-2.
        torch.testing.assert_close(value.double(), _tensor(reference(s, a)), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- errors

@pytest.mark.parametrize('loss', [nce_loss, info_nce_loss])
def test_one_sample_has_no_negatives(loss):
    with pytest.raises(ValueError, match='at least 2 samples'):
        loss(*_pair(1))


@every_loss
def test_empty_batch(loss):
    with pytest.raises(ValueError):
        loss(torch.zeros(0, 4), torch.zeros(0, 4))


def test_num_pairs_belongs_to_the_literal_critic():
    s, a = _pair(4)
    with pytest.raises(ValueError, match='num_pairs'):
        nce_loss(s, a, num_pairs=16)
    with pytest.raises(ValueError, match='num_pairs'):
        nce_loss(s, a, num_pairs=16, normalize=True)


@pytest.mark.parametrize('num_pairs', [0, -16, math.nan])
def test_num_pairs_must_be_positive(num_pairs):
    with pytest.raises(ValueError, match='num_pairs'):
        nce_loss(*_pair(4), num_pairs=num_pairs, normalize=False)


@pytest.mark.parametrize('temperature', [0, 0., -0.1, math.nan])
@every_loss
def test_temperature_must_be_positive(loss, temperature):
    with pytest.raises(ValueError, match='temperature'):
        loss(*_pair(4), temperature)


@pytest.mark.parametrize('s_shape, a_shape', [
    ((4, 5), (3, 5)), ((4, 5), (4, 6)), ((4, 5), (5,)), ((5,), (5,)), ((2, 4, 5), (2, 4, 5)),
])
@every_loss
def test_shapes_must_agree(loss, s_shape, a_shape):
    with pytest.raises(ValueError, match='must both be'):
        loss(torch.ones(s_shape), torch.ones(a_shape))


# ----------------------------------------------------------------------------------------------- mutual information

@pytest.mark.parametrize('n', NS)
def test_bound_values(n):
    loss = _tensor(0.75)
    torch.testing.assert_close(mi_lower_bound(loss, n), _tensor(math.log(n - 1) - 0.75), **EXACT)
    torch.testing.assert_close(mi_lower_bound(loss, n, info_nce=True), _tensor(math.log(n) - 0.75), **EXACT)
    assert mi_lower_bound(loss, n).shape == ()


def _equal_scores(n: int) -> Tuple[torch.Tensor, torch.Tensor]:
    s, a = _pair(1, seed=13)
    return s.expand(n, -1), a.expand(n, -1)


@pytest.mark.parametrize('n', NS)
def test_equal_scores_tell_infonce_nothing(n):
    loss = info_nce_loss(*_equal_scores(n))
    torch.testing.assert_close(loss, _tensor(math.log(n)), **EXACT)
    torch.testing.assert_close(mi_lower_bound(loss, n, info_nce=True), _tensor(0.), **EXACT)


@pytest.mark.parametrize('n', NS)
def test_equal_scores_in_the_normalised_critic(n):
    # m = e, so h = 1 / (1 + K) = 1 / N everywhere, whatever the score is.
    loss = nce_loss(*_equal_scores(n))
    expected = math.log(n) - (n - 1) * math.log(1 - 1 / n)
    torch.testing.assert_close(loss, _tensor(expected), **EXACT)
    torch.testing.assert_close(mi_lower_bound(loss, n), _tensor(math.log(n - 1) - expected), **EXACT)
    assert mi_lower_bound(loss, n) < 0


@pytest.mark.parametrize('n', NS)
def test_perfect_alignment_comes_near_the_largest_bound(n):
    # Orthonormal pairs at t = 1e-2: e^100 against 1, the loss of InfoNCE is K e^-100.
    eye = torch.eye(n, dtype=torch.float64)
    torch.testing.assert_close(mi_lower_bound(info_nce_loss(eye, eye, 1e-2), n, info_nce=True),
                               _tensor(math.log(n)), **EXACT)
    # The normalised critic: m = 1, each of the K negatives costs log((1 + K) / K).
    torch.testing.assert_close(mi_lower_bound(nce_loss(eye, eye, 1e-2), n),
                               _tensor(math.log(n - 1) - (n - 1) * math.log(n / (n - 1))), **EXACT)


def test_bound_of_a_single_sample_is_minus_the_loss():
    loss = nce_loss(*_pair(1, seed=14), normalize=False)
    assert torch.equal(mi_lower_bound(loss, 1), -loss)  # K = 0 has no logarithm: taken for 1


def test_bound_keeps_the_gradient():
    loss = _tensor(0.5).requires_grad_()
    grad, = torch.autograd.grad(mi_lower_bound(loss, 8), loss)
    assert grad == -1
