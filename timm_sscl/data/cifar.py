"""CIFAR augmentation that timm's training transform lacks: padded random crop, AutoAugment policy, Cutout."""
from typing import Optional, Tuple

import torch
from torchvision import transforms

__all__ = ['augment_cifar', 'Cutout', 'CIFAR_POLICY']

CIFAR_POLICY = 'cifar10'  # value of --aa
_GREY = 128  # AutoAugment's fill value


class Cutout:
    """Set a square of an image tensor to 0 (DeVries and Taylor 2017).

    The centre is uniform over the pixels, so that near the border a part of the square lies outside.

    Args:
        length: Side of the square in pixels, even. Around centre y it covers rows [y - length / 2, y + length / 2).
    """

    def __init__(self, length: int):
        if length < 2 or length % 2:
            raise ValueError(f'cutout={length}: must be an even number of pixels, 2 or more.')
        self.length = length

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """Return a copy of an image (C, H, W) with a square set to 0."""
        height, width = image.shape[-2:]
        y, x = (int(torch.randint(size, ())) for size in (height, width))
        half = self.length // 2
        image = image.clone()
        image[..., max(0, y - half):y + half, max(0, x - half):x + half] = 0
        return image

    def __repr__(self) -> str:
        return f'Cutout({self.length})'


def augment_cifar(
        transform: transforms.Compose,
        size: Tuple[int, int],
        crop_padding: Optional[int] = None,
        policy: bool = False,
        cutout: Optional[int] = None,
) -> transforms.Compose:
    """Add CIFAR augmentation to timm's training transform, in the order crop, flip, policy, Cutout, normalisation.

    Args:
        transform: Result of timm's create_transform, for training and without the prefetcher.
        size: (H, W) of the images; others are resized first.
        crop_padding: Pad the image by this many black pixels and crop randomly, instead of timm's random resized crop.
        policy: Whether to add torchvision's AutoAugment policy for CIFAR-10, with grey as fill.
        cutout: Side of the Cutout square in pixels.

    Returns:
        A new transform.

    Raises:
        ValueError: A number is out of range.
    """
    parts = list(transform.transforms)
    if crop_padding is not None:
        if crop_padding < 0:
            raise ValueError(f'crop_padding={crop_padding}: must be 0 pixels or more.')
        parts[:1] = [transforms.Resize(size), transforms.RandomCrop(size, padding=crop_padding)]
    to_tensor = next(i for i, part in enumerate(parts) if type(part).__name__ == 'MaybeToTensor')
    if cutout is not None:
        parts.insert(to_tensor + 1, Cutout(cutout))
    if policy:
        parts.insert(to_tensor, transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10, fill=_GREY))
    return transforms.Compose(parts)
