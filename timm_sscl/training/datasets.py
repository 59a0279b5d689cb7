"""Create the training and validation sets from the options and check them before training."""
import logging
from argparse import Namespace
from typing import Any, Dict, List, Optional, Tuple

import torch.nn as nn
from timm.data import resolve_data_config
from timm.data.loader import adapt_to_chs
from torch.utils.data import IterableDataset

from timm_sscl.data import create_dataset
from timm_sscl.data.checks import (
    check_apart, check_classes, check_copies, check_differ, check_first, check_labels, check_metadata, check_repeats,
    check_seen, check_sensor)
from timm_sscl.data.events import EventDataset, FrameSettings, is_event_dataset
from timm_sscl.data.folders import classes_of
from timm_sscl.data.items import FramesCheck, ImageCheck, as_pair
from timm_sscl.data.registry import ARGUMENTS, TIMM_ARGUMENTS, is_own_dataset
from timm_sscl.data.samples import Samples
from timm_sscl.losses import loss_spec

from .errors import OptionError, blame_options

__all__ = ['EVENT_SETTINGS', 'create_datasets', 'guard_samples', 'resolve_input', 'resolve_num_classes']

_logger = logging.getLogger('train')

# options that event frames depend on
EVENT_SETTINGS = (
    'timesteps', 'event_frames', 'event_mode', 'event_size', 'event_roll', 'event_split', 'event_axes')


def create_datasets(args: Namespace) -> Tuple[Any, Any]:
    """Return training and validation set; with --eval-only the validation set twice."""
    options = {name: getattr(args, name) for name in ('dataset', 'data_dir', 'dataset_kwargs')}
    with blame_options(options, passing=(ValueError, FileNotFoundError), place=is_own_dataset(args.dataset)):
        return _create_datasets(args)


def _create_datasets(args: Namespace) -> Tuple[Any, Any]:
    taken = sorted({*ARGUMENTS, *TIMM_ARGUMENTS} & set(args.dataset_kwargs))
    if taken:
        raise OptionError(f'--dataset-kwargs {taken[0]}={args.dataset_kwargs[taken[0]]}: the script sets {taken[0]} '
                          f'itself, by an option of its own.')
    events = is_event_dataset(args.dataset)
    common = dict(
        root=args.data_dir, download=args.dataset_download, seed=args.seed, **args.dataset_kwargs,
        **(_event_arguments(args) if events else _image_arguments(args)))
    val = create_dataset(
        args.dataset, split=args.val_split, is_training=False, batch_size=args.validation_batch_size or args.batch_size,
        num_samples=args.val_num_samples, **common)
    if events:
        _set_frame_input(args, val)
    if isinstance(val, EventDataset):
        check_sensor(val)
    if args.eval_only:
        return val, val
    train = create_dataset(
        args.dataset, split=args.train_split, is_training=True, batch_size=args.batch_size, repeats=args.epoch_repeats,
        num_samples=args.train_num_samples, **common)
    _check_together(args, train, val)
    return train, val


def _image_arguments(args: Namespace) -> Dict[str, Any]:
    return dict(
        class_map=args.class_map, input_key=args.input_key, target_key=args.target_key,
        input_img_mode=args.input_img_mode or ('L' if _given_channels(args) == 1 else 'RGB'),
        trust_remote_code=args.dataset_trust_remote_code)


def _event_arguments(args: Namespace) -> Dict[str, Any]:
    settings = FrameSettings(args.timesteps, args.event_frames, args.event_mode, args.event_size, args.event_axes)
    return dict(settings=settings, event_split=args.event_split)


def _set_frame_input(args: Namespace, dataset: Any) -> None:
    """Set the options of the model's input to those of event frames: two channels, not normalised."""
    size = [2, *_frame_size(dataset)]
    if args.input_size and list(args.input_size) != size:
        raise OptionError(f'--input-size {" ".join(map(str, args.input_size))}: event frames are '
                          f'{" x ".join(map(str, size))}; --event-size sets their size.')
    args.in_chans, args.input_size, args.mean, args.std = 2, size, [0., 0.], [1., 1.]


