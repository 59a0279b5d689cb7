"""HSIC, CKA and the running CKA against plain Python loops in float64, exact statements and invariances."""
import itertools
import math
from typing import Iterator, List, Tuple

import pytest
import torch

from timm_sscl.losses.cka import RunningCKA, cka, gram_matrix, hsic, hsic_terms

Matrix = List[List[float]]

# Library and loops add the same float64 numbers in another order. The sums hold at most 9^4 terms, so round-off stays
# near 1e-14 of the largest; a wrong factor such as n for n - 1 would be 1e-1.
EXACT = dict(rtol=1e-11, atol=1e-11)


def _randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _related(n: int, seed: int = 0, p: int = 6, q: int = 4) -> Tuple[torch.Tensor, torch.Tensor]:
    """Two sets of features of the same n samples that share a part, so that their CKA is neither 0 nor 1."""
    x = _randn(n, p, seed=seed)
    return x, x[:, :q] + _randn(n, q, seed=seed + 100)


# --------------------------------------------------------------------------------------------------------- references

def _loop_gram(x: torch.Tensor) -> Matrix:
    rows = [row.flatten().double().tolist() for row in x]
    return [[math.fsum(u * v for u, v in zip(a, b)) for b in rows] for a in rows]


def _loop_hsic_unbiased(K: Matrix, L: Matrix) -> float:
    n = len(K)
    k = [[0. if i == j else K[i][j] for j in range(n)] for i in range(n)]
    m = [[0. if i == j else L[i][j] for j in range(n)] for i in range(n)]
    trace = total_k = total_l = cross = 0.
    for i in range(n):
        for j in range(n):
            trace += k[i][j] * m[j][i]
            total_k += k[i][j]
            total_l += m[i][j]
            for q in range(n):
                cross += k[i][j] * m[j][q]
    return (trace + total_k * total_l / ((n - 1) * (n - 2)) - 2 / (n - 2) * cross) / (n * (n - 3))


def _loop_hsic_biased(K: Matrix, L: Matrix) -> float:
    n = len(K)
    H = [[(i == j) - 1 / n for j in range(n)] for i in range(n)]

    def product(A: Matrix, B: Matrix) -> Matrix:
        return [[sum(A[i][q] * B[q][j] for q in range(n)) for j in range(n)] for i in range(n)]

    khlh = product(product(K, H), product(L, H))
    return sum(khlh[i][i] for i in range(n)) / (n - 1) ** 2


def _loop_hsic(K: Matrix, L: Matrix, unbiased: bool = True) -> float:
    return _loop_hsic_unbiased(K, L) if unbiased else _loop_hsic_biased(K, L)


def _loop_terms(x: torch.Tensor, y: torch.Tensor, unbiased: bool = True) -> List[float]:
    K, L = _loop_gram(x), _loop_gram(y)
    return [_loop_hsic(K, L, unbiased), _loop_hsic(K, K, unbiased), _loop_hsic(L, L, unbiased)]


def _loop_cka(x: torch.Tensor, y: torch.Tensor, unbiased: bool = True) -> float:
    kl, kk, ll = _loop_terms(x, y, unbiased)
    return kl / math.sqrt(kk * ll)


