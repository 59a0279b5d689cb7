"""Names of timm's data sets, and the registered name behind a name that a user writes. This does not import torch."""
from typing import Collection

from timm_sscl.closest import closest

__all__ = ['STREAMS', 'TIMM_NAMES', 'TORCH_PARTED', 'known_name', 'registered_name']

_FAMILY = '/NAME'  # a registered name with this ending stands for all names with the same prefix
STREAMS = 'hfids/', 'tfds/', 'wds/'
TORCH_PARTED = 'torch/cifar10', 'torch/cifar100', 'torch/mnist', 'torch/kmnist', 'torch/fashion_mnist', 'torch/qmnist'
_TORCH = *TORCH_PARTED, 'torch/places365', 'torch/inaturalist', 'torch/imagenet', 'torch/image_folder'
TIMM_NAMES = (*_TORCH, 'torch/inat', 'torch/folder', 'hfds' + _FAMILY, *(prefix + 'NAME' for prefix in STREAMS))


def registered_name(name: str, datasets: Collection[str]) -> str:
    """Return the registered name that matches a name, itself or as a family 'PREFIX/NAME'; '' if there is none."""
    if name in datasets:
        return name
    families = [known.removesuffix(_FAMILY) + '/' for known in datasets if known.endswith(_FAMILY)]
    of = [prefix for prefix in families if name.startswith(prefix) and name != prefix]
    return max(of, key=len).removesuffix('/') + _FAMILY if of else ''


def known_name(name: str, datasets: Collection[str]) -> str:
    """Return the name of a data set as it is registered; a timm prefix may be in upper case.

    For an unknown name timm would read an image folder.

    Args:
        name: Name as written; '' is an image folder.
        datasets: Registered names.

    Raises:
        ValueError: The name is unknown.
    """
    prefix, slash, rest = name.partition('/')
    timms = prefix.lower()
    known = f'torch/{rest.lower()}' if timms == 'torch' else f'{timms}/{rest}'
    timms_name = known if f'{timms}/' in ('torch/', 'hfds/', *STREAMS) else name
    for asked in (name, timms_name):
        if not asked or registered_name(asked, datasets):
            return asked
    close = closest(name.lower(), datasets) or [d for d in datasets if d.endswith(f'/{rest}')]
    close = close or [d for d in _TORCH if d.endswith('/' + name.lower())]
    raise ValueError(f"unknown data set '{name}' (--dataset)" + (f", did you mean '{close[0]}'?" if close else ';')
                     + f" There are {', '.join(datasets)}; leave it out for an image folder or a tar file. A plug-in "
                     'that registers others is imported by --plugin FILE|MODULE.')