def _frame_size(dataset: Any) -> Tuple[int, int]:
    """Return (height, width) of the frames, from the first sample if the data set does not declare it."""
    if isinstance(dataset, EventDataset):
        return dataset.frame_size
    try:
        frames, _ = as_pair(dataset[0])
    except TypeError as error:
        raise ValueError(f'{type(dataset).__name__}: its first item {error}.') from error
    shape = tuple(getattr(frames, 'shape', ()))
    if len(shape) != 4:
        raise ValueError(f'{type(dataset).__name__}: its first item is a {type(frames).__name__} of shape {shape}; '
                         f'event frames are (T, 2, H, W).')
    return shape[2:]


def _check_together(args: Namespace, train: Any, val: Any) -> None:
    """Check training and validation set against each other."""
    same_split = args.train_split == args.val_split
    if is_own_dataset(args.dataset):
        check_differ(train, val, same_split)
    elif not is_event_dataset(args.dataset):
        check_apart(train, val, same_split)
    if not args.class_map:
        check_classes(train, val)
    check_seen(train, val, cut=args.train_num_samples is not None)
    check_copies(train, val)


def guard_samples(args: Namespace, datasets: Tuple[Any, Any], data_config: Dict[str, Any], num_classes: int) -> Tuple:
    """Wrap the data sets in `Samples` after checking labels. Streams, which have no numbered samples, are returned
    unchanged.
    """
    guarded: List[Any] = []
    channels, *size = data_config['input_size']
    indexed = [name for name in args.losses if loss_spec(name).needs_index]
    check = (FramesCheck((args.timesteps, channels, *size)) if is_event_dataset(args.dataset)
             else ImageCheck(channels))
    for dataset, training in zip(datasets, (not args.eval_only, False)):
        split = 'training' if training else 'validation'
        if isinstance(dataset, IterableDataset):
            if training and indexed:
                raise OptionError(f'--loss {", ".join(indexed)}: uses the indices of the samples, but the training '
                                  f'data is a stream, which has none.')
            if training:
                _logger.warning(
                    'The training data is a stream: a resumed run does not repeat its augmentation exactly.')
            guarded.append(dataset)
            continue
        check_labels(dataset, num_classes, split)
        check_metadata(dataset, split)
        cached = training and args.teacher_cache
        dataset = Samples(
            dataset, num_classes, training, args.seed, args.max_unreadable, check=check,
            with_index=training and bool(cached or indexed))
        check_first(dataset, split)
        if cached:
            check_repeats(dataset)
        guarded.append(dataset)
    return tuple(guarded)


def _given_channels(args: Namespace) -> Optional[int]:
    return args.input_size[0] if args.input_size else args.in_chans


def resolve_input(args: Namespace, student: nn.Module) -> Dict[str, Any]:
    """Return timm's data configuration for the student's input channels; the model's mean and std are adapted to them.
    """
    channels = _given_channels(args)
    for name in ('mean', 'std'):
        values = getattr(args, name)
        if values and len(values) not in (1, channels or 3):
            raise OptionError(f'--{name}: {len(values)} values for {channels or 3} channels; give one per channel.')
    config = resolve_data_config(vars(args), model=student)
    if channels is not None:
        config['input_size'] = (channels, *config['input_size'][1:])
    for name in ('mean', 'std'):
        config[name] = tuple(adapt_to_chs(config[name], config['input_size'][0]))
    return config


def resolve_num_classes(args: Namespace, dataset: Any) -> int:
    """Return --num-classes, or the number of classes of the data set."""
    classes = classes_of(dataset)
    if args.num_classes is None and classes and len(classes) == 1:
        raise OptionError(f"the data has one class, '{next(iter(classes))}', in which nothing can be told apart; "
                          f'--data-dir takes the folder above the splits, which hold a folder per class '
                          f'(--num-classes 1 where one is meant).')
    if args.num_classes is None and not classes:
        raise OptionError('--num-classes: the data set does not tell its number of classes; give it.')
    if args.num_classes is not None and classes and len(classes) > args.num_classes:
        raise OptionError(f'--num-classes {args.num_classes}: the data set has {len(classes)} classes.')
    if args.num_classes is not None and classes and len(classes) < args.num_classes:
        _logger.warning(f'--num-classes {args.num_classes}: the data set has {len(classes)} classes, labelled 0 to '
                        f'{len(classes) - 1} in its own order; --class-map gives them other labels.')
    return args.num_classes if args.num_classes is not None else len(classes or ())
