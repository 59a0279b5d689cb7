"""Read event recordings from one folder per class, as in CIFAR10-DVS: AEDAT 2.0 or SpikingJelly's .npz."""
import logging
import os
from typing import Callable, Dict, List, Optional, Union

import numpy as np

from .aedat import AXES, DVS128_SIZE, read_aedat
from .dataset import EventDataset, spread_indices
from .derived import EXTENSIONS, FRAMES_FOLDER, check_whole, class_folders
from .frames import FrameSettings
from .npz import read_npz
from .recording import Events
from .splits import validation_mask

__all__ = ['EventFolder']

_logger = logging.getLogger(__name__)


class EventFolder(EventDataset):
    """Recordings of a DVS128 (128 x 128 pixels) in `root/CLASS/RECORDING`, .aedat or .npz.

    root may be a folder that SpikingJelly wrote. Its frames for these settings are then read if they exist, else its
    events. Classes are sorted by name, recordings by name with numbers by value (airplane_9 before airplane_10).

    Args:
        root: Folder with one sub-folder per class.
        training: Whether to take the training or the validation part.
        split: How to split the recordings; see `validation_mask`.
        settings: How to turn recordings into frames.
        num_samples: Number of recordings to take, evenly spaced; None takes all.
        transform: Applied to the frames.

    Raises:
        FileNotFoundError: root does not exist.
        ValueError: There are no recordings, a class is empty or has a recording twice, the folder is incomplete (see
            `check_whole`), or the split does not fit.
    """

    def __init__(
            self,
            root: str,
            training: bool = True,
            split: str = 'last100',
            settings: FrameSettings = FrameSettings(),
            num_samples: Optional[int] = None,
            transform: Optional[Callable] = None,
    ):
        self.root = _find_root(root, settings)
        recordings = class_folders(self.root)
        _refuse_twice(self.root, recordings)
        empty = [name for name, files in recordings.items() if not files]
        if empty:
            raise ValueError(f"'{self.root}': class {', '.join(empty)} holds no recordings "
                             f'({" or ".join(EXTENSIONS)}), which would shift the labels of the classes after it; '
                             f'fill or remove it.')
        files = [os.path.join(name, file) for name, members in recordings.items() for file in members]
        check_whole(self.root, recordings)
        _check_axes(settings.axes, files)
        targets = np.repeat(np.arange(len(recordings)), [len(members) for members in recordings.values()])
        part = np.flatnonzero(validation_mask(targets, split) != training)
        part = part[spread_indices(len(part), num_samples)]
        super().__init__(list(recordings), targets[part], DVS128_SIZE, settings, transform)
        self.files: List[str] = [files[i] for i in part]

    def read(self, index: int) -> Union[Events, np.ndarray]:
        file = self.filename(index, absolute=True)
        ordered = self.settings.by == 'time'
        if file.lower().endswith('.npz'):
            return read_npz(file, self.sensor_size, ordered)
        return read_aedat(file, self.settings.axes, ordered)

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        file = self.files[index]
        return os.path.basename(file) if basename else os.path.join(self.root, file) if absolute else file


def _find_root(root: str, settings: FrameSettings) -> str:
    """Return the folder with the class folders: root, or the one in SpikingJelly's layout that fits the settings."""
    if not root or not os.path.isdir(root):
        raise FileNotFoundError(f"data folder '{root}' does not exist; give --data-dir the folder that holds one "
                                f'sub-folder of recordings per class.')
    if any(class_folders(root).values()):
        made = FRAMES_FOLDER.fullmatch(os.path.basename(os.path.abspath(root)))
        if made and (int(made[1]), made[2]) != (settings.timesteps, settings.by):
            raise ValueError(f"'{root}' holds {made[1]} frames by {made[2]}, {settings.timesteps} by {settings.by} "
                             f'were asked for (--timesteps, --event-frames).')
        return root
    for name in (f'frames_number_{settings.timesteps}_split_by_{settings.by}', 'events_np', 'extract'):
        folder = os.path.join(root, name)
        if os.path.isdir(folder) and any(class_folders(folder).values()):
            _logger.info(f'Event data: reading {folder}.')
            return folder
    raise ValueError(f"data folder '{root}' holds no class folders with recordings ({' or '.join(EXTENSIONS)}), and "
                     f'is not a folder of SpikingJelly that does.')


def _refuse_twice(root: str, recordings: Dict[str, List[str]]) -> None:
    """Raise an error if a recording exists both as .aedat and as .npz, since it would count twice."""
    for name, files in recordings.items():
        stems = [os.path.splitext(f)[0] for f in files]
        twice = sorted({stem for stem in stems if stems.count(stem) > 1}) if len(set(stems)) < len(stems) else []
        if twice:
            raise ValueError(f"'{os.path.join(root, name)}' holds '{twice[0]}' twice, as .aedat and as .npz, which "
                             f'training and validation could share; keep one of them.')


def _check_axes(axes: str, files: List[str]) -> None:
    """Raise an error or warn if `axes` is set for .npz files, whose coordinates it does not change."""
    kinds = {os.path.splitext(f)[1].lower() for f in files}
    if axes != AXES[0] and kinds == set(EXTENSIONS):
        raise ValueError(f"axes='{axes}' (--event-axes): turns the .aedat files and not the .npz files that lie beside "
                         f'them; keep one kind.')
    if axes != AXES[0] and '.npz' in kinds:
        _logger.warning(f"axes='{axes}' (--event-axes) changes nothing: .npz files hold coordinates.")
