"""Statistics of a comparison of training runs: paired differences, intervals, power and equivalence.

Values are top-1 accuracies in percent, so differences are in points. Pairs share the seed. Functions are pure.
"""
import math
from typing import Dict, List, Mapping, NamedTuple, Optional, Sequence

import numpy as np
from scipy import stats

CONFIDENCE = .95
POWER = .8
MARGIN = .5  # points; a difference within it counts as none
_CHUNK = 2 ** 23  # image indices drawn at a time


class Interval(NamedTuple):
    """Estimate with its confidence interval."""
    mean: float
    low: float
    high: float

    @property
    def half(self) -> float:
        """Half the width."""
        return (self.high - self.low) / 2

    def excludes(self, value: float = 0.) -> bool:
        return not self.low <= value <= self.high

    def within(self, margin: float) -> bool:
        return -margin < self.low and self.high < margin


# ---- pairs

def paired_differences(a: Mapping[int, float], b: Mapping[int, float]) -> Dict[int, float]:
    """Return a - b by seed, over the seeds that both have."""
    return {seed: a[seed] - b[seed] for seed in sorted(a) if seed in b}


def t_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Optional[Interval]:
    """Return the mean with its t interval; None for fewer than two values."""
    n = len(values)
    if n < 2:
        return None
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(n)
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * error
    return Interval(mean, mean - half, mean + half)


def t_test(values: Sequence[float], mean: float = 0.) -> Optional[float]:
    """Return the two-sided p of a t test of the values' mean; None for fewer than two values. Equal values differ from
    `mean` with p = 0, or do not with p = 1.
    """
    n = len(values)
    if n < 2:
        return None
    difference, error = float(np.mean(values)) - mean, float(np.std(values, ddof=1)) / math.sqrt(n)
    if error == 0:
        return float(difference == 0)
    return float(2 * stats.t.sf(abs(difference) / error, n - 1))


def equivalence_test(values: Sequence[float], margin: float = MARGIN) -> Optional[float]:
    """Return the p of two one-sided t tests (TOST): small if the mean lies within +- margin.

    Returns:
        The larger of both p values; None for fewer than two values.
    """
    n = len(values)
    if n < 2:
        return None
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(n)
    if error == 0:
        return float(abs(mean) >= margin)
    return float(stats.t.sf((margin - abs(mean)) / error, n - 1))


def holm(p_values: Sequence[float]) -> List[float]:
    """Return p values adjusted by Holm (1979): the i-th smallest of m times m - i + 1, increasing, at most 1."""
    order, adjusted, largest = np.argsort(p_values, kind='stable'), [0.] * len(p_values), 0.
    for rank, i in enumerate(order):
        largest = max(largest, min(1., p_values[i] * (len(p_values) - rank)))
        adjusted[i] = largest
    return adjusted


# ---- spread and power

def sd_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Optional[Interval]:
    """Return the standard deviation with its chi-square interval, for normal values; None for fewer than two."""
    n = len(values)
    if n < 2:
        return None
    sd = float(np.std(values, ddof=1))
    low, high = (sd * math.sqrt((n - 1) / stats.chi2.ppf(q, n - 1))
                 for q in ((1 + confidence) / 2, (1 - confidence) / 2))
    return Interval(sd, low, high)


def power(pairs: int, sd: float, difference: float, alpha: float = 1 - CONFIDENCE) -> float:
    """Return the probability that a two-sided paired t test finds a true difference (noncentral distribution).

    Args:
        pairs: Number of pairs, 2 or more.
        sd: Standard deviation of the paired differences.
        difference: True mean difference.
        alpha: Level of the test.
    """
    if difference == 0:  # scipy's noncentral F has no tail there
        return alpha
    critical = stats.t.ppf(1 - alpha / 2, pairs - 1)
    # the square of a noncentral t is a noncentral F, whose tail is both of t's; scipy's t has NaN far out
    return float(stats.ncf.sf(critical ** 2, 1, pairs - 1, pairs * (difference / sd) ** 2))


def pairs_for_power(sd: float, difference: float, target: float = POWER, alpha: float = 1 - CONFIDENCE) -> int:
    """Return the smallest number of pairs that finds a true difference with this probability.

    Raises:
        ValueError: The difference is 0, or sd is not positive.
    """
    if difference == 0 or not sd > 0:
        raise ValueError(f'difference={difference}, sd={sd}: no number of pairs finds a difference of 0, and the '
                         f'standard deviation must be positive.')
    low, high = 1, 2
    while power(high, sd, difference, alpha) < target:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle, sd, difference, alpha) >= target else (middle, high)
    return high


def detectable_difference(
        pairs: int, sd: float, target: float = POWER, alpha: float = 1 - CONFIDENCE) -> Optional[float]:
    """Return the smallest true difference that so many pairs find with this probability; None for fewer than two."""
    if pairs < 2:
        return None
    low, high = 0., sd
    while power(pairs, sd, high, alpha) < target and high > 0:
        low, high = high, 2 * high
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if power(pairs, sd, middle, alpha) >= target else (middle, high)
    return high


# ---- seeds and images

def bootstrap_difference(
        a: np.ndarray,
        b: np.ndarray,
        draws: int = 10_000,
        seed: int = 0,
        confidence: float = CONFIDENCE,
) -> Interval:
    """Return the difference of accuracies in points, with a percentile interval over resampled seeds and images.

    Every draw takes as many seeds and as many images as there are, with replacement. The pairs stay pairs: a seed's and
    an image's results of both arms are drawn together. With few seeds the interval is too narrow, by about
    sqrt((n - 1) / n).

    Args:
        a: Whether an arm is right, (seeds, images), 0 and 1.
        b: The same of another arm, with the same seeds and images.
        draws: Number of draws.
        seed: Seed of the draws.
        confidence: Of the interval.

    Raises:
        ValueError: The shapes differ, or an axis is empty.
    """
    if a.shape != b.shape or a.ndim != 2 or 0 in a.shape:
        raise ValueError(f'a {a.shape}, b {b.shape}: must both be (seeds, images), with one of each at least.')
    differences = a.astype(np.float32) - b.astype(np.float32)
    seeds, images = differences.shape
    rng, means = np.random.default_rng(seed), []
    chunk = max(1, _CHUNK // images)
    for begin in range(0, draws, chunk):
        n = min(chunk, draws - begin)
        counts = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=n).astype(np.float32)
        by_image = counts @ differences / seeds
        drawn = rng.integers(0, images, size=(n, images), dtype=np.int32)
        means.append(np.take_along_axis(by_image, drawn, 1).mean(1, dtype=np.float64))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return Interval(100 * float(differences.mean(dtype=np.float64)), 100 * float(low), 100 * float(high))