def _tensor(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize('unbiased', [True, False])
@pytest.mark.parametrize('n', [4, 5, 9])
def test_hsic_matches_loops(n, unbiased):
    x, y = _related(n, seed=n)
    K, L = _loop_gram(x), _loop_gram(y)
    expected = _loop_hsic(K, L, unbiased)
    assert abs(expected) > 1e-3  # otherwise the tolerance would hide everything
    K64, L64 = torch.tensor(K, dtype=torch.float64), torch.tensor(L, dtype=torch.float64)
    torch.testing.assert_close(hsic(K64, L64, unbiased), _tensor(expected), **EXACT)
    # float32: some 100 additions of 6e-8 each, of terms a few times the result
    torch.testing.assert_close(hsic(K64.float(), L64.float(), unbiased), torch.tensor(expected), rtol=1e-4, atol=0.)


@pytest.mark.parametrize('unbiased', [True, False])
@pytest.mark.parametrize('n', [4, 5, 9])
def test_hsic_of_centred_gram_matrices_is_that_of_the_plain_ones(n, unbiased):
    x, y = _related(n, seed=n)
    expected = _loop_hsic(_loop_gram(x), _loop_gram(y), unbiased)
    torch.testing.assert_close(hsic(gram_matrix(x[None]), gram_matrix(y[None]), unbiased), _tensor(expected), **EXACT)


@pytest.mark.parametrize('n', [4, 5, 6])
def test_unbiased_hsic_is_the_u_statistic_over_quadruples(n):
    # The definition behind the closed formula: the mean over ordered quadruples of distinct samples.
    x, y = _related(n, seed=n)
    K, L = _loop_gram(x), _loop_gram(y)
    values = [K[i][j] * L[i][j] + K[i][j] * L[q][r] - 2 * K[i][j] * L[i][q]
              for i, j, q, r in itertools.permutations(range(n), 4)]
    expected = math.fsum(values) / len(values)
    assert abs(expected) > 1e-3
    torch.testing.assert_close(hsic(gram_matrix(x[None]), gram_matrix(y[None])), _tensor(expected), **EXACT)


@pytest.mark.parametrize('unbiased', [True, False])
@pytest.mark.parametrize('n', [4, 5, 9])
def test_cka_matches_loops(n, unbiased):
    x, y = _related(n, seed=10 + n)
    expected = _loop_cka(x, y, unbiased)
    assert 1e-2 < abs(expected) < 0.99
    torch.testing.assert_close(cka(x, y, unbiased), _tensor(expected), **EXACT)


@pytest.mark.parametrize('unbiased', [True, False])
@pytest.mark.parametrize('n', [4, 5, 9])
def test_cka_of_feature_maps_of_different_sizes_matches_loops(n, unbiased):
    x, noise = _randn(n, 3, 4, 2, seed=n), _randn(n, 2, 2, 2, seed=n + 50)
    y = x[:, :2, :2] + 0.5 * noise
    expected = _loop_cka(x, y, unbiased)
    torch.testing.assert_close(cka(x, y, unbiased), _tensor(expected), **EXACT)
    assert torch.equal(cka(x, y, unbiased), cka(x.flatten(1), y.flatten(1), unbiased))


@pytest.mark.parametrize('unbiased', [True, False])
def test_one_number_per_sample_is_a_feature(unbiased):
    x, y = _randn(6, seed=1), _randn(6, seed=2)
    torch.testing.assert_close(cka(x, y, unbiased), _tensor(_loop_cka(x, y, unbiased)), **EXACT)


def test_default_is_the_unbiased_estimator():
    x, y = _related(6)
    K, L = gram_matrix(x[None]), gram_matrix(y[None])
    assert torch.equal(cka(x, y), cka(x, y, unbiased=True)) and not torch.equal(cka(x, y), cka(x, y, unbiased=False))
    assert torch.equal(hsic(K, L), hsic(K, L, unbiased=True)) and not torch.equal(hsic(K, L), hsic(K, L, False))


@pytest.mark.parametrize('unbiased', [True, False])
def test_terms_are_the_three_of_the_ratio(unbiased):
    x, y = _related(7, seed=3)
    terms = hsic_terms(gram_matrix(x[None]), gram_matrix(y[None]), unbiased)
    torch.testing.assert_close(terms, torch.tensor(_loop_terms(x, y, unbiased), dtype=torch.float64), **EXACT)


# ------------------------------------------------------------------------------------------------------- unbiasedness

@pytest.mark.parametrize('n', [4, 5])
def test_unbiased_hsic_averages_to_zero_over_all_permutations(n):
    # Averaged over P, P L P' has one value off the diagonal, and HSIC_1 of any K with that matrix is exactly 0.
    x, y = _related(n, seed=20 + n)
    K, L = gram_matrix(x[None]), gram_matrix(y[None])
    permutations = [list(p) for p in itertools.permutations(range(n))]
    values = torch.stack([hsic(K, L[p][:, p]) for p in permutations])
    biased = torch.stack([hsic(K, L[p][:, p], unbiased=False) for p in permutations])
    assert values.abs().max() > 0.1 and (values < 0).any()
    assert abs(values.mean()) < 1e-13  # up to 120 values near 1 with round-off 1e-16 each
    assert biased.min() >= 0 and biased.mean() > 0.1


def test_hsic_of_independent_features():
    # Seeded, hence not flaky: the mean of 400 draws lies within 4 standard errors of 0 for 99.99 % of all seeds.
    draws = [(gram_matrix(_randn(1, 6, 3, seed=i)), gram_matrix(_randn(1, 6, 3, seed=1000 + i))) for i in range(400)]
    unbiased = torch.stack([hsic(K, L) for K, L in draws])
    biased = torch.stack([hsic(K, L, unbiased=False) for K, L in draws])
    assert abs(unbiased.mean()) < 4 * unbiased.std() / math.sqrt(len(draws))
    assert 0.25 < (unbiased < 0).double().mean() < 0.75
    assert biased.min() > 0 and biased.mean() > 4 * biased.std() / math.sqrt(len(draws))  # the bias, for contrast


def test_negative_hsic_gives_negative_cka():
    x, y = _related(5, seed=25)
    K = gram_matrix(x[None])
    # The mean over all orders is 0, so the lowest is negative.
    order = list(min(itertools.permutations(range(5)), key=lambda p: hsic(K, gram_matrix(y[list(p)][None])).item()))
    expected = _loop_cka(x, y[order])
    assert expected < -0.1
    torch.testing.assert_close(cka(x, y[order]), _tensor(expected), **EXACT)


# --------------------------------------------------------------------------------------------------------- invariants

@pytest.mark.parametrize('unbiased', [True, False])
def test_cka_of_features_with_themselves_is_one(unbiased):
    x = _randn(6, 3, 2, 2)
    torch.testing.assert_close(cka(x, x, unbiased), _tensor(1.), **EXACT)
    torch.testing.assert_close(cka(x, -2 * x + 3, unbiased), _tensor(1.), **EXACT)


@pytest.mark.parametrize('unbiased', [True, False])
def test_cka_invariances(unbiased):
    x, y = _related(8, seed=30)
    value = cka(x, y, unbiased)
    orthogonal = torch.linalg.qr(_randn(6, 6, seed=31)).Q
    order = torch.randperm(8, generator=torch.Generator().manual_seed(32))
    assert 0.1 < value < 0.95
    torch.testing.assert_close(cka(y, x, unbiased), value, **EXACT)
    torch.testing.assert_close(cka(x @ orthogonal, y, unbiased), value, **EXACT)
    torch.testing.assert_close(cka(1e3 * x, 1e-3 * y, unbiased), value, **EXACT)
    torch.testing.assert_close(cka(x + _randn(6, seed=33), y - 5., unbiased), value, **EXACT)
    torch.testing.assert_close(cka(x[order], y[order], unbiased), value, **EXACT)
    # What it must not be invariant to.
    assert abs(cka(x[order], y, unbiased) - value) > 1e-2
    assert abs(cka(x * torch.arange(1., 7.), y, unbiased) - value) > 1e-2


@pytest.mark.parametrize('scale', [1e-8, 1e8])
def test_scale_of_the_features_does_not_leave_float32(scale):
    # HSIC(K, K) is near scale^4 = 1e-32 or 1e32: the product of two of them does not fit float32, its roots do.
    x, y = (z.float() for z in _related(8, seed=34))
    # Scaling by no power of two rounds every feature once: 6e-8 each.
    torch.testing.assert_close(cka(scale * x, scale * y), cka(x, y), rtol=1e-5, atol=0.)


# A factor of no power of two rounds every feature once, 6e-8 each, whatever the scale.
ROUNDED = dict(rtol=1e-5, atol=0.)


@pytest.mark.parametrize('scale', [1e8, 1e-12, 1e18, 1e-30])
@pytest.mark.parametrize('unbiased', [True, False])
def test_scale_of_one_side_does_not_matter(scale, unbiased):
    x, y = (z.float() for z in _related(8, seed=35))
    expected = cka(x, y, unbiased)
    torch.testing.assert_close(expected.double(), _tensor(_loop_cka(x, y, unbiased)), **ROUNDED)
    torch.testing.assert_close(cka(scale * x, y, unbiased), expected, **ROUNDED)
    torch.testing.assert_close(cka(x, scale * y, unbiased), expected, **ROUNDED)
    torch.testing.assert_close(cka(scale * x, y / scale, unbiased), expected, **ROUNDED)


@pytest.mark.parametrize('scale', [1e8, 1e-12])
def test_gradient_of_a_scaled_side(scale):
    x, y = (z.float() for z in _related(8, seed=36))
    grads = []
    for factor in (1., scale):
        leaf = x.clone().requires_grad_()
        cka(factor * leaf, y).backward()
        grads.append(leaf.grad)
    assert grads[0].abs().max() > 1e-3
    # round-off of the largest entry, the sums of the gradient cancel in some
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-6)


