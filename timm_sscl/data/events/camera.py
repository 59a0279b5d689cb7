"""Simulate an event camera that looks at a moving picture."""
from typing import Tuple, Union

import numpy as np

from .recording import Events

__all__ = ['simulate_events']


def simulate_events(
        intensity: np.ndarray,
        times: np.ndarray,
        threshold: Union[float, np.ndarray] = 0.3,
        offset: float = 0.1,
) -> Events:
    """Simulate an ideal dynamic vision sensor (Lichtsteiner et al. 2008, sampled as in ESIM, Rebecq et al. 2018).

    Each pixel holds a reference, at first its log intensity. Whenever the log intensity has moved by the threshold, the
    pixel emits an event, of polarity 1 for up and 0 for down, and the reference moves by the threshold. Between two
    pictures the log intensity is interpolated linearly, which gives the time of each event.

    Args:
        intensity: Pictures (N, H, W), 0 or more.
        times: Times of the pictures (N,) in microseconds, increasing.
        threshold: Change of log intensity per event, positive; one value, or one per pixel (H, W).
        offset: Dark current of the sensor, added to the intensity before the logarithm, positive.

    Returns:
        Events with int64 arrays, ordered by time; events of the same microsecond by row and column.

    Raises:
        ValueError: A value is out of range, or the numbers of times and pictures differ.
    """
    intensity, times = np.asarray(intensity, np.float64), np.asarray(times, np.float64)
    if intensity.ndim != 3 or times.shape != intensity.shape[:1] or (np.diff(times) <= 0).any():
        raise ValueError(f'intensity of shape {intensity.shape} and times of shape {times.shape}: must be pictures '
                         f'(N, H, W) and as many increasing times.')
    if not (np.asarray(threshold) > 0).all() or not offset > 0 or not (intensity >= 0).all():
        raise ValueError('threshold and offset must be positive, intensity 0 or more.')
    levels = np.log(intensity + offset).reshape(len(times), -1)
    threshold = np.broadcast_to(threshold, intensity.shape[1:]).reshape(-1)
    reference, parts = levels[0].copy(), []
    for i in range(1, len(times)):
        change = (levels[i] - reference) / threshold
        pixels = np.flatnonzero(np.abs(change) >= 1)
        if len(pixels):
            parts.append(_crossings(pixels, change, levels[i - 1:i + 1], reference, threshold, times[i - 1:i + 1]))
    t, pixel, p = np.concatenate(parts, axis=1) if parts else np.zeros((3, 0), np.int64)
    order = np.lexsort((pixel, t))
    y, x = np.divmod(pixel[order], intensity.shape[2])
    return Events(t[order], x, y, p[order])


def _crossings(
        pixels: np.ndarray,
        change: np.ndarray,
        levels: np.ndarray,
        reference: np.ndarray,
        threshold: np.ndarray,
        times: np.ndarray,
) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return time, pixel and polarity of the events between two pictures, and update the reference."""
    count, sign = np.abs(change[pixels]).astype(np.int64), np.sign(change[pixels])
    pixel, step = np.repeat(pixels, count), np.repeat(sign * threshold[pixels], count)
    nth = np.arange(len(pixel)) - np.repeat(np.cumsum(count) - count, count) + 1
    before, after = levels[:, pixel]
    # 0 where the level does not change: rounding delayed a crossing of the previous interval
    part = np.zeros(len(pixel))
    np.divide(reference[pixel] + nth * step - before, after - before, out=part, where=after != before)
    reference[pixels] += sign * threshold[pixels] * count
    t = np.floor(times[0] + part.clip(0, 1) * (times[1] - times[0])).astype(np.int64)
    return t, pixel, (step > 0).astype(np.int64)
