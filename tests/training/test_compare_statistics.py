"""Statistics of the comparison against scipy, closed forms, a published power table and enumeration."""
import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / 'benchmarks'))

import compare_statistics as cs


def test_pairs_are_those_that_both_have():
    assert cs.paired_differences({3: 5., 1: 2., 2: 9.}, {1: 1.5, 3: 7., 4: 0.}) == {1: .5, 3: -2.}


def test_interval_and_p_are_scipys():
    rng = np.random.RandomState(0)
    a, b = rng.normal(70, 1, 6), rng.normal(69, 1, 6)
    test = stats.ttest_rel(a, b)
    interval = cs.t_interval(a - b)
    # the same formulas in float64
    assert (interval.low, interval.high) == pytest.approx(tuple(test.confidence_interval(.95)), rel=1e-9)
    assert cs.t_test(a - b) == pytest.approx(test.pvalue, rel=1e-9)
    low = stats.ttest_1samp(a - b, -1.5, alternative='greater').pvalue
    high = stats.ttest_1samp(a - b, 1.5, alternative='less').pvalue
    assert cs.equivalence_test(a - b, 1.5) == pytest.approx(max(low, high), rel=1e-9)


def test_interval_of_two_pairs_by_hand():
    # differences 1 and 3: mean 2, s / sqrt(2) = 1, t(0.975) = tan(0.475 pi) for one degree of freedom
    interval = cs.t_interval([1., 3.])
    assert interval.mean == 2 and interval.half == pytest.approx(math.tan(.475 * math.pi), rel=1e-9)
    assert not interval.excludes(0.) and interval.excludes(20.) and not interval.within(14.7)
    assert interval.within(14.8)  # 2 + 12.706


def test_too_few_or_equal_values():
    for function in (cs.t_interval, cs.t_test, cs.equivalence_test, cs.sd_interval):
        assert function([1.]) is None and function([]) is None
    assert cs.t_test([2., 2., 2.]) == 0 and cs.t_test([0., 0.]) == 1
    assert cs.equivalence_test([.25, .25], .5) == 0 and cs.equivalence_test([.5, .5], .5) == 1
    assert cs.detectable_difference(1, .8) is None
    with pytest.raises(ValueError, match='difference=0'):
        cs.pairs_for_power(1., 0)


def test_holm_by_hand():
    # sorted .01 .02 .03 .9: times 4, 3, 2, 1 = .04 .06 .06 .9
    assert cs.holm([.03, .01, .9, .02]) == pytest.approx([.06, .04, .9, .06])
    assert cs.holm([.04, .03]) == pytest.approx([.06, .06])  # never below a smaller p's
    assert cs.holm([.6, .7]) == [1., 1.] and cs.holm([]) == []


@pytest.mark.parametrize('sd, difference, target, alpha, pairs', [
    (.83, .5, .8, .05, 24), (.83, .5, .9, .05, 31), (1.15, .5, .8, .05, 44), (.83, .75, .8, .05, 12),
    (.83, 1., .8, .05, 8), (1.15, 1., .8, .05, 13), (.83, 1.5, .8, .05, 5), (.83, .5, .8, .01, 36),
    (.83, .5, .8, .005, 41), (.83, .5, .8, .0025, 46), (1.15, .5, .8, .01, 66)])
def test_number_of_pairs_is_the_power_tables(sd, difference, target, alpha, pairs):
    assert cs.pairs_for_power(sd, difference, target, alpha) == pairs
    assert cs.power(pairs - 1, sd, difference, alpha) < target <= cs.power(pairs, sd, difference, alpha)


def test_power_is_that_of_simulated_tests():
    assert [round(cs.power(n, .83, .5), 2) for n in (3, 5, 10, 20)] == [.1, .18, .4, .72]  # the power table's
    rng, draws = np.random.RandomState(0), 20_000
    found = stats.ttest_1samp(rng.normal(.5, .83, (draws, 10)), 0., axis=1).pvalue < .05
    assert cs.power(10, .83, .5) == pytest.approx(found.mean(), abs=4 * math.sqrt(.24 / draws))  # four binomial errors
    assert cs.power(10, .83, 0.) == pytest.approx(.05, abs=1e-6)  # the test's level


