"""Tap: a place in a model where a feature is read."""
from typing import Any, Dict, Iterator, NamedTuple, Optional, Tuple

import torch
import torch._dynamo
import torch.nn as nn

__all__ = ['Call', 'Tap', 'fold_feature', 'has_timesteps', 'per_step_keyword', 'tensors_in', 'tensor_at']


class Call(NamedTuple):
    """A module call that turns a tapped tensor into the feature: module(tensor, *args, **kwargs)."""
    module: str
    args: Tuple[Any, ...]
    kwargs: Dict[str, Any]


class Tap(NamedTuple):
    """A place in a model where a feature is read."""
    name: str  # as reported: name of the stage, or of the module that the user gave
    module: str  # module to hook
    channels: int
    channel_axis: int  # of the tensor: 1 for NCHW, NCL and NC, -1 for NHWC and NLC
    prefix_tokens: int = 0  # number of leading tokens (class, register) that are not image patches
    nth: int = 0  # which call of the module in a forward
    path: Tuple[Any, ...] = ()  # position of the tensor in the output: indices of tuples and lists, keys of dicts
    at_input: bool = False  # the tensor is the module's first argument, not its output
    call: Optional[Call] = None  # call by which forward_intermediates makes the feature (a norm, a token reordering)
    through_head: bool = False  # the feature is forward_head(tensor, pre_logits=True)
    parts: Tuple['Tap', ...] = ()  # taps on the tensors that forward_head takes
    part_ndim: int = 0
    head_takes_list: bool = False

    @property
    def place(self) -> Tuple[str, bool]:
        """Where to hook: (module, whether its input)."""
        return self.module, self.at_input


def fold_feature(x: torch.Tensor, timesteps: int, channel_axis: int = 1, prefix_tokens: int = 0) -> torch.Tensor:
    """Reshape a module's output (T * B, ...) to (T, B, C, ...) without a copy."""
    if prefix_tokens:
        x = x[:, prefix_tokens:]
    if channel_axis != 1 and x.ndim > 2:
        x = x.movedim(channel_axis, 1)
    return x.unflatten(0, (timesteps, x.shape[0] // timesteps))


def has_timesteps(model: nn.Module) -> bool:
    """Return whether a model is spiking."""
    return hasattr(model, 'set_timesteps')


def per_step_keyword(model: nn.Module) -> Dict[str, bool]:
    """Return the keyword arguments with which a spiking model returns every timestep; none for an ANN."""
    return dict(per_step=True) if has_timesteps(model) else {}


def tensors_in(out: Any, path: Tuple[Any, ...] = ()) -> Iterator[Tuple[Tuple[Any, ...], torch.Tensor]]:
    """Yield (path, tensor) for all tensors in nested tuples, lists and dicts."""
    if isinstance(out, torch.Tensor):
        yield path, out
    elif isinstance(out, (tuple, list)):
        for i, item in enumerate(out):
            yield from tensors_in(item, (*path, i))
    elif isinstance(out, dict):
        for key, item in out.items():
            yield from tensors_in(item, (*path, key))


def tensor_at(out: Any, path: Tuple[Any, ...]) -> torch.Tensor:
    """Return the tensor at a path from `tensors_in`."""
    for key in path:
        out = out[key]
    return out
