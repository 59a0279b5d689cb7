"""Wrap the event data sets of tonic, the optional extra `events`."""
import inspect
import os
import struct
from typing import Any, Callable, Dict, Optional, Tuple

import numpy as np

from .dataset import EventDataset, spread_indices
from .frames import FrameSettings
from .recording import DamagedEventFile, Events, read_events
from .splits import validation_mask

__all__ = ['TonicDataset', 'create_tonic_dataset']


class TonicDataset(EventDataset):
    """Wrap a data set with tonic's interface: items (events, target), events with the fields t, x, y and p.

    Args:
        dataset: tonic data set without a transform, or any data set with `targets` and such items.
        settings: How to turn recordings into frames.
        indices: Recordings to use; None takes all.
        sensor_size: (width, height, polarities) as in tonic; None takes the data set's. If that is None, too
            (N-Caltech101), the frame size must be set, and a recording's extent serves as its sensor.
        transform: Applied to the frames.

    Raises:
        ValueError: There are no labels, or the sensor does not have two polarities on a plane.
    """

    def __init__(
            self,
            dataset: Any,
            settings: FrameSettings = FrameSettings(),
            indices: Optional[np.ndarray] = None,
            sensor_size: Optional[Tuple[int, int, int]] = None,
            transform: Optional[Callable] = None,
    ):
        name = type(dataset).__name__
        targets: Any = getattr(dataset, 'targets', None)
        labelled = targets is not None and all(isinstance(t, (int, str, np.integer)) for t in targets)
        if not labelled or len(targets) != len(dataset):
            raise ValueError(f"tonic's {name} has no list of labels (targets), one per recording: it is no data set "
                             f'for classification.')
        size = sensor_size or getattr(dataset, 'sensor_size', None)
        if size is not None and (len(size) != 3 or size[1] == 1 or size[2] != 2):
            raise ValueError(f"tonic's {name} has a sensor of {tuple(size)} (width, height, polarities): only cameras "
                             f'with two polarities become frames.')
        if size is None and settings.size is None:
            raise ValueError(f"tonic's {name} has recordings of different sizes; set the size of the frames "
                             f'(--event-size).')
        classes = _classes(dataset)
        numbers = {label: i for i, label in enumerate(classes)}
        self.dataset = dataset
        self.indices = np.arange(len(dataset)) if indices is None else np.asarray(indices)
        self.fixed_size = size is not None
        labels = [targets[i] for i in self.indices]
        unknown = sorted({t for t in labels if isinstance(t, str)} - set(numbers))
        if unknown:
            raise ValueError(f"tonic's {name} has the label '{unknown[0]}', which is none of its classes.")
        self._numbers = numbers
        super().__init__(
            classes, [numbers[t] if isinstance(t, str) else int(t) for t in labels],
            (size[1], size[0]) if size is not None else (settings.size or 0,) * 2, settings, transform)

    def read(self, index: int) -> Events:
        name = self.filename(index)
        try:
            raw, target = self.dataset[int(self.indices[index])][:2]
        except (ValueError, IndexError, KeyError, struct.error) as error:  # tonic's readers do not check their files
            raise DamagedEventFile(f"'{name}' cannot be read by tonic: {error}") from error
        label = self._numbers.get(target, target) if isinstance(target, str) else target
        if isinstance(label, (int, np.integer)) and int(label) != self.targets[index]:
            raise ValueError(f"'{name}' has the label {target} itself, and {self.targets[index]} in the list of labels "
                             f'(targets).')
        try:
            arrays = {field: np.asarray(raw[field]) for field in Events._fields}
        except (ValueError, IndexError, KeyError, TypeError) as error:
            fields = getattr(getattr(raw, 'dtype', None), 'names', None) or type(raw).__name__
            raise ValueError(f"'{name}' has events of {fields}; they must have the fields t, x, y and p.") from error
        try:
            return read_events(arrays, self._plane(arrays), ordered=self.settings.by == 'time')
        except ValueError as error:
            raise DamagedEventFile(f"'{name}': {error}.") from error

    def _plane(self, arrays: Dict[str, np.ndarray]) -> Tuple[int, int]:
        """Return (height, width) of the sensor, or of the recording's extent if the sensor is unknown."""
        if self.fixed_size or not all(a.size and np.isfinite(a).all() for a in (arrays['y'], arrays['x'])):
            return self.sensor_size
        return int(arrays['y'].max()) + 1, int(arrays['x'].max()) + 1

    def extent(self, events: Events) -> Tuple[int, int]:
        if self.fixed_size or not len(events.t):
            return self.sensor_size
        return self._plane(events._asdict())

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        data = getattr(self.dataset, 'data', None)
        at = int(self.indices[index])
        if isinstance(data, list) and at < len(data) and isinstance(data[at], str):
            return os.path.basename(data[at]) if basename else data[at]
        return f'number {at} of {type(self.dataset).__name__}'


