"""A copy of a spiking model for export: on the CPU, in evaluation mode, without hooks."""
import copy
import logging
from typing import Any

import torch
import torch.nn as nn

from timm_sscl.conversion.model import SpikingModule
from timm_sscl.untouched import remove_hooks

__all__ = ['check_images', 'inference_copy']

_logger = logging.getLogger(__name__)


def inference_copy(model: nn.Module, what: str) -> Any:
    """Return a copy of a spiking model for export. The model itself stays as it is.

    A warning names modules whose forward hooks were left out. Hooks that compute a layer's weight are kept.

    Args:
        model: Spiking model, in any mode.
        what: What the copy becomes, for the messages.

    Raises:
        ValueError: The model does not spike, or is compiled.
    """
    if hasattr(model, '_orig_mod'):
        raise ValueError(f'{what}: the model is compiled by torch.compile; give the model that was compiled.')
    if not isinstance(model, SpikingModule):
        raise ValueError(f'{what}: {type(model).__name__} does not spike; call convert_to_spiking(model) first.')
    copied: Any = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    for module in copied.modules():
        module._compiled_call_impl = None  # model.compile() changes the module itself
    if hasattr(copied, 'set_grad_checkpointing'):
        copied.set_grad_checkpointing(False)
    hooked = remove_hooks(copied)
    if hooked:
        _logger.warning(f'{type(model).__name__}: the {what} has no forward hooks; those of '
                        f'{", ".join(name or "the model" for name in hooked)} were left out.')
    return copied


def check_images(model: SpikingModule, images: Any) -> torch.Tensor:
    """Return images or event frames in float32 on the CPU.

    Raises:
        ValueError: They are no batch of at least one sample, or have another number of frames than the model has
            timesteps.
    """
    if not isinstance(images, torch.Tensor) or images.ndim < 2 or not len(images):
        shape = tuple(images.shape) if isinstance(images, torch.Tensor) else type(images).__name__
        raise ValueError(f'images: must be a batch (B, C, H, W), or event frames (B, T, C, H, W), got {shape}.')
    if images.ndim == 5 and images.shape[1] != model.timesteps:
        raise ValueError(f'images: hold {images.shape[1]} frames per sample, and the model runs '
                         f'timesteps={model.timesteps}.')
    return images.detach().float().cpu()
