"""The bound of Eq. 4 and the spike entropy against counted maps, enumerated probabilities and plain arithmetic."""
import itertools
import math

import pytest
import torch

import timm_sscl
from timm_sscl.report.representation import representation_bits, spike_entropy

# entr and log round once or twice each; the values are at most 1.
TOLS = {torch.float32: dict(rtol=0., atol=3e-7), torch.float64: dict(rtol=0., atol=1e-15)}


def _h(p: float) -> float:
    return sum(-q * math.log2(q) for q in (p, 1 - p) if q > 0)


@pytest.mark.parametrize('sizes, bits, expected', [
    ((1, 1, 1, 1), 1, 1),
    ((4, 1, 1, 1), 1, 4),
    ((2, 3, 5, 7), 1, 210),
    ((4, 512, 7, 7), 1, 100352),
    ((1, 512, 7, 7), 32, 802816),  # the real-valued twin: 8 times the bits of 4 steps of spikes
    ((2, 3, 5, 7), 32, 6720),
    ((4, 512, 1000, 1000), 1, 2048000000),
    ((4, 512, 1000, 1000), 32, 65536000000),  # beyond 32 bits
    ((3, 10 ** 9 + 7, 10 ** 9 + 9, 1), 1, 3000000048000000189),  # beyond float64's 53 bits
])
def test_bits_are_the_product(sizes, bits, expected):
    result = representation_bits(*sizes, bits=bits)
    assert type(result) is int and result == expected


def test_bits_default_to_spikes():
    assert representation_bits(4, 3, 2, 5) == representation_bits(timesteps=4, c=3, h=2, w=5, bits=1) == 120
    assert timm_sscl.representation_bits is representation_bits


@pytest.mark.parametrize('name', ['timesteps', 'c', 'h', 'w', 'bits'])
@pytest.mark.parametrize('value', [0, -1, 0.5, 1.5, -2.5, math.nan])
def test_sizes_must_be_positive_whole_numbers(name, value):
    sizes = dict(timesteps=4, c=3, h=2, w=2, bits=1)
    with pytest.raises(ValueError):
        representation_bits(**{**sizes, name: value})


@pytest.mark.parametrize('sizes, bits', [
    ((1, 1, 1, 1), 1), ((3, 1, 1, 1), 1), ((2, 3, 1, 1), 1), ((1, 1, 3, 3), 1), ((2, 1, 2, 3), 1),
    ((1, 2, 1, 2), 2), ((2, 1, 1, 2), 3),
])
def test_bits_count_the_distinct_maps(sizes, bits):
    # Every map there is, laid out as (T, c, h, w), listed and counted.
    maps = {tuple(torch.tensor(values).view(sizes).flatten().tolist())
            for values in itertools.product(range(2 ** bits), repeat=math.prod(sizes))}
    assert len(maps) == 2 ** representation_bits(*sizes, bits=bits)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_entropy_at_the_ends_and_in_the_middle(dtype):
    h = spike_entropy(torch.tensor([0., 1., 0.5], dtype=dtype))
    assert h.dtype == dtype
    assert h[0] == 0 and h[1] == 0
    torch.testing.assert_close(h[2], torch.tensor(1., dtype=dtype), **TOLS[dtype])


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_entropy_matches_the_formula(dtype):
    rates = torch.linspace(0, 1, 65, dtype=dtype)  # 64ths: p and 1 - p are exact
    expected = torch.tensor([_h(p) for p in rates.tolist()], dtype=dtype)
    h = spike_entropy(rates)
    torch.testing.assert_close(h, expected, **TOLS[dtype])
    torch.testing.assert_close(h, spike_entropy(1 - rates), **TOLS[dtype])
    assert h.argmax() == 32 and (h >= 0).all()


def test_entropy_keeps_the_shape_and_takes_the_smallest_rates():
    rates = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert spike_entropy(rates).shape == rates.shape
    assert spike_entropy(torch.tensor(0.25)).shape == ()
    tiny = spike_entropy(torch.tensor([1e-30, 1e-12], dtype=torch.float64))
    expected = torch.tensor([1e-30 * (math.log2(1e30) + 1 / math.log(2)), 1e-12 * (math.log2(1e12) + 1 / math.log(2))],
                            dtype=torch.float64)
    # Not nan; 1 - p rounds by 1e-16, which is 1e-4 of the second term at p = 1e-12 and all of it at 1e-30.
    torch.testing.assert_close(tiny, expected, rtol=2e-2, atol=0.)


def test_entropy_of_independent_spikes_is_the_entropy_of_the_maps():
    # -sum P log2 P over all 2^6 maps, each probability multiplied out.
    rates = [0.1, 0.5, 0.9, 0.25, 0., 0.7]
    total = 0.
    for spikes in itertools.product((0, 1), repeat=len(rates)):
        probability = math.prod(p if s else 1 - p for p, s in zip(rates, spikes))
        total -= probability * math.log2(probability) if probability > 0 else 0.
    result = spike_entropy(torch.tensor(rates, dtype=torch.float64)).sum().item()
    assert result == pytest.approx(total, rel=1e-12)  # 64 float64 terms


def test_fair_spikes_reach_the_bound_and_others_stay_below():
    sizes = 2, 3, 2, 2
    bound = representation_bits(*sizes)
    fair = spike_entropy(torch.full(sizes, 0.5, dtype=torch.float64)).sum().item()
    sparse = spike_entropy(torch.full(sizes, 0.1, dtype=torch.float64)).sum().item()
    assert fair == pytest.approx(bound, rel=1e-12)  # 24 float64 terms
    assert sparse == pytest.approx(bound * _h(0.1), rel=1e-12) and sparse < 0.5 * bound
