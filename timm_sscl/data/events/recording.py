"""One recording of an event camera, and the error of a file that does not hold one."""
from typing import NamedTuple, Optional, Tuple

import numpy as np

__all__ = ['Events', 'DamagedEventFile', 'find_invalid']


class Events(NamedTuple):
    """The events of a recording in the order in which they were emitted, one array (N,) of whole numbers each."""
    t: np.ndarray  # microseconds
    x: np.ndarray  # column, from the left
    y: np.ndarray  # row, from the top
    p: np.ndarray  # polarity, 0 or 1


class DamagedEventFile(OSError):
    """A file that holds no readable recording; the message names the file and what is wrong, where."""


def find_invalid(events: Events, sensor_size: Tuple[int, int], ordered: bool = False) -> Optional[Tuple[int, str]]:
    """The first event that cannot be: outside the sensor, of no polarity, or, with `ordered`, before its predecessor.

    Args:
        events: Recording.
        sensor_size: (height, width) in pixels.
        ordered: Whether time may not run backwards.

    Returns:
        Index of the event and what is wrong with it; None where all are possible.
    """
    height, width = sensor_size
    t, x, y, p = events
    wrong = (x < 0) | (x >= width) | (y < 0) | (y >= height) | ((p != 0) & (p != 1))
    if ordered:
        wrong[1:] |= t[1:] < t[:-1]
    if not wrong.any():
        return None
    i = int(wrong.argmax())
    if not (0 <= x[i] < width and 0 <= y[i] < height):
        return i, f'x={x[i]}, y={y[i]} is outside the sensor of {width} x {height} pixels'
    if p[i] not in (0, 1):
        return i, f'polarity {p[i]} is neither 0 nor 1'
    return i, f'time runs backwards, from {t[i - 1]} to {t[i]} us'
