"""What is wrong with a data set, found before anything is trained on it."""
import logging
import os
from typing import Any, Sequence

from PIL import Image

from .folders import class_to_idx_of, some
from .samples import sample_name

__all__ = ['check_apart', 'check_classes', 'check_labels', 'check_channels', 'check_metadata']

_logger = logging.getLogger(__name__)

_ORIENTATION, _UPRIGHT = 0x0112, 1  # EXIF
_HEADERS = 200  # read by check_metadata


def check_apart(train: Any, val: Any, same_split: bool) -> None:
    """Raise where training and validation are the same images; warn where the same split was asked for twice.

    Args:
        train: timm's or torchvision's data set for training.
        val: For validation.
        same_split: Whether both have the same split by name.

    Raises:
        ValueError: A tar file, or two names of one split.
    """
    one, other = (_origin(dataset) for dataset in (train, val))
    if one is None or one != other:
        return
    if not same_split:
        raise ValueError(f"'{one[0]}' would be both the training and the validation data; give --data-dir a folder "
                         f'that holds them apart (--train-split, --val-split; a split may be a tar file).')
    _logger.warning(f"Training and validation data are the same split of '{one[0]}': the accuracies are those on the "
                    f'training images.')


def _origin(dataset: Any) -> Any:
    """Root and part that a data set's images come from; None where it does not tell."""
    source = getattr(dataset, 'reader', dataset)
    root = getattr(source, 'root', None)
    if not isinstance(root, (str, os.PathLike)):
        return None
    return os.path.realpath(root), str(getattr(source, 'split', None)), getattr(source, 'train', None)


def check_classes(train: Any, val: Any) -> None:
    """Raise where training and validation folders do not number the same classes, or a class folder is empty.

    timm numbers the classes that it finds in each split, so a folder without images shifts all labels after it.

    Raises:
        ValueError: By the above, with the names.
    """
    for split, dataset in (('training', train), ('validation', val)):
        empty = _empty_folders(dataset)
        if empty:
            raise ValueError(f'{split} data: {some(empty)} of {dataset.reader.root} holds no images, which would '
                             f'shift the labels of the classes after it; fill or remove it, or give --class-map.')
    ours, theirs = class_to_idx_of(train), class_to_idx_of(val)
    if ours is None or theirs is None or ours == theirs:
        return
    differ = sorted(map(str, set(ours) ^ set(theirs))) or sorted(str(c) for c in ours if ours[c] != theirs[c])
    raise ValueError(f'training data has {len(ours)} classes and validation data {len(theirs)}, so their labels do '
                     f'not mean the same: {some(differ)} differ. Give both the same folders, or --class-map FILE.')


def _empty_folders(dataset: Any) -> Sequence[str]:
    """Class folders of an image folder that no sample comes from."""
    reader = getattr(dataset, 'reader', None)
    root, classes = getattr(reader, 'root', None), class_to_idx_of(dataset)
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
    reader = getattr(dataset, 'reader', dataset)
    samples = getattr(reader, 'samples', None)
    labels = [s[1] for s in samples] if isinstance(samples, list) and samples and isinstance(samples[0], tuple) else \
        getattr(reader, 'targets', None)
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


def check_metadata(dataset: Any, split: str) -> None:
    """Say which parts of the image files are ignored, as timm and torchvision ignore them: rotation, transparency.

    Looks at the headers of up to 200 files, evenly spread.
    """
    reader = getattr(dataset, 'reader', None)
    if type(reader).__name__ not in ('ReaderImageFolder', 'ReaderImageInTar'):
        return
    turned, transparent = [], []
    indices = range(0, len(reader), max(1, len(reader) // _HEADERS))
    for index in indices:
        try:
            with reader[index][0] as file, Image.open(file) as image:
                orientation = image.getexif().get(_ORIENTATION, _UPRIGHT)
                see_through = 'A' in image.getbands() or 'transparency' in image.info
        except Exception:  # every decoder raises its own; named when the sample is read
            continue
        turned += [index] if orientation != _UPRIGHT else []
        transparent += [index] if see_through and 'A' not in dataset.input_img_mode else []
    for found, what in ((turned, 'an EXIF rotation, which is not applied'), (transparent, 'transparency, which is '
                        'dropped: transparent pixels show the colour stored beneath')):
        if found:
            _logger.warning(f"{split} data: {len(found)} of {len(indices)} images looked at have {what} "
                            f"('{sample_name(dataset, found[0])}').")
