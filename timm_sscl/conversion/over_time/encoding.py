"""Encodings of images as frames over time."""
import warnings
from typing import Optional

import torch

__all__ = ['poisson_input']


def poisson_input(images: torch.Tensor, timesteps: int, generator: Optional[torch.Generator] = None) -> torch.Tensor:
    """Encode images as random frames whose mean is the image: sign(x) with probability |x|, else 0.

    A spiking model takes the frames in place of the images: `model(poisson_input(images, model.timesteps))`. Normalised
    images have values of both signs, so the frames are ternary. Values beyond -1 and 1 saturate, with a warning.

    Args:
        images: Images (B, C, H, W).
        timesteps: Number of frames T.
        generator: Source of the random numbers, on the images' device; torch's own by default.

    Returns:
        Frames (B, T, C, H, W) of the images' dtype.

    Raises:
        ValueError: timesteps is not a positive whole number, or images are not floating point of 4 axes, or not finite.
    """
    if isinstance(timesteps, bool) or not isinstance(timesteps, int) or timesteps < 1:
        raise ValueError(f'timesteps={timesteps!r}: must be a whole number of time steps, 1 or more.')
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(f'images: must be floating point (B, C, H, W), got {images.dtype} of shape '
                         f'{tuple(images.shape)}.')
    if not images.isfinite().all():
        raise ValueError('images: holds values that are not finite.')
    size = images.abs()[:, None]
    if (size > 1).any():
        warnings.warn('poisson_input: images have values beyond -1 and 1, which saturate there, so that the mean of '
                      'the frames is not the image; scale the images to -1 to 1.', stacklevel=2)
    shape = images.shape[0], timesteps, *images.shape[1:]
    chance = torch.rand(shape, generator=generator, device=images.device, dtype=size.dtype)
    return (chance < size).to(images.dtype) * images.sign()[:, None]