def test_gradient_of_cka():
    x, y = (z.requires_grad_() for z in _related(6, seed=37))
    assert torch.autograd.gradcheck(cka, (x, y))
    assert torch.autograd.gradcheck(lambda x, y: cka(x, y, unbiased=False), (x, y))


@pytest.mark.parametrize('scale,taken_in', [(1e6, True), (1e8, True), (1e-6, True), (1e12, False), (1e-30, False)])
def test_running_cka_of_a_scaled_side(scale, taken_in):
    # The terms hold scale^4; where float32 has no room for it the batch has a CKA and the means stay as they are.
    x, y = (z.float()[None] for z in _related(8, seed=38))
    expected = cka(x[0], y[0])
    running = RunningCKA()
    batch, value = running(scale * x, y)
    torch.testing.assert_close(batch, expected, **ROUNDED)
    if taken_in:
        torch.testing.assert_close(value, expected, **ROUNDED)
    else:
        assert value.isnan() and running.mean_weight == 0
        torch.testing.assert_close(running(x, y)[1], expected, **ROUNDED)


@pytest.mark.parametrize('dtype', [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int64, torch.float16,
                                   torch.bfloat16])
@pytest.mark.parametrize('unbiased', [True, False])
def test_spikes_of_any_dtype(dtype, unbiased):
    spikes, other = (z > 0 for z in _related(9, seed=39, p=12, q=8))
    expected = _loop_cka(spikes.double(), other.double(), unbiased)
    assert abs(expected) > 0.05
    for x, y in ((spikes.to(dtype), other.to(dtype)), (spikes.to(dtype), other.float())):
        value = cka(x, y, unbiased)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), _tensor(expected), **ROUNDED)
    # what a difference of unsigned numbers would wrap round
    shifted = cka(spikes.to(dtype) if dtype == torch.bool else 1 - spikes.to(dtype), other.to(dtype), unbiased)
    torch.testing.assert_close(shifted.double(), _tensor(expected), **ROUNDED)
    batch, _ = RunningCKA()(spikes[None].to(dtype), other[None].to(dtype))
    torch.testing.assert_close(batch.double(), _tensor(_loop_cka(spikes.double(), other.double())), **ROUNDED)