def test_detectable_difference_is_the_inverse_of_power():
    for pairs in (2, 8, 24):
        difference = cs.detectable_difference(pairs, .83)
        assert cs.power(pairs, .83, difference) == pytest.approx(.8, abs=1e-6)  # bisection to 1e-9 of the difference
    assert cs.detectable_difference(24, .83) < .5 < cs.detectable_difference(23, .83)


def test_equivalence_of_26_pairs_is_found_in_82_percent():
    rng, draws = np.random.RandomState(1), 4000
    found = np.mean([cs.equivalence_test(x, .5) < .05 for x in rng.normal(0, .83, (draws, 26))])
    assert found == pytest.approx(.82, abs=4 * math.sqrt(.15 / draws))  # four binomial errors


def test_sd_interval_is_the_texts_and_covers():
    # LOSSES' numbers for an SD of 0.83: from 3 seeds 0.43 to 5.2, from 10 seeds 0.57 to 1.52
    for n, low, high in ((3, .43, 5.2), (10, .57, 1.52)):
        values = np.linspace(-1, 1, n)
        interval = cs.sd_interval(values / np.std(values, ddof=1) * .83)
        assert interval == pytest.approx((.83, low, high), abs=.02)  # printed with two digits
    rng, draws = np.random.RandomState(2), 4000
    covered = [not cs.sd_interval(x).excludes(2.) for x in rng.normal(5, 2., (draws, 6))]
    assert np.mean(covered) == pytest.approx(.95, abs=4 * math.sqrt(.0475 / draws))  # four binomial errors


# ---- seeds and images

def test_bootstrap_is_the_enumeration_of_all_draws():
    """3 seeds and 3 images have 27 x 27 equally likely draws."""
    a = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1]])
    b = np.array([[0, 1, 0], [1, 1, 0], [0, 0, 1]])
    d = a - b
    means = [100 * np.mean([d[s, i] for s in seeds for i in images])
             for seeds in itertools.product(range(3), repeat=3) for images in itertools.product(range(3), repeat=3)]
    interval = cs.bootstrap_difference(a, b, draws=200_000, confidence=.7)
    assert interval.mean == pytest.approx(100 * d.mean())
    ordered = np.sort(means)
    for value, tail in ((interval.low, .15), (interval.high, .85)):
        # the quantile lies on the mean that the enumeration has there, give or take four errors of the tail's share
        error = 4 * math.sqrt(.15 * .85 / 200_000)
        near = ordered[int((tail - error) * len(ordered)):int((tail + error) * len(ordered)) + 2]
        assert near.min() - 1e-4 <= value <= near.max() + 1e-4  # the draws' sums are in float32


def test_bootstrap_of_one_seed_has_the_binomial_error():
    rng, images = np.random.RandomState(3), 4000
    a = (rng.rand(1, images) < .7).astype(int)
    interval = cs.bootstrap_difference(a, np.zeros_like(a), draws=4000)
    p = a.mean()
    assert interval.mean == pytest.approx(100 * p)
    # two draws' quantiles have an error of about 2 %
    assert interval.half == pytest.approx(100 * 1.96 * math.sqrt(p * (1 - p) / images), rel=.1)


def test_bootstrap_counts_images_and_seeds():
    """With effects of seeds and images, the variance is that of both: about s2 / S + i2 / N."""
    rng, seeds, images = np.random.RandomState(4), 40, 400
    shift = rng.normal(0, .1, (seeds, 1)) + (rng.rand(1, images) < .5) * .6 + .2
    a = (rng.rand(seeds, images) < shift).astype(int)
    interval = cs.bootstrap_difference(a, np.zeros_like(a), draws=4000)
    variance = a.mean(1).var() / seeds + a.mean(0).var() / images
    assert interval.half == pytest.approx(100 * 1.96 * math.sqrt(variance), rel=.12)  # the interaction adds a little


def test_bootstrap_is_repeatable_and_refuses_unlike_shapes():
    rng = np.random.RandomState(5)
    a, b = rng.rand(4, 50) < .6, rng.rand(4, 50) < .5
    assert cs.bootstrap_difference(a, b, draws=500) == cs.bootstrap_difference(a, b, draws=500)
    assert cs.bootstrap_difference(a, a, draws=500) == (0., 0., 0.)  # pairs stay pairs
    with pytest.raises(ValueError, match=r'a \(4, 50\), b \(3, 50\)'):
        cs.bootstrap_difference(a, b[:3])
