"""Let an ANN process event frames one by one and average its outputs over the frames."""
from typing import Any, Type

import torch
import torch.nn as nn

from timm_sscl.class_swap import Mixin, mix_in, new_mixed
from timm_sscl.conversion.model import SpikingModule, decode

__all__ = ['fold_frames', 'takes_frames_folded', 'accept_frames']


def fold_frames(x: torch.Tensor) -> torch.Tensor:
    """Fold event frames (B, T, C, H, W) to (T * B, C, H, W), time-major."""
    return x.transpose(0, 1).flatten(0, 1)


def takes_frames_folded(model: nn.Module, x: torch.Tensor) -> bool:
    """Return whether x are event frames and the model is an ANN, which processes each frame as an image."""
    return x.ndim == 5 and not hasattr(model, 'set_timesteps')


class _OnFrames(Mixin):
    """Mixin that lets an ANN's forward take event frames as well as images."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if x.ndim != 5 or isinstance(self, SpikingModule):  # the second: a model that was converted later
            return super().forward(x, *args, **kwargs)
        return decode(super().forward(fold_frames(x), *args, **kwargs), x.shape[1])


def _new(base: Type[nn.Module]) -> nn.Module:
    """Create an instance for unpickling. Pickles of version 0.1.0 call this."""
    return new_mixed(_OnFrames, base)


def accept_frames(model: nn.Module) -> nn.Module:
    """Let an ANN take event frames (B, T, C, H, W). Each frame is an image, and outputs are averaged over T, to (B, K).

    Parameters keep their names, and images are processed as before. SSCLTask and SSCLLoss treat their teacher this way
    automatically.

    Args:
        model: ANN. A spiking model already takes frames and is not changed.

    Returns:
        The model itself, of a subclass of its class.
    """
    if not isinstance(model, SpikingModule):
        mix_in(model, _OnFrames)
    return model
