"""Let timm's posterize keep 0 bits, which newer releases of Pillow refuse."""
from typing import Any, Iterator

from PIL import Image
from timm.data.auto_augment import AugmentOp, posterize

__all__ = ['allow_posterize_to_black']


def _posterize(image: Image.Image, bits_to_keep: int, **kwargs: Any) -> Image.Image:
    """Posterize an image; with 0 bits return black, as older releases of Pillow did."""
    if bits_to_keep < 1:
        return image.point([0] * 256 * len(image.getbands()))
    return posterize(image, bits_to_keep, **kwargs)


def allow_posterize_to_black(transform: Any) -> None:
    """Make the posterize ops of a transform accept any strength, in place.

    Args:
        transform: Result of timm's create_transform.
    """
    for op in _augment_ops(transform):
        if op.aug_fn is posterize:
            op.aug_fn = _posterize


def _augment_ops(transform: Any) -> Iterator[AugmentOp]:
    """Yield all augmentation ops in a transform."""
    if isinstance(transform, AugmentOp):
        yield transform
    elif isinstance(transform, (list, tuple)):
        for part in transform:
            yield from _augment_ops(part)
    else:
        for name in ('transforms', 'ops', 'policy'):  # attributes of Compose, RandAugment and AutoAugment
            yield from _augment_ops(list(getattr(transform, name, ())))
