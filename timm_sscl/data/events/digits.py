"""Event recordings without a download: the bundled digits, moved in front of a simulated event camera."""
from typing import Callable, Dict, Optional, Sequence, Tuple, Union

import numpy as np

from timm_sscl.data.digits import digits_split

from .camera import simulate_events
from .dataset import EventDataset
from .frames import FrameSettings
from .recording import Events

__all__ = ['EventDigits', 'record_digit']

_SIZE = 32  # side of the sensor in pixels
_SCALE = 2.75  # sensor pixels per scan pixel; a digit has 22 sensor pixels
_RADIUS = 4.  # of the path in pixels; the digit stays inside the sensor
_PICTURES = 41  # number of pictures on the closed path, the first repeated at the end; 0.57 pixels apart
_DURATION = 100_000  # of a recording in microseconds
_MISMATCH = 0.03  # relative standard deviation of the pixels' thresholds


def record_digit(scan: np.ndarray, seed: Union[int, Sequence[int]], threshold: float = 0.3) -> Events:
    """Record one digit that moves once around a square standing on a corner, in 100 ms.

    The sides of the square are the directions of movement in CIFAR10-DVS. The starting point, the direction and the
    pixels' thresholds (3 % deviation, as in real sensors) are drawn from the seed.

    Args:
        scan: Grey levels of the digit, (8, 8), 0 to 16.
        seed: Seed of this recording, one number or several.
        threshold: Change of log intensity per event.

    Returns:
        Events on a sensor of 32 x 32 pixels.
    """
    generator = np.random.default_rng(seed)
    turn = generator.choice((-1, 1)) * np.linspace(0, 1, _PICTURES) + generator.random()
    # on this square both coordinates are triangle waves, a quarter of a period apart
    dx, dy = (_RADIUS * (4 * np.abs((turn + shift) % 1 - 0.5) - 1) for shift in (0, 0.25))
    thresholds = threshold * np.exp(_MISMATCH * generator.standard_normal((_SIZE, _SIZE)))
    pictures = _interpolation(dy) @ (scan / 16.) @ _interpolation(dx).swapaxes(1, 2)
    return simulate_events(pictures, np.linspace(0, _DURATION, _PICTURES), thresholds)


def _interpolation(shift: np.ndarray) -> np.ndarray:
    """Return weights (N, 32, 8) that enlarge a row of 8 pixels linearly, centred, then shifted, with black around it.
    """
    sensor = np.arange(_SIZE) + 0.5 - _SIZE / 2
    scan = np.arange(8) + 0.5 - 4
    distance = (sensor - shift[:, None])[:, :, None] / _SCALE - scan
    return np.maximum(1 - np.abs(distance), 0)


class EventDigits(EventDataset):
    """The 1,797 digits of `DigitsDataset` in the same split, each recorded once by `record_digit`.

    A recording depends only on (seed, index of the digit in scikit-learn's data). It is computed on first use, and its
    frames are cached (20 kB each at T = 10).

    Args:
        split: 'train' or 'validation'.
        settings: How to turn recordings into frames.
        num_samples: Number of recordings to take; None takes all.
        seed: Seed of the data set.
        transform: Applied to the frames.

    Raises:
        ValueError: The split does not exist.
    """

    def __init__(
            self,
            split: str = 'train',
            settings: FrameSettings = FrameSettings(),
            num_samples: Optional[int] = None,
            seed: int = 0,
            transform: Optional[Callable] = None,
    ):
        digits, numbers = digits_split(split, num_samples)
        super().__init__(
            [str(name) for name in digits.target_names], digits.target[numbers], (_SIZE, _SIZE), settings, transform)
        self.scans = digits.images[numbers]
        self.numbers = numbers
        self.seed = seed
        self._frames: Dict[Tuple[int, FrameSettings], np.ndarray] = {}

    def read(self, index: int) -> Events:
        return record_digit(self.scans[index], (self.seed, int(self.numbers[index])))

    def frames(self, index: int) -> np.ndarray:
        key = index % len(self), self.settings  # the user may replace the settings
        if key not in self._frames:
            frames = super().frames(index)
            self._frames[key] = frames.astype(np.uint8 if frames.max() < 256 else np.int64)
        return self._frames[key].copy()

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return f'digit {self.numbers[index]}'