def _classes(dataset: Any) -> list:
    """Return the class names in the order of their labels."""
    classes = getattr(dataset, 'classes', None)
    if isinstance(classes, dict):
        if sorted(classes.values()) != list(range(len(classes))):
            raise ValueError(f"tonic's {type(dataset).__name__} numbers its classes {sorted(classes.values())}; must "
                             f'be 0, 1, ...')
        return sorted(classes, key=lambda name: classes[name])
    if isinstance(dataset.targets[0], str) and not set(dataset.targets) <= set(classes or ()):
        return sorted(set(dataset.targets))
    return list(classes) if classes else [str(i) for i in range(max(dataset.targets) + 1)]


def create_tonic_dataset(
        name: str,
        root: str,
        training: bool,
        split: str,
        settings: FrameSettings,
        num_samples: Optional[int] = None,
        download: bool = False,
) -> TonicDataset:
    """Create a data set of tonic by the name of its class: NMNIST, DVSGesture, CIFAR10DVS (its AEDAT4 version), ...

    Args:
        name: Class in tonic.datasets.
        root: Folder in which tonic stores data, in a sub-folder of that name.
        training: Whether to take the training part.
        split: How to split a data set that tonic does not split; see `validation_mask`.
        settings: How to turn recordings into frames.
        num_samples: Number of recordings to take, evenly spaced; None takes all.
        download: Whether tonic may download missing data.

    Raises:
        FileNotFoundError: The data does not exist and may not be downloaded.
        ValueError: tonic is not installed, has no such data set, or the data set has no labels or two polarities.
    """
    try:
        import tonic
    except ImportError as error:
        raise ValueError(f"data set 'tonic/{name}' needs tonic: pip install 'timm_sscl[events]'.") from error
    cls = getattr(tonic.datasets, name, None)
    if not inspect.isclass(cls):
        known = [n for n in dir(tonic.datasets) if inspect.isclass(getattr(tonic.datasets, n))]
        raise ValueError(f"tonic has no data set '{name}'; it has {', '.join(known)}.")
    options = inspect.signature(cls).parameters
    if 'save_to' not in options or not root:
        raise FileNotFoundError(f"data set 'tonic/{name}': give --data-dir the folder that holds {name}/.")
    if not download:
        cls = type(cls.__name__, (cls,), {'download': _refuse_download, '__module__': cls.__module__})
    if 'train' in options:
        dataset = cls(save_to=root, train=training)
        part = np.arange(len(dataset))
    else:
        dataset = cls(save_to=root)
        part = np.flatnonzero(validation_mask(dataset.targets, split) != training)
    return TonicDataset(dataset, settings, part[spread_indices(len(part), num_samples)])


def _refuse_download(dataset: Any) -> None:
    raise FileNotFoundError(f"'{dataset.location_on_system}' does not hold tonic's {type(dataset).__name__}; "
                            f'--dataset-download lets tonic fetch it.')
