"""Mean and 95 % interval over independent runs."""
import math
from dataclasses import dataclass
from typing import Optional, Sequence

from scipy import stats

__all__ = ['Interval', 'interval', 'interval_text']


@dataclass
class Interval:
    """Mean over runs and half the width of its 95 % interval (t distribution); None for a single run."""
    mean: float
    half: Optional[float]
    count: int


def interval(values: Sequence[float]) -> Interval:
    """Return mean and 95 % interval of values of independent runs.

    Raises:
        ValueError: There are no values.
    """
    n = len(values)
    if not n:
        raise ValueError('values: there are none.')
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, None, 1)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    return Interval(mean, float(stats.t.ppf(.975, n - 1)) * deviation / math.sqrt(n), n)


def interval_text(values: Sequence[Optional[float]], digits: int = 2) -> str:
    """Return 'mean ± half width' of the values that are there; '-' for none."""
    known = [value for value in values if value is not None]
    if not known:
        return '-'
    found = interval(known)
    return f'{found.mean:.{digits}f}' + ('' if found.half is None else f' ± {found.half:.{digits}f}')
