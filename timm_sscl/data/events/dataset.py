"""EventDataset: base class that turns recordings into frames, augments them and adds the label."""
import logging
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from torch.utils.data import Dataset

from .frames import FrameSettings, resize_frames, to_frames
from .recording import DamagedEventFile, Events

__all__ = ['EventDataset', 'spread_indices']

_logger = logging.getLogger(__name__)


class EventDataset(Dataset):
    """Base class of event data sets. A subclass implements `read`.

    An item is (frames, label): float32 frames (T, 2, H, W) and the class.

    Args:
        classes: Class names in the order of the labels.
        targets: Label of every recording.
        sensor_size: (height, width) of the sensor in pixels.
        settings: How to turn recordings into frames.
        transform: Applied to the frames.
    """

    def __init__(
            self,
            classes: Sequence[str],
            targets: Sequence[int],
            sensor_size: Tuple[int, int],
            settings: FrameSettings,
            transform: Optional[Callable] = None,
    ):
        self.classes = list(classes)
        self.class_to_idx: Dict[str, int] = {name: i for i, name in enumerate(self.classes)}
        self.targets: List[int] = [int(t) for t in targets]
        self.sensor_size: Tuple[int, int] = (int(sensor_size[0]), int(sensor_size[1]))
        self.settings = settings
        self.transform = transform
        self._gap_is_said = False

    @property
    def frame_size(self) -> Tuple[int, int]:
        """(height, width) of the frames in pixels."""
        size = self.settings.size
        return self.sensor_size if size is None else (size, size)

    def read(self, index: int) -> Union[Events, np.ndarray]:
        """Return the recording at index: its events, or precomputed frames (T, 2, H, W) of counts.

        Raises:
            DamagedEventFile: The recording cannot be read.
        """
        raise NotImplementedError

    def extent(self, events: Events) -> Tuple[int, int]:
        """Return (height, width) in pixels of the sensor that recorded these events."""
        return self.sensor_size

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """Return a name of the recording at index for messages. The signature is timm's."""
        return f'number {index}'

    def frames(self, index: int) -> np.ndarray:
        """Return the frames (T, 2, H, W) of the recording at index.

        Raises:
            DamagedEventFile: The recording cannot be read, has no events, or has frames of another shape.
        """
        recording = self.read(index)
        name = self.filename(index, absolute=True)
        if isinstance(recording, Events):
            if not len(recording.t):
                raise DamagedEventFile(f"'{name}' holds no events.")
            try:
                frames = to_frames(recording, self.settings, self.extent(recording))
            except ValueError as error:
                raise DamagedEventFile(f"'{name}': {error}.") from error
            self._say_gap(name, frames, len(recording.t))
            return frames
        expected = (self.settings.timesteps, 2, *self.sensor_size)
        if recording.shape != expected:
            raise DamagedEventFile(f"'{name}' holds frames of shape {recording.shape}, expected (T, 2, H, W) = "
                                   f'{expected}.')
        if not recording.any():
            raise DamagedEventFile(f"'{name}' holds no events.")
        if recording.dtype == bool and self.settings.mode == 'count':
            raise DamagedEventFile(f"'{name}' holds frames of bool, which do not say how many events there were; "
                                   f'--event-mode binary takes them.')
        return resize_frames(recording, self.settings.size, self.settings.mode)

    def _say_gap(self, name: str, frames: np.ndarray, events: int) -> None:
        """Warn once if nearly all frames of equal duration are empty, which a single wrong time at the end causes."""
        if self._gap_is_said or self.settings.by != 'time' or len(frames) < 3 or events < 10 * len(frames):
            return
        filled = int(frames.any((1, 2, 3)).sum())
        if filled <= 2:
            self._gap_is_said = True
            _logger.warning(f"'{name}': its events lie in {filled} of {len(frames)} frames of equal time, the others "
                            f'are empty. Are its times right? --event-frames number does not depend on them.')

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        frames = torch.from_numpy(self.frames(index).astype(np.float32))
        return (frames if self.transform is None else self.transform(frames)), self.targets[index]

    def __len__(self) -> int:
        return len(self.targets)


def spread_indices(n: int, num_samples: Optional[int]) -> np.ndarray:
    """Return evenly spaced indices of num_samples out of n recordings, which are ordered by class; None takes all."""
    if num_samples is None or num_samples >= n:
        return np.arange(n)
    return np.arange(num_samples) * n // num_samples
