"""Let an ANN process event frames: one by one with its outputs averaged over the frames, or their mean."""
from typing import Any, Type

import torch
import torch.nn as nn

from timm_sscl.class_swap import Mixin, mix_in, new_mixed
from timm_sscl.conversion.model import SpikingModule, decode

__all__ = ['FRAMES', 'fold_frames', 'takes_frames_folded', 'as_mean_frame', 'accept_frames']

FRAMES = ('each', 'mean')


def fold_frames(x: torch.Tensor) -> torch.Tensor:
    """Fold event frames (B, T, C, H, W) to (T * B, C, H, W), time-major."""
    return x.transpose(0, 1).flatten(0, 1)


def takes_frames_folded(model: nn.Module, x: torch.Tensor) -> bool:
    """Return whether x are event frames and the model is an ANN, which processes each frame as an image."""
    return x.ndim == 5 and not hasattr(model, 'set_timesteps')


def as_mean_frame(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return the mean of event frames, (B, C, H, W), for an ANN that processes it (`accept_frames`); else x."""
    mean = takes_frames_folded(model, x) and getattr(model, 'frames_as', 'each') == 'mean'
    return x.mean(1) if mean else x


class _OnFrames(Mixin):
    """Mixin that lets an ANN's forward take event frames as well as images.

    Attributes:
        frames_as: One of `FRAMES`.
    """
    frames_as = 'each'

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if x.ndim != 5 or isinstance(self, SpikingModule):  # the second: a model that was converted later
            return super().forward(x, *args, **kwargs)
        if self.frames_as == 'mean':
            return super().forward(x.mean(1), *args, **kwargs)
        return decode(super().forward(fold_frames(x), *args, **kwargs), x.shape[1])


def _new(base: Type[nn.Module]) -> nn.Module:
    """Create an instance for unpickling. Pickles of version 0.1.0 call this."""
    return new_mixed(_OnFrames, base)


def accept_frames(model: nn.Module, frames: str = 'each') -> nn.Module:
    """Let an ANN take event frames (B, T, C, H, W). Each frame is an image, and outputs are averaged over T, to (B, K).

    Parameters keep their names, and images are processed as before. SSCLTask and SSCLLoss treat their teacher this way
    automatically. A teacher that should see the mean frame instead gets frames='mean' before it is passed to them.

    Args:
        model: ANN. A spiking model already takes frames and is not changed.
        frames: 'each' frame as an image, or their 'mean' as one image, which costs 1 / T.

    Returns:
        The model itself, of a subclass of its class.

    Raises:
        ValueError: frames is none of the two, or is 'mean' for a spiking model.
    """
    if frames not in FRAMES:
        raise ValueError(f"frames='{frames}': must be one of {', '.join(FRAMES)}.")
    if not isinstance(model, SpikingModule):
        mix_in(model, _OnFrames)
        model.frames_as = frames  # type: ignore[assignment]  # an attribute of the mixin
    elif frames == 'mean':
        raise ValueError("frames='mean': is for an ANN; frames are the timesteps of a spiking model.")
    return model
