"""What is wrong with a data set, found before anything is trained on it."""
import os
from typing import Any, Dict, Optional, Sequence

from PIL import Image

from .samples import sample_name

__all__ = ['check_classes', 'check_labels', 'check_channels']


def _class_to_idx(dataset: Any) -> Optional[Dict[str, int]]:
    classes = getattr(getattr(dataset, 'reader', dataset), 'class_to_idx', None)
    return classes if isinstance(classes, dict) and classes else None


def check_classes(train: Any, val: Any) -> None:
    """Raise where training and validation folders do not number the same classes, or a class folder is empty.

    timm numbers the classes that it finds in each split, so a folder without images shifts all labels after it.

    Raises:
        ValueError: By the above, with the names.
    """
    for split, dataset in (('training', train), ('validation', val)):
        empty = _empty_folders(dataset)
        if empty:
            raise ValueError(f'{split} data: {_some(empty)} of {dataset.reader.root} holds no images, which would '
                             f'shift the labels of the classes after it; fill or remove it, or give --class-map.')
    ours, theirs = _class_to_idx(train), _class_to_idx(val)
    if ours is None or theirs is None or ours == theirs:
        return
    differ = sorted(map(str, set(ours) ^ set(theirs))) or sorted(str(c) for c in ours if ours[c] != theirs[c])
    raise ValueError(f'training data has {len(ours)} classes and validation data {len(theirs)}, so their labels do '
                     f'not mean the same: {_some(differ)} differ. Give both the same folders, or --class-map FILE.')


def _some(names: Sequence[str], shown: int = 5) -> str:
    return ', '.join(names[:shown]) + (f' and {len(names) - shown} more' if len(names) > shown else '')


def _empty_folders(dataset: Any) -> Sequence[str]:
    """Class folders of an image folder that no sample comes from."""
    reader = getattr(dataset, 'reader', None)
    root, classes = getattr(reader, 'root', None), _class_to_idx(dataset)
    if type(reader).__name__ != 'ReaderImageFolder' or classes is None or not os.path.isdir(root):
        return []
    folders = [entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith('.')]
    if not set(classes) <= set(folders):  # labels from deeper folders, or a map from file to class
        return []
    return sorted(name for name in folders if name not in classes)


def check_labels(dataset: Any, num_classes: int, split: str) -> None:
    """Raise for a label outside [0, num_classes), where the labels are known without reading the samples.

    Raises:
        ValueError: With the sample and its label.
    """
    reader = getattr(dataset, 'reader', None)
    samples = getattr(reader, 'samples', None)
    labels = [s[1] for s in samples] if isinstance(samples, list) and samples and isinstance(samples[0], tuple) else \
        getattr(dataset, 'targets', None)
    if labels is None:
        return  # checked sample by sample
    for index, label in enumerate(labels):
        if not 0 <= int(label) < num_classes:
            raise ValueError(f"{split} data: '{sample_name(dataset, index)}' has the label {int(label)}; with "
                             f'--num-classes {num_classes} labels are 0 to {num_classes - 1}.')


def check_channels(dataset: Any, channels: int, split: str) -> None:
    """Raise where the first image has another number of channels than the model takes.

    Raises:
        ValueError: With both numbers.
    """
    image = dataset[0][0]
    if isinstance(image, Image.Image) and len(image.getbands()) != channels:
        raise ValueError(f"{split} data: images have {len(image.getbands())} channels ({image.mode}), the model takes "
                         f'{channels}; --in-chans and --input-img-mode say what they are.')
