"""Encode the input of a converted model: repeat images over time, or fold event frames into the batch."""
from typing import Any, Optional

import torch
import torch.nn as nn

__all__ = ['check_rank', 'encode_input']


def encode_input(x: Any, timesteps: int, stem: Optional[str] = None) -> torch.Tensor:
    """Fold the input to (T * B, ...): images (B, C, H, W) are repeated, event frames (B, T, C, H, W) are folded.

    If `stem` names a neuron, images stay (B, C, H, W), and that neuron repeats its current.

    Raises:
        TypeError: x is not a tensor.
        ValueError: The number of event frames is not timesteps, or event frames meet a stem that runs once.
    """
    if not isinstance(x, torch.Tensor):
        raise TypeError(f'a spiking model takes a tensor of images or event frames, got {type(x).__name__}.')
    if x.ndim == 5:
        if stem is not None:
            raise ValueError(f'event frames differ in time, but what comes before {stem} runs once per sample '
                             f'(share_stem); set_stem(None) undoes it.')
        if x.shape[1] != timesteps:
            raise ValueError(f'the input holds {x.shape[1]} frames per sample, the model runs timesteps={timesteps}; '
                             f'set_timesteps({x.shape[1]}) makes them agree.')
        return x.transpose(0, 1).flatten(0, 1)
    if stem is not None:
        return x
    return torch.cat([x] * timesteps)  # unlike expand and reshape, cat keeps channels_last


def check_rank(model: nn.Module, x: Any) -> None:
    """Check that an image model gets a batch of images (B, C, H, W) or event frames (B, T, C, H, W).

    An image model has an input size (C, H, W) in timm's config, and a 2-d convolution as its first layer with weights.
    Without this check a convolution reads a single image (C, H, W) as an image without a batch, time in its channels.

    Raises:
        ValueError: x has another number of axes.
    """
    if not isinstance(x, torch.Tensor) or x.ndim in (4, 5):
        return
    config = getattr(model, 'pretrained_cfg', None)
    size = config.get('input_size') if isinstance(config, dict) else None
    first = next((m for m in model.modules() if isinstance(getattr(m, 'weight', None), torch.Tensor)), None)
    if size is None or len(size) != 3 or not isinstance(first, nn.Conv2d):
        return
    hint = ' The batch axis is missing: x[None] makes a batch of one image.' if x.ndim == 3 else ''
    raise ValueError(f'{type(model).__name__} takes images (B, C, H, W) or event frames (B, T, C, H, W), got a '
                     f'tensor of shape {tuple(x.shape)}.{hint}')
