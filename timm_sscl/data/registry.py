"""Register data sets by name with a decorator, and build them."""
import inspect
from typing import Any, Callable, Dict, List, Mapping, TypeVar, cast

from timm.data import IterableImageDataset
from torch.utils.data import Dataset, IterableDataset

from timm_sscl import dataset_names
from timm_sscl.knobs import check_known, declared_type, read_value, type_hints
from timm_sscl.named import Registry

__all__ = ['ARGUMENTS', 'TIMM_ARGUMENTS', 'register_dataset', 'unregister_dataset', 'list_datasets', 'build_dataset',
           'dataset_entry', 'is_event_dataset', 'is_own_dataset', 'registered_name']

Builder = TypeVar('Builder', bound=Callable[..., Dataset])

EVENT_PREFIXES = 'events/', 'tonic/'  # of the names of data sets whose items are event frames
# Parameters by which a data set receives values from the script. All its other parameters are its own options.
ARGUMENTS: Dict[str, str] = {
    'name': 'the name that was asked for',
    'root': 'folder of the data, --data-dir',
    'split': "name of the split, --train-split or --val-split: 'train', 'validation'",
    'training': 'whether the split is the training set',
    'num_samples': 'only so many samples, --train-num-samples or --val-num-samples; None takes all',
    'settings': 'how recordings become frames, a FrameSettings; of event data',
    'event_split': 'how data without a split is parted, --event-split; of event data',
    'download': 'whether it may download, --dataset-download',
    'input_img_mode': "PIL mode of the images, --input-img-mode; 'RGB', or 'L' for one channel",
    'seed': 'seed of the run',
}
# arguments of timm's readers
TIMM_ARGUMENTS = (
    'is_training', 'class_map', 'batch_size', 'repeats', 'input_key', 'target_key', 'trust_remote_code')
_SPLITS = {'train': True, 'training': True, 'validation': False, 'val': False, 'test': False}

_datasets: Registry[Callable[..., Dataset]] = Registry('data set')


def register_dataset(name: str) -> Callable[[Builder], Builder]:
    """Decorator that registers a data set by name: `create_dataset(NAME)`, `train.py --dataset NAME`.

    Decorate a class, or a function that returns a data set with `__len__` and `__getitem__`. Parameters named `root`,
    `split`, `training`, `num_samples`, ... (see `ARGUMENTS`) receive the script's options; `split` or `training` is
    required. All other parameters are options of the data set, `--dataset-kwargs KEY=VALUE`.

    An item is a pair (image, label): a PIL image, and a whole number from 0. If the name starts with 'events/', an item
    is (frames, label): a floating point tensor (T, 2, H, W). The data set may have `classes`, the class names in the
    order of the labels (else --num-classes gives their number), and `targets`, the label of every sample, which allows
    to find wrong labels before training. `filename(index, absolute=True)` names a sample in messages.

    Args:
        name: Name of the data set. A name that ends in '/NAME' stands for all names with that prefix; the parameter
            `name` receives the full name.

    Raises:
        TypeError: The decorated object is not callable.
        ValueError: The name is taken or not possible on the command line, or there is neither `split` nor `training`.

    Examples:
        ```python
        @register_dataset('two_digits')
        class TwoDigits(Dataset):
            def __init__(self, split, first=3, second=8):
                ...
        ```
    """
    def decorate(builder: Builder) -> Builder:
        if not callable(builder):
            raise TypeError(f"register_dataset('{name}'): {builder!r} is no class and no function.")
        if not {'split', 'training'} & set(inspect.signature(builder).parameters):
            raise ValueError(f"register_dataset('{name}'): it has no parameter split or training, so that training and "
                             f'validation would be the same data.')
        _datasets.register(name, builder)
        return builder

    return decorate


def unregister_dataset(name: str) -> None:
    """Remove a data set.

    Raises:
        ValueError: The name is not registered.
    """
    _datasets.unregister(name)


