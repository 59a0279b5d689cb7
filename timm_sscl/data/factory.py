"""Create data sets by name: registered ones, and timm's."""
import difflib
import os
from typing import Any, Dict, Optional

from PIL import Image
from timm.data import ImageDataset as TimmImageDataset
from timm.data import IterableImageDataset
from timm.data import create_dataset as create_timm_dataset
from torch.utils.data import Dataset

from .digits import DigitsDataset
from .events import FrameSettings
from .folders import check_layout, drop_hidden, take_spread
from .images import MODES, DecodedStream, ImageDataset, to_mode
from .registry import (
    ARGUMENTS, TIMM_ARGUMENTS, build_dataset, list_datasets, register_dataset, registered_name)

__all__ = ['create_dataset']

_STREAMS = 'hfids/', 'tfds/', 'wds/'
_TORCH_FOLDER = 'torch/image_folder'
_TORCH_PARTED = 'torch/cifar10', 'torch/cifar100', 'torch/mnist', 'torch/kmnist', 'torch/fashion_mnist', 'torch/qmnist'
_TORCH = *_TORCH_PARTED, 'torch/places365', 'torch/inaturalist', 'torch/imagenet', _TORCH_FOLDER
_TORCH_ALIASES = 'torch/inat', 'torch/folder'
_SPLITS_OF_PARTED = 'train', 'training', 'val', 'valid', 'validation', 'eval', 'evaluation', 'test'


def create_dataset(
        name: str,
        root: Optional[str] = None,
        split: str = 'validation',
        num_samples: Optional[int] = None,
        **kwargs: Any,
) -> Dataset:
    """Create a data set by name: a registered one (`list_datasets`), or '' for an image folder or a tar file.

    Args:
        name: 'digits' is bundled. 'events/...' and 'tonic/...' are event data. 'torch/cifar100', 'hfds/...' and similar
            names are timm's. Others are registered by the user (`register_dataset`).
        root: Folder or file of the data.
        split: Name of the split.
        num_samples: Number of samples to take; None takes all.
        **kwargs: Arguments of timm's create_dataset, or `settings` and `event_split` for event data. Each data set
            receives those that it has parameters for. All others are options of the data set itself.

    Returns:
        Data set. timm's create_loader (create_event_loader for event data) sets its `transform`.

    Raises:
        FileNotFoundError: root does not exist and download is off.
        ValueError: The data set, its split or an option does not exist, or the split is empty.
    """
    name = _known_name(name)
    if num_samples is not None and num_samples < 1:
        raise ValueError(f'num_samples={num_samples}: must be 1 or more (--train-num-samples, --val-num-samples).')
    mode = kwargs.get('input_img_mode') or 'RGB'
    if mode not in MODES:
        raise ValueError(f"input_img_mode='{mode}': must be one of {', '.join(MODES)}, whose values are scaled to 0 to "
                         f'1 (--input-img-mode).')
    given = (*ARGUMENTS, *TIMM_ARGUMENTS)
    arguments: Dict[str, Any] = dict(settings=FrameSettings(), event_split='last100', download=False, seed=42)
    arguments.update({key: value for key, value in kwargs.items() if key in given})
    arguments.update(name=name, root=root, split=split, num_samples=num_samples, input_img_mode=mode)
    options = {key: value for key, value in kwargs.items() if key not in given}
    if not name:
        own = {key: value for key, value in arguments.items() if key not in ('settings', 'event_split')}
        return _timm_dataset(**own, **options)
    return build_dataset(name, arguments, options)


def _known_name(name: str) -> str:
    """Return the registered name for a name whose timm prefix may be in upper case.

    For an unknown name timm would read an image folder.

    Raises:
        ValueError: The name is unknown.
    """
    prefix, slash, rest = name.partition('/')
    timms = prefix.lower()
    known = f'torch/{rest.lower()}' if timms == 'torch' else f'{timms}/{rest}'
    timms_name = known if f'{timms}/' in ('torch/', 'hfds/', *_STREAMS) else name
    for asked in (name, timms_name):
        if not asked or registered_name(asked):
            return asked
    datasets = list_datasets()
    close = difflib.get_close_matches(name.lower(), datasets, n=1) or [d for d in datasets if d.endswith(f'/{rest}')]
    close = close or [d for d in _TORCH if d.endswith('/' + name.lower())]
    raise ValueError(f"unknown data set '{name}' (--dataset)" + (f", did you mean '{close[0]}'?" if close else ';')
                     + f" There are {', '.join(datasets)}; leave it out for an image folder or a tar file. A plug-in "
                     'that registers others is imported by --plugin FILE|MODULE.')


