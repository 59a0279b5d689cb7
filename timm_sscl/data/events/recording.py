"""Events of one recording of an event camera, their checks, and the error for a damaged file."""
from typing import Any, Mapping, NamedTuple, Optional, Tuple

import numpy as np

__all__ = ['Events', 'DamagedEventFile', 'find_invalid', 'read_events', 'unwrap_times']

_MICROSECONDS = 1_000_000  # per second
_LARGEST = 2 ** 63 - 1024  # largest float64 below the end of int64


class Events(NamedTuple):
    """Events of a recording in the order in which they were emitted, as arrays (N,) of whole numbers.

    `read_events` converts arrays of other types.
    """
    t: np.ndarray  # microseconds
    x: np.ndarray  # column, from the left
    y: np.ndarray  # row, from the top
    p: np.ndarray  # polarity, 0 or 1


class DamagedEventFile(OSError):
    """A file holds no readable recording. The message names the file and the position and kind of the problem."""


def find_invalid(events: Events, sensor_size: Tuple[int, int], ordered: bool = False) -> Optional[Tuple[int, str]]:
    """Find the first event that is outside the sensor, has an invalid polarity or, with `ordered`, precedes its
    predecessor.

    Args:
        events: Recording.
        sensor_size: (height, width) in pixels.
        ordered: Whether time may not run backwards.

    Returns:
        (index, problem) of the event; None if all are valid.
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


def read_events(arrays: Mapping[str, Any], sensor_size: Tuple[int, int], ordered: bool = False) -> Events:
    """Convert arrays as found in files and data sets to Events. Values that int64 cannot represent are refused.

    Times that are whole numbers, of any dtype, are microseconds; others are seconds. Frames depend only on their
    proportions. Times of 32 bits are continued after a wrap-around of the counter. Polarities are 0 and 1, False and
    True, or -1 and 1.

    Args:
        arrays: t, x, y and p.
        sensor_size: (height, width) in pixels.
        ordered: Whether time may not run backwards.

    Returns:
        Events with int64 arrays.

    Raises:
        ValueError: An array or an event is invalid. The message names it.
    """
    arrays = {name: np.asarray(arrays[name]) for name in Events._fields}
    for name, array in arrays.items():
        if array.ndim != 1 or array.dtype.kind not in 'iubf' or array.shape != arrays['t'].shape:
            raise ValueError(f'{name} is {array.dtype} of shape {array.shape}; t, x, y and p must be numbers, one per '
                             f'event')
    for name, pixels in (('x', sensor_size[1]), ('y', sensor_size[0])):
        kind = arrays[name].dtype
        if kind.kind in 'iu' and np.iinfo(kind).max < pixels - 1:
            raise ValueError(f'{name} is {kind}, which cannot hold the {pixels} pixels of the sensor')
    events = Events(_times(arrays['t'], ordered), *(_whole(name, arrays[name]) for name in 'xyp'))
    if len(events.t) and int(events.t.max()) - int(events.t.min()) > _LARGEST:
        raise ValueError(f't goes from {events.t.min()} to {events.t.max()} us, further than 64 bits')
    events = events._replace(p=_polarity(events.p))
    wrong = find_invalid(events, sensor_size, ordered)
    if wrong is not None:
        raise ValueError(f'event {wrong[0]}: {wrong[1]}')
    return events


def unwrap_times(t: np.ndarray) -> np.ndarray:
    """Convert times of a 32 bit counter to int64, continued after each wrap-around."""
    t = t.astype(np.int64)
    wraps = np.diff(t, prepend=t[:1]) < -2 ** 31
    return t + (np.cumsum(wraps) << 32)


def _whole(name: str, array: np.ndarray) -> np.ndarray:
    """Convert whole numbers of any dtype to int64.

    Raises:
        ValueError: A value is not a whole number or does not fit.
    """
    if array.dtype.kind == 'f':
        wrong = ~np.isfinite(array) | (array != np.floor(array)) | (np.abs(array) > _LARGEST)
    else:
        wrong = array > np.iinfo(np.int64).max if array.dtype == np.uint64 else np.zeros(0, bool)
    if wrong.any():
        i = int(wrong.argmax())
        raise ValueError(f'event {i}: {name} is {array.dtype} and holds {array[i]}, which is no whole number of 64 '
                         f'bits')
    return array.astype(np.int64)


def _times(t: np.ndarray, ordered: bool) -> np.ndarray:
    """Convert times to microseconds as int64.

    Raises:
        ValueError: A time is not finite, or the dtype is too coarse to order the events.
    """
    if t.dtype.kind != 'f':
        return unwrap_times(t) if t.dtype.itemsize == 4 else _whole('t', t)
    if not np.isfinite(t).all():
        i = int((~np.isfinite(t)).argmax())
        raise ValueError(f'event {i}: t is {t[i]}')
    if ordered and len(t) > 1:
        step, span = np.spacing(np.abs(t).max()), float(t.max()) - float(t.min())
        if step > 1e-6 and step * 1000 > span:
            raise ValueError(f't is {t.dtype}, whose numbers near {t.max()} are {step:g} apart: too coarse for times '
                             f'that span {span:g}')
    if (t == np.floor(t)).all():
        return _whole('t', t)
    return _whole('t', np.round(t.astype(np.float64) * _MICROSECONDS))


def _polarity(p: np.ndarray) -> np.ndarray:
    """Convert polarities -1 and 1 to 0 and 1; return others unchanged."""
    return (p + 1) // 2 if len(p) and np.isin(p, (-1, 1)).all() else p