@pytest.mark.parametrize('dtype', [torch.bool, torch.uint8, torch.int32, torch.float16])
@pytest.mark.parametrize('unbiased', [True, False])
def test_hsic_of_gram_matrices_of_any_dtype(dtype, unbiased):
    x, y = (z > 0 for z in _related(7, seed=42))
    K, L = ((z.double() @ z.double().T).to(dtype) for z in (x, y))  # counts of at most 6, exact in all
    expected = hsic(K.double(), L.double(), unbiased)
    value = hsic(K, L, unbiased)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)


def test_complex_features_raise():
    x = torch.complex(_randn(6, 3), _randn(6, 3, seed=1))
    for call in (lambda: cka(x, x.real), lambda: cka(x.real, x), lambda: hsic(x @ x.mH, x.real @ x.real.T)):
        with pytest.raises(ValueError, match='complex'):
            call()


def test_float32_holds_on_features_with_a_large_mean():
    # Non-negative features whose mean is 100 times their spread, as a map of mostly active units has.
    x64, y64 = (z * 0.1 + 10 for z in _related(16, seed=40, p=64, q=64))
    x, y = x64.float(), y64.float()
    assert x.min() > 0 and y.min() > 0
    # Of the rounded features, so that only the arithmetic is compared; the shift, exact in float64, changes no HSIC_1.
    expected = _loop_cka(x.double() - 10, y.double() - 10)
    error = abs(cka(x, y).item() - expected) / expected
    K, L = x @ x.T, y @ y.T
    naive = hsic(K, L) / (hsic(K, K).sqrt() * hsic(L, L).sqrt())
    naive_error = abs(naive.item() - expected) / expected
    assert cka(x, y).dtype == torch.float32
    # Differences of close numbers are exact, so the centred features lose next to nothing. Uncentred, entries of 6400
    # carry a signal below 1, and their squares cancel: what is left is noise, or the root of a negative number.
    assert error < 1e-4
    assert not naive_error < 1e-2


