"""Turn events into frames: assign events to frames, compute pixel values, resize."""
from dataclasses import dataclass
from typing import Optional, Tuple

import numpy as np

from .aedat import AXES
from .recording import Events, read_events

__all__ = ['FrameSettings', 'to_frames', 'count_events', 'resize_frames', 'BY', 'MODES']

BY = 'number', 'time'
MODES = 'binary', 'count'


@dataclass(frozen=True)
class FrameSettings:
    """How to turn a recording into T frames.

    Args:
        timesteps: Number of frames T.
        by: 'number' puts N // T events into each frame and the rest into the last (SpikingJelly's convention). 'time'
            cuts the recording into T intervals of equal duration; an interval without events gives an empty frame.
        mode: 'binary' is 1 for a pixel with any event, as in the paper; 'count' is its number of events.
        size: Height and width of the frames in pixels; None keeps the sensor's.
        axes: Convention of AEDAT 2.0 addresses, see `read_aedat`; .npz files hold coordinates.

    Raises:
        ValueError: A setting is out of range.
    """
    timesteps: int = 10
    by: str = 'number'
    mode: str = 'binary'
    size: Optional[int] = None
    axes: str = 'spikingjelly'

    def __post_init__(self):
        if self.timesteps < 1:
            raise ValueError(f'timesteps={self.timesteps}: must be 1 or more.')
        if self.size is not None and self.size < 1:
            raise ValueError(f'size={self.size}: must be 1 pixel or more.')
        for name, known in (('by', BY), ('mode', MODES), ('axes', AXES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}='{getattr(self, name)}': must be one of {', '.join(known)}.")


def to_frames(events: Events, settings: FrameSettings, sensor_size: Tuple[int, int]) -> np.ndarray:
    """Turn a recording into frames.

    Args:
        events: Events inside the sensor, in order of time. Arrays of other types are converted as in `read_events`.
        settings: How to make frames.
        sensor_size: (height, width) in pixels.

    Returns:
        int64 array (T, 2, H, W), polarity 0 first; zeros for a recording without events.

    Raises:
        ValueError: An event is invalid, or the events are not in order of time.
    """
    events = read_events(events._asdict(), sensor_size, ordered=settings.by == 'time')
    if settings.by == 'number':
        _check_order(events.t, settings.timesteps)
    index = _frame_by_number if settings.by == 'number' else _frame_by_time
    frames = count_events(events, index(events, settings.timesteps), settings.timesteps, sensor_size)
    return resize_frames(frames, settings.size, settings.mode)


def _check_order(t: np.ndarray, timesteps: int) -> None:
    """Raise an error if sorting by time would move more than 1 % of the events to another frame.

    Cameras put a few events in the wrong order. In files sorted by pixel or polarity nearly all are.
    """
    backwards = t[1:] < t[:-1]
    if not backwards.any():
        return
    order = np.argsort(t, kind='stable')
    frame = _frame_by_number(Events(t, t, t, t), timesteps)
    moved = int((frame != frame[order]).sum())
    if moved * 100 > len(t):
        i = int(backwards.argmax()) + 1
        raise ValueError(f'event {i}: time runs backwards, from {t[i - 1]} to {t[i]} us, and {moved} of {len(t)} '
                         f'events would lie in other frames if they were sorted by time: sort them')


def _frame_by_number(events: Events, timesteps: int) -> np.ndarray:
    n = len(events.t)
    return np.minimum(np.arange(n) // max(n // timesteps, 1), timesteps - 1) if n >= timesteps else \
        np.full(n, timesteps - 1)


def _frame_by_time(events: Events, timesteps: int) -> np.ndarray:
    since = events.t - events.t[:1]
    duration = max(int(since[-1]) // timesteps, 1) if len(since) else 1
    return np.minimum(since // duration, timesteps - 1)


def count_events(events: Events, frame: np.ndarray, timesteps: int, sensor_size: Tuple[int, int]) -> np.ndarray:
    """Count events per frame, polarity and pixel, (T, 2, H, W). frame (N,) holds the frame index of every event."""
    height, width = sensor_size
    place = ((frame * 2 + events.p) * height + events.y) * width + events.x
    return np.bincount(place, minlength=timesteps * 2 * height * width).reshape(timesteps, 2, height, width)


def resize_frames(frames: np.ndarray, size: Optional[int], mode: str) -> np.ndarray:
    """Resize frames of event counts; values stay whole numbers.

    'binary' takes the nearest pixel (for 128 to 48 pixels, every second or third one), which keeps the share of ones; a
    maximum over cells would saturate. 'count' sums the cell of pixels that becomes one pixel, which keeps the number of
    events; frames are enlarged by repeating pixels.

    Args:
        frames: (T, 2, H, W).
        size: New height and width; None keeps them.
        mode: 'binary' or 'count'.

    Returns:
        (T, 2, size, size); 0 and 1 if mode is 'binary'.
    """
    if mode == 'binary':
        frames = (frames > 0).astype(frames.dtype)
    for axis in (2, 3):
        n = frames.shape[axis]
        if size is None or size == n:
            continue
        if mode == 'count' and size < n:
            frames = np.add.reduceat(frames, -(-np.arange(size) * n // size), axis)  # pixel i is added to i * size // n
        else:
            frames = frames.take((2 * np.arange(size) + 1) * n // (2 * size), axis)
    return frames
