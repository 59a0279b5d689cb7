"""Create data loaders that Accelerate can shard."""
from argparse import Namespace
from typing import Any, Dict, NamedTuple, Optional, Tuple

import torch
from timm.data import Mixup, create_loader, create_transform

from timm_sscl.data import CIFAR_POLICY, augment_cifar
from timm_sscl.data.events import EventAugment, create_event_loader, is_event_dataset
from timm_sscl.data.posterize import allow_posterize_to_black

from .errors import OptionError, blame_options
from .processes import count_cores

__all__ = ['Loaders', 'create_loaders']


class Loaders(NamedTuple):
    """Loaders of the training and validation set, and mixup if asked for."""
    train: Any
    eval: Any
    mixup: Optional[Mixup]


# options that timm's transforms and loaders may refuse
_LOADER_OPTIONS = (
    'color_jitter', 'crop_padding', 'cutout', 'crop_pct', 'scale', 'ratio', 'reprob', 'img_size', 'mean', 'std',
    'batch_size', 'workers')


def create_loaders(
        args: Namespace,
        datasets: Tuple[Any, Any],
        data_config: Dict[str, Any],
        num_classes: int,
) -> Loaders:
    """Create loaders. Accelerate shards them and moves the batches."""
    if args.fit_workers:
        args = Namespace(**{**vars(args), 'workers': min(args.workers, count_cores()[1])})
    make = _create_event_loaders if is_event_dataset(args.dataset) else _create_image_loaders
    with blame_options({name: getattr(args, name) for name in _LOADER_OPTIONS}):
        train, val = make(args, datasets, data_config)
    if hasattr(datasets[0], '__len__') and len(train) == 0:
        raise OptionError(f'--batch-size {args.batch_size} is larger than the training set '
                          f'({len(datasets[0])} images).')
    for loader in (train, val):  # else the start of an epoch would draw from the global generator, which dropout uses
        loader.generator = torch.Generator().manual_seed(args.seed)
    return Loaders(train, val, _create_mixup(args, num_classes))


def _pins_memory(args: Namespace) -> bool:
    """Return whether batches lie in pinned memory, from which a GPU copies them while the host goes on."""
    return args.pin_mem or (args.device != 'cpu' and torch.cuda.is_available())


def _create_image_loaders(args: Namespace, datasets: Tuple[Any, Any], data_config: Dict[str, Any]) -> Tuple[Any, Any]:
    """Create timm's loaders without its prefetcher."""
    common = dict(
        input_size=data_config['input_size'], mean=data_config['mean'], std=data_config['std'], use_prefetcher=False,
        distributed=False, num_workers=args.workers, persistent_workers=args.workers > 0, pin_memory=_pins_memory(args),
        worker_seeding=args.worker_seeding)
    interpolation = args.train_interpolation
    if args.no_aug or not interpolation:
        interpolation = data_config['interpolation']
    policy = args.aa == CIFAR_POLICY  # timm has no such policy; it replaces color jitter, as timm's policies do
    with blame_options(dict(aa=args.aa)):
        create_transform(data_config['input_size'], is_training=True, auto_augment=None if policy else args.aa)
    color_jitter: Any = None if policy else args.color_jitter  # timm takes None
    train = create_loader(
        datasets[0], batch_size=args.batch_size, is_training=True, no_aug=args.no_aug, re_prob=args.reprob,
        re_mode=args.remode, re_count=args.recount, train_crop_mode=args.train_crop_mode,
        scale=args.scale, ratio=args.ratio, hflip=args.hflip, vflip=args.vflip,
        color_jitter=color_jitter, color_jitter_prob=args.color_jitter_prob,
        grayscale_prob=args.grayscale_prob or 0., gaussian_blur_prob=args.gaussian_blur_prob or 0.,
        auto_augment=None if policy else args.aa,
        interpolation=interpolation, **common)
    allow_posterize_to_black(datasets[0].transform)
    if not args.no_aug and (policy or args.crop_padding is not None or args.cutout is not None):
        datasets[0].transform = augment_cifar(
            datasets[0].transform, data_config['input_size'][1:], args.crop_padding, policy, args.cutout)
    val = create_loader(
        datasets[1], batch_size=args.validation_batch_size or args.batch_size, is_training=False,
        interpolation=data_config['interpolation'], crop_pct=data_config['crop_pct'], **common)
    return train, val


def _create_event_loaders(args: Namespace, datasets: Tuple[Any, Any], data_config: Dict[str, Any]) -> Tuple[Any, Any]:
    common = dict(num_workers=args.workers, pin_memory=_pins_memory(args))
    augment = None if args.no_aug else EventAugment(args.hflip, args.event_roll)
    return (create_event_loader(datasets[0], args.batch_size, is_training=True, transform=augment, **common),
            create_event_loader(datasets[1], args.validation_batch_size or args.batch_size, **common))


def _create_mixup(args: Namespace, num_classes: int) -> Optional[Mixup]:
    """Create timm's Mixup from the options; None without mixup and cutmix."""
    if not (args.mixup > 0 or args.cutmix > 0. or args.cutmix_minmax is not None):
        return None
    if args.batch_size % 2:
        raise OptionError(f'--batch-size {args.batch_size}: mixup and cutmix need an even batch.')
    return Mixup(
        mixup_alpha=args.mixup, cutmix_alpha=args.cutmix, cutmix_minmax=args.cutmix_minmax, prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob, mode=args.mixup_mode, label_smoothing=args.smoothing,
        num_classes=num_classes)