def list_datasets() -> List[str]:
    """Return the names of the registered data sets, sorted. A name that ends in '/NAME' stands for many."""
    return _datasets.names()


def is_event_dataset(name: str) -> bool:
    """Return whether the data set of this name has event frames (T, 2, H, W) as items."""
    return name.startswith(EVENT_PREFIXES)


def registered_name(name: str) -> str:
    """Return the registered name that matches a name, itself or as a family 'PREFIX/NAME'; '' if there is none."""
    return dataset_names.registered_name(name, list_datasets())


def is_own_dataset(name: str) -> bool:
    """Return whether the data set of this name was registered by the user, not by this package."""
    known = registered_name(name)
    return bool(known) and not str(_datasets.get(known).__module__).startswith('timm_sscl.')


def dataset_entry(name: str) -> Callable[..., Dataset]:
    """Return the class or function registered for a name.

    Raises:
        ValueError: There is none.
    """
    return _datasets.get(registered_name(name) or name)


def build_dataset(name: str, arguments: Mapping[str, Any], options: Mapping[str, Any]) -> Dataset:
    """Build a registered data set.

    Args:
        name: Registered name, or a name of a registered family.
        arguments: Values for `ARGUMENTS`, including `split`. The data set receives those that it has parameters for.
        options: Options of the data set itself.

    Raises:
        FileNotFoundError: Raised by the data set.
        ValueError: An option is unknown or missing, the split is unknown, num_samples is given but the data set has no
            such parameter, or the built data set has no `__len__` and `__getitem__`.
    """
    builder = dataset_entry(name)
    own = registered_name(name)
    parameters = inspect.signature(builder).parameters
    known = [p.name for p in parameters.values()
             if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in (*ARGUMENTS, *TIMM_ARGUMENTS)]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        if 'transform' in options and 'transform' not in known:
            raise ValueError(f"data set '{own}' has no option 'transform'; set it afterwards: dataset.transform = ... "
                             f"(timm's create_loader sets it, too).")
        check_known(options, known, f"data set '{own}'")
    missing = [option for option in known if parameters[option].default is inspect.Parameter.empty
               and option not in options]
    if missing:
        raise ValueError(f"data set '{own}' needs the option {missing[0]} (--dataset-kwargs {missing[0]}=...).")
    if arguments.get('num_samples') is not None and 'num_samples' not in parameters:
        raise ValueError(f"data set '{own}' cannot be cut to {arguments['num_samples']} samples (--train-num-samples, "
                         f'--val-num-samples): it has no parameter num_samples.')
    hints = type_hints(cast(Any, builder).__init__ if isinstance(builder, type) else builder)
    options = {option: read_value(declared_type(hints.get(option), parameters[option].default), value, option,
                                  parameters[option].default, f"data set '{own}'")
               if option in known else value for option, value in options.items()}
    split = arguments['split']
    if 'split' not in parameters and split not in _SPLITS:
        raise ValueError(f"split '{split}': data set '{own}' has 'train' and 'validation'.")
    arguments = {**arguments, 'training': _SPLITS.get(split, False)}
    asked = {key: value for key, value in arguments.items() if key in parameters}
    return _check_numbered(builder(**asked, **options), own)


def _check_numbered(dataset: Any, name: str) -> Dataset:
    """Return a data set if it is map-style and not empty, or one of timm's streams.

    Raises:
        ValueError: It is neither.
    """
    if isinstance(dataset, IterableImageDataset):
        return dataset
    numbered = hasattr(dataset, '__len__') and hasattr(dataset, '__getitem__')
    if isinstance(dataset, IterableDataset) or not numbered:
        raise ValueError(f"data set '{name}' is a {type(dataset).__name__}; it must have __len__ and __getitem__ "
                         f'(torch.utils.data.Dataset).')
    if len(dataset) == 0:
        raise ValueError(f"data set '{name}' holds no samples.")
    return dataset
