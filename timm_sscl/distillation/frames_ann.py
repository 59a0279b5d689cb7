"""How a network without time sees event frames: frame by frame, its outputs averaged over the frames."""
from functools import lru_cache
from typing import Any, Type

import torch
import torch.nn as nn

from timm_sscl.conversion.model import SpikingModule, decode

__all__ = ['fold_frames', 'takes_frames_folded', 'accept_frames']


def fold_frames(x: torch.Tensor) -> torch.Tensor:
    """Event frames (B, T, C, H, W) -> (T * B, C, H, W), time-major."""
    return x.transpose(0, 1).flatten(0, 1)


def takes_frames_folded(model: nn.Module, x: torch.Tensor) -> bool:
    """Whether x are event frames and the model is an ANN, which sees each as an image."""
    return x.ndim == 5 and not hasattr(model, 'set_timesteps')


class _OnFrames:
    """Mixin that gives an ANN's forward event frames as well as images."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if x.ndim != 5 or isinstance(self, SpikingModule):  # converted since
            return super().forward(x, *args, **kwargs)
        return decode(super().forward(fold_frames(x), *args, **kwargs), x.shape[1])

    def __reduce_ex__(self, protocol: int):
        return _new, (type(self).__bases__[1],), self.__dict__  # the class has no importable name


@lru_cache(maxsize=None)
def _on_frames(base: Type[nn.Module]) -> type:
    return type(base.__name__, (_OnFrames, base), {'__module__': base.__module__})


def _new(base: Type[nn.Module]) -> nn.Module:
    cls = _on_frames(base)
    return cls.__new__(cls)


def accept_frames(model: nn.Module) -> nn.Module:
    """Let an ANN take event frames (B, T, C, H, W): each is an image, and the outputs are averaged over T, to (B, K).

    The model stays what it is: its parameters keep their names, images go through as before. SSCLTask and SSCLLoss do
    the same with their teacher by themselves.

    Args:
        model: ANN; a spiking model takes frames already and is left as it is.

    Returns:
        The model itself, of a subclass of its class.
    """
    if not isinstance(model, (SpikingModule, _OnFrames)):
        model.__class__ = _on_frames(type(model))
    return model