# ------------------------------------------------------------------------------------------------------------- silence

@pytest.mark.parametrize('n', [4, 7, 32])
@pytest.mark.parametrize('value', [0., 0.1, 0.7, 1., 1000.1])
@pytest.mark.parametrize('unbiased', [True, False])
def test_features_that_never_vary_give_nan(unbiased, value, n):
    # 0 / 0. The mean of 7 values 0.1 is not 0.1 in float32: the rest would make a number out of noise.
    silent, active = torch.full((n, 3, 2, 2), value), _randn(n, 5, dtype=torch.float32)
    assert not gram_matrix(silent[None]).any()
    for x, y in ((silent, active), (active, silent), (silent, silent)):
        assert cka(x, y, unbiased).isnan()


def test_some_constant_features_change_nothing():
    x, y = _related(7, seed=41)
    padded = torch.cat([x, torch.full((7, 3), 0.1, dtype=x.dtype)], 1)
    torch.testing.assert_close(cka(padded, y), cka(x, y), **EXACT)


# ------------------------------------------------------------------------------------------------------------- errors

@pytest.mark.parametrize('n', [1, 2, 3])
def test_unbiased_needs_four_samples(n):
    K, x = torch.eye(n), _randn(n, 5)
    for call in (lambda: hsic(K, K), lambda: cka(x, x), lambda: RunningCKA()(x[None], x[None])):
        with pytest.raises(ValueError, match='at least 4'):
            call()


def test_biased_needs_two_samples():
    x, y = _randn(2, 5), _randn(2, 5, seed=1)
    torch.testing.assert_close(cka(x, y, unbiased=False), _tensor(1.), **EXACT)  # two points: both are one distance
    with pytest.raises(ValueError, match='at least 2'):
        cka(x[:1], y[:1], unbiased=False)


@pytest.mark.parametrize('unbiased', [True, False])
def test_batches_must_agree(unbiased):
    with pytest.raises(ValueError, match='same number of samples'):
        cka(_randn(5, 3), _randn(6, 3), unbiased)
    with pytest.raises(ValueError):
        cka(_tensor(1.), _tensor(1.), unbiased)
    with pytest.raises(ValueError, match='same n samples'):
        hsic(torch.eye(5), torch.eye(6), unbiased)
    with pytest.raises(ValueError):
        RunningCKA()(_randn(2, 5, 3), _randn(1, 6, 3))


@pytest.mark.parametrize('unbiased', [True, False])
@pytest.mark.parametrize('shape', [(5, 6), (25,), (1, 5, 5)])
def test_gram_matrices_must_be_square(shape, unbiased):
    with pytest.raises(ValueError, match='Gram'):
        hsic(torch.ones(shape), torch.ones(shape), unbiased)


# -------------------------------------------------------------------------------------------- time axis and precision

@pytest.mark.parametrize('shape', [(3, 5, 4), (2, 6, 3, 2, 2), (1, 4, 7), (4, 5)])
def test_time_is_part_of_the_features(shape):
    x = _randn(*shape)
    flat = x.transpose(0, 1).flatten(1)
    result = gram_matrix(x)
    assert result.shape == (shape[1], shape[1])
    torch.testing.assert_close(result, gram_matrix(flat[None]), **EXACT)
    mean = [math.fsum(column) / shape[1] for column in flat.T.tolist()]
    centred = torch.tensor([[v - m for v, m in zip(row, mean)] for row in flat.tolist()], dtype=torch.float64)
    torch.testing.assert_close(result, torch.tensor(_loop_gram(centred), dtype=torch.float64), **EXACT)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_gram_matrix_of_half_precision_is_float32(dtype):
    x = _randn(2, 6, 5, dtype=dtype)
    expected = gram_matrix(x.float())
    assert expected.dtype == torch.float32 and torch.equal(gram_matrix(x), expected)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(gram_matrix(x), expected)
        assert torch.equal(gram_matrix(x.float()), expected)