@register_dataset('digits')
def _digits(split: str, num_samples: Optional[int], input_img_mode: str) -> Dataset:
    return DigitsDataset(split, num_samples, input_img_mode=input_img_mode)


def _timm_dataset(
        name: str,
        root: Optional[str],
        split: str,
        num_samples: Optional[int],
        input_img_mode: str,
        download: bool = False,
        seed: int = 42,
        is_training: bool = False,
        class_map: Any = '',
        batch_size: int = 1,
        repeats: int = 0,
        input_key: Optional[str] = None,
        target_key: Optional[str] = None,
        trust_remote_code: bool = False,
        **options: Any,
) -> Dataset:
    """Create a data set of timm and switch off what timm does silently.

    An unknown split, a missing split folder and hidden files are refused or left out, `num_samples` are evenly spread,
    and 16 bit images are scaled instead of clipped.
    """
    if name in _TORCH_PARTED and split not in _SPLITS_OF_PARTED:
        raise ValueError(f"split '{split}': {name} has 'train' and 'validation'.")  # timm would return the test set
    local = not name.startswith(('hfds/', *_STREAMS))
    if local and not download and not (root and os.path.exists(root)):
        raise FileNotFoundError(f"data folder '{root}' does not exist; give --data-dir the folder that holds "
                                f"{split}/ (one sub-folder per class), or leave it and --dataset out for the digits.")
    if local and not name and root and os.path.isdir(root) and not os.listdir(root):
        raise ValueError(f"data folder '{root}' is empty.")
    try:
        dataset = create_timm_dataset(
            name, root=root, split=split, num_samples=num_samples, input_img_mode=input_img_mode, download=download,
            seed=seed, is_training=is_training, class_map=class_map, batch_size=batch_size, repeats=repeats,
            input_key=input_key, target_key=target_key, trust_remote_code=trust_remote_code, **options)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(f"cannot read split '{split}' of data set '{name or root}': {error}") from error
    _refuse_fallback(dataset, root, split)
    drop_hidden(dataset, renumber=not class_map)
    if hasattr(dataset, '__len__') and len(dataset) == 0:
        raise ValueError(f"split '{split}' of data set '{name or root}' holds no images.")
    # timm cuts streams itself
    if num_samples is not None and not name.startswith(_STREAMS) and num_samples < len(dataset):
        take_spread(dataset, num_samples)
    check_layout(dataset)
    return _with_8_bits(dataset, name, input_img_mode)


for _name in (*_TORCH, *_TORCH_ALIASES, 'hfds/NAME', *(prefix + 'NAME' for prefix in _STREAMS)):
    register_dataset(_name)(_timm_dataset)


def _with_8_bits(dataset: Any, name: str, mode: str) -> Any:
    """Make a data set convert its images by `to_mode`, since timm and torchvision let PIL clip 16 bit images."""
    if type(dataset) is TimmImageDataset:
        return ImageDataset(dataset)
    if isinstance(dataset, IterableImageDataset) and name.startswith(('hfids/', 'wds/')):  # tfds decodes images itself
        dataset.reader = DecodedStream(dataset.reader, mode)
    elif hasattr(dataset, 'loader'):  # torchvision data sets
        dataset.loader = _Loader(mode)
    return dataset


class _Loader:
    """Load an image file and convert it to a mode. A class, since it is pickled for loader workers."""

    def __init__(self, mode: str):
        self.mode = mode

    def __call__(self, file: str) -> Any:
        with Image.open(file) as image:
            return to_mode(image, self.mode)


def _refuse_fallback(dataset: Any, root: Optional[str], split: str) -> None:
    """Raise an error if timm read the root folder because the split's folder is missing.

    Training and validation would then use the same images.
    """
    reader = getattr(dataset, 'reader', dataset)
    folder = split and type(reader).__name__ in ('ReaderImageFolder', 'ImageFolder')
    if folder and os.path.realpath(reader.root) == os.path.realpath(str(root)):
        raise FileNotFoundError(f"data folder '{root}' has no split '{split}': it needs the folder {split}/ with one "
                                f'sub-folder per class.')
