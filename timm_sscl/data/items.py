"""Check the items of a data set: an image with the right number of channels, or event frames of one shape, and a label.
"""
import operator
from typing import Any, Callable, Tuple

import torch
from PIL import Image

__all__ = ['ItemCheck', 'ImageCheck', 'FramesCheck', 'as_pair', 'label_problem']

ItemCheck = Callable[[Any], str]  # returns what is wrong with an image or with frames, '' if nothing


def as_pair(item: Any) -> Tuple[Any, Any]:
    """Return an item as (input, label).

    Raises:
        TypeError: The item is not a pair.
    """
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        size = f' of {len(item)}' if isinstance(item, (tuple, list)) else ''
        raise TypeError(f'is a {type(item).__name__}{size}, and must be a pair (input, label)')
    return item[0], item[1]


def label_problem(label: Any, num_classes: int) -> str:
    """Return what is wrong with a label, '' if nothing. A label is a whole number in [0, num_classes)."""
    classes = f'the model has {num_classes} classes, 0 to {num_classes - 1}'
    try:
        number = operator.index(label)
    except TypeError:
        what = f' ({type(label).__name__})' if label is not None else ''
        return f'{label}{what}, which is no whole number; {classes}'
    return '' if 0 <= number < num_classes else f'{label}; {classes}'


class ImageCheck:
    """Check that an item is a PIL image with the right number of channels.

    Args:
        channels: Number of channels of the model's input.
    """

    def __init__(self, channels: int):
        self.channels = channels

    def __call__(self, image: Any) -> str:
        if not isinstance(image, Image.Image):
            return (f'is a {_kind(image)} and no PIL image, which the transforms take; a data set of frames '
                    f'(T, 2, H, W) has a name that begins with events/')
        found = len(image.getbands())
        return '' if found == self.channels else (
            f'has {found} channels ({image.mode}), the model takes {self.channels}; --in-chans and --input-img-mode '
            f'say what images are')


class FramesCheck:
    """Check that event frames have one shape, are floating point and finite.

    Args:
        shape: (T, 2, H, W).
    """

    def __init__(self, shape: Tuple[int, ...]):
        self.shape = tuple(shape)

    def __call__(self, frames: Any) -> str:
        good = isinstance(frames, torch.Tensor) and frames.is_floating_point() and tuple(frames.shape) == self.shape
        if not good:
            return (f'is a {_kind(frames)}, and must be a floating point tensor (T, 2, H, W) = {self.shape} '
                    f'(T is --timesteps)')
        return '' if frames.isfinite().all() else 'has NaN or infinite values, of which no neuron fires'


def _kind(value: Any) -> str:
    """Describe a value by its type, and by dtype and shape if it has them."""
    shape, dtype = getattr(value, 'shape', None), getattr(value, 'dtype', None)
    return type(value).__name__ + (f' of {dtype}' if dtype is not None else '') + (
        f' of shape {tuple(shape)}' if shape is not None else '')