@pytest.mark.parametrize('unbiased', [True, False])
@pytest.mark.parametrize('n', [5, 8, 16])
def test_autocast_leaves_cka_in_float32(n, unbiased):
    # Spike-like features: a product left to autocast would keep 8 bits of sums that cancel.
    x, y = ((z > 0).to(torch.bfloat16) for z in _related(n, seed=50 + n, p=32, q=32))
    expected = cka(x.float(), y.float(), unbiased)
    with torch.autocast('cpu', torch.bfloat16):
        values = cka(x, y, unbiased), cka(x.float(), y.float(), unbiased)
    for value in values:
        assert value.dtype == torch.float32
        assert torch.equal(value, expected)  # the same operations on the same numbers


@pytest.mark.parametrize('unbiased', [True, False])
def test_autocast_leaves_hsic_in_float32(unbiased):
    K, L = (gram_matrix(z[None].float()) for z in _related(6, seed=60))
    expected = hsic(K, L, unbiased)
    with torch.autocast('cpu', torch.bfloat16):
        value = hsic(K, L, unbiased)
    assert value.dtype == torch.float32 and torch.equal(value, expected)


def test_autocast_leaves_the_running_cka_in_float32():
    x, y = (z[None].to(torch.bfloat16) for z in _related(6, seed=61))
    plain, cast = RunningCKA(), RunningCKA()
    expected = plain(x.float(), y.float())
    with torch.autocast('cpu', torch.bfloat16):
        values = cast(x, y)
    assert torch.equal(torch.stack(values), torch.stack(expected))
    assert torch.equal(cast.mean_terms, plain.mean_terms)


# -------------------------------------------------------------------------------------------------------- running CKA

def _batches(count: int = 4, n: int = 6) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
    """Student maps with 3 time steps and teacher maps with 1, whose scale changes from batch to batch."""
    for i in range(count):
        student = _randn(3, n, 2, 2, 2, seed=70 + i) * (i + 1)
        teacher = student.mean(0, keepdim=True)[:, :, :1] + 0.3 * _randn(1, n, 1, 2, 2, seed=80 + i)
        yield student, teacher


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(0, 1).flatten(1)


@pytest.mark.parametrize('dtype, tol', [
    # The buffers' own precision; the sums behind them are float64 in both cases.
    (torch.float32, dict(rtol=1e-5, atol=0.)),
    (torch.float64, EXACT),
])
@pytest.mark.parametrize('momentum', [0.1, 0.5, 1.])
def test_running_cka_matches_loops(momentum, dtype, tol):
    running = RunningCKA(momentum).to(dtype)
    means, weight = [0., 0., 0.], 0.
    for student, teacher in _batches():
        terms = _loop_terms(_flat(student), _flat(teacher))
        means = [(1 - momentum) * m + momentum * t for m, t in zip(means, terms)]
        weight = (1 - momentum) * weight + momentum
        kl, kk, ll = (m / weight for m in means)
        batch, value = running(student, teacher)
        torch.testing.assert_close(batch, _tensor(terms[0] / math.sqrt(terms[1] * terms[2])), **EXACT)
        torch.testing.assert_close(running.terms, torch.tensor([kl, kk, ll], dtype=dtype), **tol)
        torch.testing.assert_close(value, torch.tensor(kl / math.sqrt(kk * ll), dtype=dtype), **tol)
        assert torch.equal(value, running.value)
        assert value.shape == batch.shape == ()


@pytest.mark.parametrize('momentum', [0.01, 0.1, 0.5, 1.])
def test_first_batch_is_the_value_for_any_momentum(momentum):
    running = RunningCKA(momentum).double()
    student, teacher = next(_batches())
    batch, value = running(student, teacher)
    torch.testing.assert_close(value, batch, **EXACT)
    torch.testing.assert_close(running.terms, hsic_terms(gram_matrix(student), gram_matrix(teacher)), **EXACT)


def test_momentum_one_keeps_the_last_batch_only():
    running = RunningCKA(1.).double()
    for student, teacher in _batches():
        batch, value = running(student, teacher)
        torch.testing.assert_close(value, batch, **EXACT)


