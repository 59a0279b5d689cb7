"""Event data sets by name."""
from typing import Optional

from .dataset import EventDataset
from .digits import EventDigits
from .folder import EventFolder
from .frames import FrameSettings
from .tonic_data import create_tonic_dataset

__all__ = ['create_event_dataset', 'is_event_dataset']

_SPLITS = {'train': True, 'training': True, 'validation': False, 'val': False, 'test': False}


def is_event_dataset(name: str) -> bool:
    """Whether a data set's name is one of event data."""
    return name.startswith(('events/', 'tonic/'))


def create_event_dataset(
        name: str,
        root: Optional[str] = None,
        split: str = 'validation',
        num_samples: Optional[int] = None,
        settings: FrameSettings = FrameSettings(),
        event_split: str = 'last100',
        download: bool = False,
) -> EventDataset:
    """Event data set by name, whose items are (frames (T, 2, H, W), target).

    Args:
        name: 'events/digits' (bundled), 'events/cifar10dvs' (or any folder of such recordings), or 'tonic/NAME'.
        root: Folder of the data.
        split: 'train' or 'validation'.
        num_samples: Only so many samples; None takes all.
        settings: How recordings become frames.
        event_split: How data without a split is parted, see `validation_mask`.
        download: Whether tonic may download.

    Raises:
        FileNotFoundError: The data is not there.
        ValueError: The data set or the split does not exist, or does not fit.
    """
    if split not in _SPLITS:
        raise ValueError(f"split '{split}': event data has 'train' and 'validation'.")
    if name == 'events/digits':
        return EventDigits(split, settings, num_samples)
    if name == 'events/cifar10dvs':
        return EventFolder(root, _SPLITS[split], event_split, settings, num_samples)
    if name.startswith('tonic/'):
        return create_tonic_dataset(
            name.removeprefix('tonic/'), root, _SPLITS[split], event_split, settings, num_samples, download)
    raise ValueError(f"unknown event data set '{name}'; there are events/digits, events/cifar10dvs and tonic/NAME.")
