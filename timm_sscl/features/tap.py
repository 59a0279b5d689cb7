"""Tap: a place in a model where a feature is read."""
from typing import Any, Dict, Iterator, NamedTuple, Optional, Tuple

import torch
import torch._dynamo
import torch.nn as nn

__all__ = ['Call', 'Tap', 'fold_feature', 'has_timesteps', 'per_step_keyword', 'tensors_in', 'tensor_at']


class Call(NamedTuple):
    """A module's call that makes the feature of a tapped tensor: module(tensor, *args, **kwargs)."""
    module: str
    args: Tuple[Any, ...]
    kwargs: Dict[str, Any]


class Tap(NamedTuple):
    """A place in a model where a feature is read."""
    name: str  # as reported: the stage, or the module that the user named
    module: str  # module to hook
    channels: int
    channel_axis: int  # of the tensor: 1 for NCHW, NCL and NC, -1 for NHWC and NLC
    prefix_tokens: int = 0  # leading tokens (class, register) that are no image patches
    nth: int = 0  # of the module's calls in a forward
    path: Tuple[Any, ...] = ()  # where in the module's output the tensor is: indices of tuples and lists, keys of dicts
    at_input: bool = False  # the tensor is the module's first argument, as no module returns it
    call: Optional[Call] = None  # what forward_intermediates applies to the tensor (a norm, a reordering of tokens)
    through_head: bool = False  # the feature is forward_head(tensor, pre_logits=True): no module returns it itself
    parts: Tuple['Tap', ...] = ()  # what forward_head takes, where that is no module's output as it is
    part_ndim: int = 0
    head_takes_list: bool = False

    @property
    def place(self) -> Tuple[str, bool]:
        """What to hook: the module, and whether its input."""
        return self.module, self.at_input


def fold_feature(x: torch.Tensor, timesteps: int, channel_axis: int = 1, prefix_tokens: int = 0) -> torch.Tensor:
    """A module's output (T * B, ...) as (T, B, C, ...), without a copy."""
    if prefix_tokens:
        x = x[:, prefix_tokens:]
    if channel_axis != 1 and x.ndim > 2:
        x = x.movedim(channel_axis, 1)
    return x.unflatten(0, (timesteps, x.shape[0] // timesteps))


def has_timesteps(model: nn.Module) -> bool:
    return hasattr(model, 'set_timesteps')


def per_step_keyword(model: nn.Module) -> Dict[str, bool]:
    """Keyword by which a spiking model returns every step; an ANN has none."""
    return dict(per_step=True) if has_timesteps(model) else {}


def tensors_in(out: Any, path: Tuple[Any, ...] = ()) -> Iterator[Tuple[Tuple[Any, ...], torch.Tensor]]:
    """The tensors in a structure of tuples, lists and dicts, with their paths."""
    if isinstance(out, torch.Tensor):
        yield path, out
    elif isinstance(out, (tuple, list)):
        for i, item in enumerate(out):
            yield from tensors_in(item, (*path, i))
    elif isinstance(out, dict):
        for key, item in out.items():
            yield from tensors_in(item, (*path, key))


def tensor_at(out: Any, path: Tuple[Any, ...]) -> torch.Tensor:
    for key in path:
        out = out[key]
    return out
