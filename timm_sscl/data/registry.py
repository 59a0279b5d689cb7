"""Data sets by name: one decorator adds a data set of your own."""
import inspect
from typing import Any, Callable, Dict, List, Mapping, TypeVar

from timm.data import IterableImageDataset
from torch.utils.data import Dataset, IterableDataset

from timm_sscl.knobs import check_known
from timm_sscl.named import Registry

__all__ = ['ARGUMENTS', 'TIMM_ARGUMENTS', 'register_dataset', 'unregister_dataset', 'list_datasets', 'build_dataset',
           'dataset_entry', 'is_event_dataset', 'is_own_dataset', 'registered_name']

Builder = TypeVar('Builder', bound=Callable[..., Dataset])

_FAMILY = '/NAME'  # a registered name that ends so stands for all names with what is before it
# what a data set may ask for by the names of its parameters; all other parameters are its own options
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
# timm's, for its own readers
TIMM_ARGUMENTS = (
    'is_training', 'class_map', 'batch_size', 'repeats', 'input_key', 'target_key', 'trust_remote_code')
_SPLITS = {'train': True, 'training': True, 'validation': False, 'val': False, 'test': False}

_datasets: Registry[Callable[..., Dataset]] = Registry('data set')


def register_dataset(name: str) -> Callable[[Builder], Builder]:
    """Decorator that registers a data set under a name: `create_dataset(NAME)`, `train.py --dataset NAME`.

    What is decorated is a class or a function that returns a data set with `__len__` and `__getitem__`. A parameter
    called `root`, `split`, `training`, `num_samples`, ... (see `ARGUMENTS`) is given what the script's options say; it
    must have `split` or `training`. All other parameters are options of the data set, `--dataset-kwargs KEY=VALUE`.

    An item is a pair (image, label): a PIL image, and a whole number from 0. Under a name that begins with 'events/' it
    is (frames, label): a floating point tensor (T, 2, H, W). A data set may have `classes`, the names of the classes in
    the order of the labels (else --num-classes says how many there are), and `targets`, the label of every sample, from
    which wrong labels are found before training. `filename(index, absolute=True)` names a sample in messages.

    Args:
        name: Name of the data set. One that ends in '/NAME' stands for all names with what is before it; the parameter
            `name` tells which.

    Raises:
        TypeError: What is decorated cannot be called.
        ValueError: The name is empty or taken, or there is neither `split` nor `training`.

    Examples:
        ```python
        @register_dataset('two_digits')
        class TwoDigits(Dataset):
            def __init__(self, split, first=3, second=8):
                ...
        ```
    """
    def decorate(builder: Builder) -> Builder:
        if not isinstance(name, str) or not name or name != name.strip():
            raise ValueError(f'register_dataset({name!r}): the name must be a text without spaces at its ends.')
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
    """Names of the registered data sets, sorted; one that ends in '/NAME' stands for many."""
    return _datasets.names()


def is_event_dataset(name: str) -> bool:
    """Whether the items of the data set of this name are event frames (T, 2, H, W)."""
    return name.startswith(('events/', 'tonic/'))


def registered_name(name: str) -> str:
    """The registered name that this one belongs to; '' where there is none."""
    if name in _datasets:
        return name
    families = [known.removesuffix(_FAMILY) + '/' for known in _datasets if known.endswith(_FAMILY)]
    of = [prefix for prefix in families if name.startswith(prefix) and name != prefix]
    return max(of, key=len).removesuffix('/') + _FAMILY if of else ''


def is_own_dataset(name: str) -> bool:
    """Whether the data set of this name is a user's, and not one of this package or of timm."""
    known = registered_name(name)
    return bool(known) and not str(_datasets.get(known).__module__).startswith('timm_sscl.')


def dataset_entry(name: str) -> Callable[..., Dataset]:
    """The class or function that is registered for a name.

    Raises:
        ValueError: There is none.
    """
    return _datasets.get(registered_name(name) or name)


def build_dataset(name: str, arguments: Mapping[str, Any], options: Mapping[str, Any]) -> Dataset:
    """Build a registered data set.

    Args:
        name: Name that is registered, or of a family.
        arguments: Values for those of `ARGUMENTS` that the data set asks for; `split` among them.
        options: Its own options.

    Raises:
        FileNotFoundError: As the data set raises it.
        ValueError: An option is unknown or missing, the split is unknown, a number of samples was asked for that the
            data set does not take, or what was built has no numbered samples.
    """
    builder = dataset_entry(name)
    own = registered_name(name)
    parameters = inspect.signature(builder).parameters
    known = [p.name for p in parameters.values()
             if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in (*ARGUMENTS, *TIMM_ARGUMENTS)]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        check_known(options, known, f"data set '{own}'")
    missing = [option for option in known if parameters[option].default is inspect.Parameter.empty
               and option not in options]
    if missing:
        raise ValueError(f"data set '{own}' needs the option {missing[0]} (--dataset-kwargs {missing[0]}=...).")
    if arguments.get('num_samples') is not None and 'num_samples' not in parameters:
        raise ValueError(f"data set '{own}' cannot be cut to {arguments['num_samples']} samples (--train-num-samples, "
                         f'--val-num-samples): it has no parameter num_samples.')
    split = arguments['split']
    if 'split' not in parameters and split not in _SPLITS:
        raise ValueError(f"split '{split}': data set '{own}' has 'train' and 'validation'.")
    arguments = {**arguments, 'training': _SPLITS.get(split, False)}
    asked = {key: value for key, value in arguments.items() if key in parameters}
    return _check_numbered(builder(**asked, **options), own)


def _check_numbered(dataset: Any, name: str) -> Dataset:
    """The data set, where it has numbered samples or is one of timm's streams."""
    if isinstance(dataset, IterableImageDataset):
        return dataset
    numbered = hasattr(dataset, '__len__') and hasattr(dataset, '__getitem__')
    if isinstance(dataset, IterableDataset) or not numbered:
        raise ValueError(f"data set '{name}' is a {type(dataset).__name__}; it must have __len__ and __getitem__ "
                         f'(torch.utils.data.Dataset).')
    if len(dataset) == 0:
        raise ValueError(f"data set '{name}' holds no samples.")
    return dataset
