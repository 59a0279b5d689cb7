"""Create data sets by name: registered ones, and timm's."""
import os
from typing import Any, Dict, Optional

from PIL import Image
from timm.data import ImageDataset as TimmImageDataset
from timm.data import IterableImageDataset
from timm.data import create_dataset as create_timm_dataset
from torch.utils.data import Dataset

from timm_sscl.dataset_names import STREAMS, TIMM_NAMES, TORCH_PARTED, known_name

from .digits import DigitsDataset
from .events import FrameSettings
from .folders import check_layout, drop_hidden, take_spread
from .images import MODES, DecodedStream, ImageDataset, to_mode
from .prefixes import check_source, how_to_download
from .registry import ARGUMENTS, TIMM_ARGUMENTS, build_dataset, list_datasets, register_dataset

__all__ = ['create_dataset']

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
    name = known_name(name, list_datasets())
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
    if name in TORCH_PARTED and split not in _SPLITS_OF_PARTED:
        raise ValueError(f"split '{split}': {name} has 'train' and 'validation'.")  # timm would return the test set
    check_source(name, root, split, download)
    if not name and root and os.path.isdir(root) and not os.listdir(root):
        raise ValueError(f"data folder '{root}' is empty.")
    try:
        dataset = create_timm_dataset(
            name, root=root, split=split, num_samples=num_samples, input_img_mode=input_img_mode, download=download,
            seed=seed, is_training=is_training, class_map=class_map, batch_size=batch_size, repeats=repeats,
            input_key=input_key, target_key=target_key, trust_remote_code=trust_remote_code, **options)
    except (AssertionError, RuntimeError, ValueError) as error:
        hint = how_to_download(name) if 'download=True' in str(error) else ''  # torchvision's own words
        raise ValueError(f"cannot read split '{split}' of data set '{name or root}': {error}{hint}") from error
    _refuse_fallback(dataset, root, split)
    drop_hidden(dataset, renumber=not class_map)
    if hasattr(dataset, '__len__') and len(dataset) == 0:
        raise ValueError(f"split '{split}' of data set '{name or root}' holds no images.")
    # timm cuts streams itself
    if num_samples is not None and not name.startswith(STREAMS) and num_samples < len(dataset):
        take_spread(dataset, num_samples)
    check_layout(dataset)
    return _with_8_bits(dataset, name, input_img_mode)


for _name in TIMM_NAMES:
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