def test_default_momentum_weighs_batches_by_a_tenth():
    running, explicit = RunningCKA(), RunningCKA(momentum=0.1)
    for student, teacher in _batches():
        assert torch.equal(running(student, teacher)[1], explicit(student, teacher)[1])
    assert 'momentum=0.1' in repr(running)


@pytest.mark.parametrize('momentum', [0, 0., -0.1, 1.0001, 2, math.nan])
def test_bad_momentum(momentum):
    with pytest.raises(ValueError, match='momentum'):
        RunningCKA(momentum)


def test_ratio_of_means_is_not_mean_of_ratios():
    # Two batches that differ in scale and in similarity: the strong one rules the means, not the mean of the ratios.
    weak, strong = _randn(1, 8, 4, seed=90), 10 * _randn(1, 8, 4, seed=91)
    other = 10 * _randn(1, 8, 4, seed=92)
    running = RunningCKA(0.5).double()
    first = running(weak, weak)[0].item()
    second, value = (v.item() for v in running(strong, other))
    # Weights 1/4 and 1/2, corrected by their sum 3/4.
    a, b = _loop_terms(weak[0], weak[0]), _loop_terms(strong[0], other[0])
    kl, kk, ll = ((u + 2 * v) / 3 for u, v in zip(a, b))
    assert value == pytest.approx(kl / math.sqrt(kk * ll), rel=1e-10)  # float64 sums of differing order
    assert first == pytest.approx(1., abs=1e-10)
    assert abs(value - (first + 2 * second) / 3) > 0.2


def test_value_is_nan_before_the_first_batch():
    running = RunningCKA()
    assert running.value.isnan() and running.terms.isnan().all()
    batch, value = running.eval()(*next(_batches()))
    assert batch.isfinite() and value.isnan()


def test_evaluation_does_not_move_the_means():
    running = RunningCKA(0.5)
    (x, y), (u, v), _, _ = _batches()
    running(x, y)
    state = {name: buffer.clone() for name, buffer in running.state_dict().items()}
    batch, value = running.eval()(u, v)
    torch.testing.assert_close(batch, _tensor(_loop_cka(_flat(u), _flat(v))), **EXACT)
    torch.testing.assert_close(value.double(), _tensor(_loop_cka(_flat(x), _flat(y))), rtol=1e-5, atol=0.)  # float32
    for name, buffer in running.state_dict().items():
        assert torch.equal(buffer, state[name])
    running.train()(u, v)
    assert not torch.equal(running.mean_terms, state['mean_terms'])
    assert not torch.equal(running.mean_weight, state['mean_weight'])


def test_state_dict_round_trip():
    whole, first, second = RunningCKA(0.3), RunningCKA(0.3), RunningCKA(0.3)
    batches = list(_batches())
    for batch in batches[:2]:
        whole(*batch)
        first(*batch)
    assert set(first.state_dict()) == {'mean_terms', 'mean_weight'}
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.value, first.value)
    for batch in batches[2:]:
        assert torch.equal(whole(*batch)[1], second(*batch)[1])


def test_returned_value_does_not_move_with_later_batches():
    running = RunningCKA(0.5)
    (x, y), (u, v), _, _ = _batches()
    value = running(x, y)[1]
    kept = value.clone()
    running(u, v)
    assert torch.equal(value, kept) and not torch.equal(running.value, kept)


def test_running_cka_carries_no_gradient():
    running = RunningCKA()
    student, teacher = next(_batches())
    batch, value = running(student.requires_grad_(), teacher)
    assert not batch.requires_grad and not value.requires_grad and not running.mean_terms.requires_grad


def test_silent_batch_does_not_spoil_the_running_value():
    # Its three terms are 0, 0 and HSIC(L, L): the batch has no CKA, the means stay finite.
    running = RunningCKA(0.5).double()
    student, teacher = next(_batches())
    batch, value = running(torch.zeros_like(student), teacher)
    assert batch.isnan() and value.isnan() and running.terms.isfinite().all()
    batch, value = running(student, teacher)
    kl, kk, ll = _loop_terms(_flat(student), _flat(teacher))
    # Weights 1/3 (silent) and 2/3 after the correction.
    assert value.item() == pytest.approx((2 * kl / 3) / math.sqrt((2 * kk / 3) * ll), rel=1e-10)
    assert batch.item() == pytest.approx(kl / math.sqrt(kk * ll), rel=1e-10)
