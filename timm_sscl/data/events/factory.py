"""Create event data sets by name."""
from typing import Any, Optional

from timm_sscl.data.registry import build_dataset, is_event_dataset, register_dataset

from .dataset import EventDataset
from .digits import EventDigits
from .folder import EventFolder
from .frames import FrameSettings
from .tonic_data import create_tonic_dataset

__all__ = ['create_event_dataset', 'is_event_dataset']


def create_event_dataset(
        name: str,
        root: Optional[str] = None,
        split: str = 'validation',
        num_samples: Optional[int] = None,
        settings: FrameSettings = FrameSettings(),
        event_split: str = 'last100',
        download: bool = False,
        **options: Any,
) -> EventDataset:
    """Create an event data set by name. Its items are (frames (T, 2, H, W), label).

    Args:
        name: 'events/digits' (bundled), 'events/cifar10dvs' (any folder of such recordings), 'tonic/NAME', or a name
            registered by `register_dataset`.
        root: Folder of the data.
        split: 'train' or 'validation'.
        num_samples: Number of samples to take; None takes all.
        settings: How to turn recordings into frames.
        event_split: How to split data that has no split of its own; see `validation_mask`.
        download: Whether tonic may download.
        options: Options of the data set itself.

    Raises:
        FileNotFoundError: The data does not exist.
        ValueError: The data set, the split or an option is unknown or not valid for the data.
    """
    if not is_event_dataset(name):
        raise ValueError(f"data set '{name}': event data has names that begin with events/ or tonic/.")
    dataset: Any = build_dataset(name, dict(
        name=name, root=root, split=split, num_samples=num_samples, settings=settings, event_split=event_split,
        download=download), options)
    return dataset


@register_dataset('events/digits')
def _digits(split: str, settings: FrameSettings, num_samples: Optional[int]) -> EventDataset:
    return EventDigits(split, settings, num_samples)


@register_dataset('events/cifar10dvs')
def _folder(
        root: str,
        training: bool,
        event_split: str,
        settings: FrameSettings,
        num_samples: Optional[int],
) -> EventDataset:
    return EventFolder(root, training, event_split, settings, num_samples)


@register_dataset('tonic/NAME')
def _tonic(
        name: str,
        root: str,
        training: bool,
        event_split: str,
        settings: FrameSettings,
        num_samples: Optional[int],
        download: bool,
) -> EventDataset:
    return create_tonic_dataset(
        name.removeprefix('tonic/'), root, training, event_split, settings, num_samples, download)
