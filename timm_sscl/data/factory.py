"""One factory for the data sets: the bundled ones by name, all others by timm."""
import os
from typing import Any, Optional

from timm.data import create_dataset as create_timm_dataset
from torch.utils.data import Dataset

from .digits import DigitsDataset
from .events import create_event_dataset, is_event_dataset

__all__ = ['create_dataset']


def create_dataset(
        name: str,
        root: Optional[str] = None,
        split: str = 'validation',
        num_samples: Optional[int] = None,
        **kwargs: Any,
) -> Dataset:
    """Data set by name: 'digits' is the bundled one, 'events/...' and 'tonic/...' are event data, all else is timm's.

    Args:
        name: 'digits', a name of `create_event_dataset`, or timm's name ('' for an image folder or tar,
            'torch/cifar100', ...).
        root: Folder or file of the data.
        split: Name of the split.
        num_samples: Only so many samples; None takes all.
        **kwargs: For create_event_dataset or timm's create_dataset.

    Returns:
        Data set whose `transform` timm's create_loader sets (for event data create_event_loader).

    Raises:
        FileNotFoundError: root does not exist and nothing was to be downloaded.
        ValueError: The split does not exist or is empty.
    """
    if name == 'digits':
        return DigitsDataset(split, num_samples, input_img_mode=kwargs.get('input_img_mode') or 'RGB')
    if is_event_dataset(name):
        return create_event_dataset(name, root, split, num_samples, **kwargs)
    local = not name.startswith(('hfds/', 'hfids/', 'tfds/', 'wds/'))
    if local and not kwargs.get('download') and not (root and os.path.exists(root)):
        raise FileNotFoundError(f"data folder '{root}' does not exist; give --data-dir the folder that holds "
                                f"{split}/ (one sub-folder per class), or leave it and --dataset out for the digits.")
    if local and not name and os.path.isdir(root) and not os.listdir(root):
        raise ValueError(f"data folder '{root}' is empty.")
    try:
        dataset = create_timm_dataset(name, root=root, split=split, num_samples=num_samples, **kwargs)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(f"cannot read split '{split}' of data set '{name or root}': {error}") from error
    _refuse_fallback(dataset, root, split)
    if hasattr(dataset, '__len__') and len(dataset) == 0:
        raise ValueError(f"split '{split}' of data set '{name or root}' holds no images.")
    return dataset


def _refuse_fallback(dataset: Any, root: Optional[str], split: str) -> None:
    """timm takes the whole folder where it finds no such split in it, and so would train on what it validates on."""
    reader = getattr(dataset, 'reader', None)
    folder = split and type(reader).__name__ == 'ReaderImageFolder'
    if folder and os.path.realpath(reader.root) == os.path.realpath(root):
        raise FileNotFoundError(f"data folder '{root}' has no split '{split}': it needs the folder {split}/ with one "
                                f'sub-folder per class.')
