"""Check data sets for mistakes before training starts."""
import logging
import operator
import os
from typing import Any, List, Optional, Sequence

import numpy as np
import torch
from PIL import Image

from timm_sscl.random_state import seeded

from .copies import find_copies, find_shared_samples
from .events.dataset import EventDataset, spread_indices
from .events.recording import Events
from .folders import class_to_idx_of, classes_of, some
from .samples import Samples, WrongLabel, sample_name

__all__ = [
    'check_apart', 'check_classes', 'check_copies', 'check_differ', 'check_first', 'check_labels', 'check_metadata',
    'check_repeats', 'check_seen', 'check_sensor', 'known_labels']

_logger = logging.getLogger(__name__)

_ORIENTATION, _UPRIGHT = 0x0112, 1  # EXIF
_HEADERS = 200  # number of image headers that check_metadata reads
_RECORDINGS = 8  # number of recordings that check_sensor reads
_MANY_FILES = 200_000  # check_copies skips larger data sets; on a network disk it would take minutes


def check_apart(train: Any, val: Any, same_split: bool) -> None:
    """Check that training and validation data are not the same images.

    The same split given twice only logs a warning.

    Args:
        train: timm or torchvision data set for training.
        val: Data set for validation.
        same_split: Whether the same split name was given for both.

    Raises:
        ValueError: Two split names refer to the same data, or both data sets are the same tar file.
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
    """Return (root, split, train flag) that identify where the images come from; None if the data set has no root."""
    source = getattr(dataset, 'reader', dataset)
    root = getattr(source, 'root', None)
    if not isinstance(root, (str, os.PathLike)):
        return None
    return os.path.realpath(root), str(getattr(source, 'split', None)), getattr(source, 'train', None)


def check_classes(train: Any, val: Any) -> None:
    """Check that training and validation data have the same class labels and no class folder is empty.

    timm numbers the classes that it finds in each split. A folder without images shifts all labels after it.

    Raises:
        ValueError: Classes differ or a folder is empty. The message names them.
    """
    for split, dataset in (('training', train), ('validation', val)):
        empty = _empty_folders(dataset)
        if empty:
            raise ValueError(f'{split} data: {some(empty)} of {dataset.reader.root} holds no images, which would '
                             f'shift the labels of the classes after it; fill or remove it, or give --class-map.')
    ours, theirs = classes_of(train), classes_of(val)
    if ours is None or theirs is None or ours == theirs:
        return
    differ = sorted(map(str, set(ours) ^ set(theirs))) or sorted(str(c) for c in ours if ours[c] != theirs[c])
    raise ValueError(f'training data has {len(ours)} classes and validation data {len(theirs)}, so their labels do '
                     f'not mean the same: {some(differ)} differ. Give both the same folders, or --class-map FILE.')


def _empty_folders(dataset: Any) -> Sequence[str]:
    """Return the class folders of an image folder that have no samples."""
    reader = getattr(dataset, 'reader', None)
    root, classes = str(getattr(reader, 'root', None)), class_to_idx_of(dataset)
    if type(reader).__name__ != 'ReaderImageFolder' or classes is None or not os.path.isdir(root):
        return []
    folders = [entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith('.')]
    if not set(classes) <= set(folders):  # the labels come from deeper folders or from a class map
        return []
    return sorted(name for name in folders if name not in classes)


def known_labels(dataset: Any) -> Optional[List[int]]:
    """Return the labels of all samples if they are known without reading samples, else None.

    Raises:
        ValueError: `targets` is not a list of whole numbers, one per sample.
    """
    reader = getattr(dataset, 'reader', dataset)
    samples = getattr(reader, 'samples', None)
    if isinstance(samples, list) and samples and isinstance(samples[0], tuple) and (
            reader is not dataset or _is_file_and_label(samples[0])):
        return [sample[1] for sample in samples]
    targets = getattr(reader, 'targets', None)
    if targets is None:
        return None
    try:
        labels = [operator.index(label) for label in targets]
    except TypeError as error:
        raise ValueError(f'{type(reader).__name__}.targets must be the labels of the samples, whole numbers from 0 '
                         f'({error}).') from error
    if hasattr(dataset, '__len__') and len(labels) != len(dataset):
        raise ValueError(f'{type(reader).__name__}.targets has {len(labels)} labels for {len(dataset)} samples.')
    return labels


def _is_file_and_label(sample: tuple) -> bool:
    return len(sample) == 2 and isinstance(sample[0], (str, os.PathLike)) and isinstance(sample[1], int)


def check_seen(train: Any, val: Any, cut: bool = False) -> None:
    """Check that every class in the validation data has training samples.

    Classes that only the training data has are logged.

    Args:
        train: Data set for training.
        val: Data set for validation.
        cut: Whether the number of samples was limited; missing classes are then only logged.

    Raises:
        ValueError: Validation classes have no training sample. The message names them.
    """
    shown, asked = known_labels(train), known_labels(val)
    if shown is None or asked is None:
        return
    names = {label: str(name) for name, label in (classes_of(train) or {}).items()}
    unseen, unasked = (sorted(a - b) for a, b in ((set(asked), set(shown)), (set(shown), set(asked))))
    for labels, holds, lacks in ((unseen, 'validation', 'training'), (unasked, 'training', 'validation')):
        if not labels:
            continue
        text = (f'{holds} data has {len(labels)} classes of which {lacks} data has no sample: '
                f'{some([names.get(label, str(label)) for label in labels])}')
        if lacks == 'training' and not cut:
            raise ValueError(f'{text}; is the training data whole?')
        _logger.warning(f'{text[0].upper()}{text[1:]}.')


def check_copies(train: Any, val: Any) -> None:
    """Log how many validation files have a byte-identical copy in the training data."""
    if len(train) + len(val) > _MANY_FILES:
        return
    ours, theirs = _files(train), _files(val)
    copies = find_copies(theirs, ours) if ours and theirs else []
    if copies:
        _logger.warning(f"{len(copies)} of {len(theirs)} validation files are also training files ('{copies[0][0]}' is "
                        f"'{copies[0][1]}'): the accuracy counts what was learned by heart.")


def _files(dataset: Any) -> List[str]:
    """Return the files of a data set that has one file per sample, else an empty list."""
    try:
        files = [sample_name(dataset, index) for index in range(len(dataset))]
    except (AttributeError, TypeError, IndexError, KeyError, NotImplementedError):
        return []
    return files if files and os.path.isfile(files[0]) and len(set(files)) == len(files) else []


def check_labels(dataset: Any, num_classes: int, split: str) -> None:
    """Check that all labels lie in [0, num_classes), if they are known without reading samples.

    Raises:
        ValueError: A label does not. The message names the sample and the label.
    """
    labels = known_labels(dataset)
    if labels is None:
        return  # Samples checks each label when it is read
    for index, label in enumerate(labels):
        if not 0 <= int(label) < num_classes:
            raise ValueError(f"{split} data: '{sample_name(dataset, index)}' has the label {int(label)}; with "
                             f'--num-classes {num_classes} labels are 0 to {num_classes - 1}.')


def check_first(samples: Samples, split: str) -> None:
    """Check the first sample: its type, and that its label agrees with `targets`.

    Raises:
        WrongSample: The sample is not a pair (image or frames, label).
        WrongLabel: The label is out of range or differs from the one in the list of labels.
    """
    label, labels = samples[0][1], known_labels(samples.dataset)
    if labels is not None and not samples.unreadable and int(label) != labels[0]:
        raise WrongLabel(f"{split} data: '{sample_name(samples.dataset, 0)}' has the label {int(label)} itself, and "
                         f'{labels[0]} in the list of labels (targets).')


def check_differ(train: Any, val: Any, same_split: bool = False) -> None:
    """Check that validation samples are not training samples. A part that is shared only logs a warning.

    Args:
        train: Map-style data set for training.
        val: Map-style data set for validation.
        same_split: Whether the same split name was given for both; all samples may then be shared.

    Raises:
        ValueError: All validation samples that were looked up are training samples; see `find_shared_samples`.
    """
    shared, number = find_shared_samples(val, train)
    if not shared:
        return
    name, (index, other) = type(train).__name__, shared[0]
    example = f"validation sample '{sample_name(val, index)}' is training sample '{sample_name(train, other)}'"
    if len(shared) == number and not same_split:
        raise ValueError(f'{name} gives the same samples for training and validation: all {number} validation samples '
                         f'that were looked up are among the training samples ({example}). Does it use its parameter '
                         f'split (--train-split, --val-split) or training?')
    _logger.warning(f'{name}: {len(shared)} of {number} validation samples that were looked up are among the training '
                    f'samples ({example}): the accuracy counts what was learned by heart.')


def check_repeats(samples: Samples) -> None:
    """Check that the first sample is the same in the next epoch, which cached teacher outputs require.

    Raises:
        ValueError: It differs.
    """
    items = []
    for epoch in (0, 1):
        samples.set_epoch(epoch)
        items.append(samples[0])
    samples.set_epoch(0)
    if not _equal(*items):
        raise ValueError('--teacher-cache: images must be the same in every epoch, and the first one of the training '
                         'data is not; the data set draws random numbers itself.')


def _equal(one: Any, other: Any) -> bool:
    """Return whether two items, or parts of them, are equal."""
    if isinstance(one, (tuple, list)):
        return type(one) is type(other) and len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, (Image.Image, np.ndarray, torch.Tensor)):
        return type(one) is type(other) and np.array_equal(np.asarray(one), np.asarray(other))
    return bool(one == other)


def check_sensor(dataset: EventDataset) -> None:
    """Log if all events lie in a quarter of the sensor's area at its origin, as those of a smaller sensor do.

    Reads up to 8 evenly spaced recordings. Recordings of frames, whose shape is checked, are not looked at.
    """
    columns, rows, sizes = [], [], []
    for index in spread_indices(len(dataset), _RECORDINGS).tolist():
        try:
            with seeded((0,)):
                events = dataset.read(index)
        except Exception:  # reading the sample later reports the file
            continue
        if isinstance(events, Events) and len(events.t):
            columns.append(int(np.max(events.x)) + 1)
            rows.append(int(np.max(events.y)) + 1)
            sizes.append(dataset.extent(events))
    if columns and all(2 * x <= width and 2 * y <= height for x, y, (height, width) in zip(columns, rows, sizes)):
        _logger.warning(f'All events of the {len(columns)} recordings looked at lie in the first {max(columns)} x '
                        f'{max(rows)} pixels of a sensor of {sizes[0][1]} x {sizes[0][0]}, so that most of a frame is '
                        f'empty. For another sensor write an EventDataset with its sensor_size; --event-size only '
                        f'resizes the frames of the whole sensor.')


def check_metadata(dataset: Any, split: str) -> None:
    """Log which metadata of image files timm and torchvision ignore: EXIF rotation, transparency.

    Reads the headers of up to 200 evenly spaced files.
    """
    reader: Any = getattr(dataset, 'reader', None)
    if type(reader).__name__ not in ('ReaderImageFolder', 'ReaderImageInTar'):
        return
    turned, transparent = [], []
    indices = range(0, len(reader), max(1, len(reader) // _HEADERS))
    for index in indices:
        try:
            with reader[index][0] as file, Image.open(file) as image:
                orientation = image.getexif().get(_ORIENTATION, _UPRIGHT)
                see_through = 'A' in image.getbands() or 'transparency' in image.info
        except Exception:  # decoders raise many types; reading the sample later reports the file
            continue
        turned += [index] if orientation != _UPRIGHT else []
        transparent += [index] if see_through and 'A' not in dataset.input_img_mode else []
    for found, what in ((turned, 'an EXIF rotation, which is not applied'), (transparent, 'transparency, which is '
                        'dropped: transparent pixels show the colour stored beneath')):
        if found:
            _logger.warning(f"{split} data: {len(found)} of {len(indices)} images looked at have {what} "
                            f"('{sample_name(dataset, found[0])}').")
