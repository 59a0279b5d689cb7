"""How a network without time sees event frames: frame by frame, its outputs averaged over the frames."""
from typing import Any, Type

import torch
import torch.nn as nn

from timm_sscl.class_swap import Mixin, mix_in, new_mixed
from timm_sscl.conversion.model import SpikingModule, decode

__all__ = ['fold_frames', 'takes_frames_folded', 'accept_frames']


def fold_frames(x: torch.Tensor) -> torch.Tensor:
    """Event frames (B, T, C, H, W) -> (T * B, C, H, W), time-major."""
    return x.transpose(0, 1).flatten(0, 1)


def takes_frames_folded(model: nn.Module, x: torch.Tensor) -> bool:
    """Whether x are event frames and the model is an ANN, which sees each as an image."""
    return x.ndim == 5 and not hasattr(model, 'set_timesteps')


class _OnFrames(Mixin):
    """Mixin that gives an ANN's forward event frames as well as images."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if x.ndim != 5 or isinstance(self, SpikingModule):  # converted since
            return super().forward(x, *args, **kwargs)
        return decode(super().forward(fold_frames(x), *args, **kwargs), x.shape[1])


def _new(base: Type[nn.Module]) -> nn.Module:
    """What pickles of version 0.1.0 call."""
    return new_mixed(_OnFrames, base)


def accept_frames(model: nn.Module) -> nn.Module:
    """Let an ANN take event frames (B, T, C, H, W): each is an image, and the outputs are averaged over T, to (B, K).

    The model stays what it is: its parameters keep their names, images go through as before. SSCLTask and SSCLLoss do
    the same with their teacher by themselves.

    Args:
        model: ANN; a spiking model takes frames already and is left as it is.

    Returns:
        The model itself, of a subclass of its class.
    """
    if not isinstance(model, SpikingModule):
        mix_in(model, _OnFrames)
    return model
