"""Decode the output of a converted model: separate time from the batch in whatever forward returns."""
import copy
import dataclasses
from collections.abc import Iterator, Mapping, Set
from typing import Any, Optional

import torch
from torch.utils._pytree import SUPPORTED_NODES, tree_leaves, tree_map

from timm_sscl.time_axis import mean_over_time

__all__ = ['check_folded', 'decode']


def check_folded(features: Any, timesteps: int) -> None:
    """Check that the features that forward_head is given have T * B rows.

    Raises:
        ValueError: They have not.
    """
    if isinstance(features, torch.Tensor) and features.ndim and not torch.jit.is_tracing() \
            and features.shape[0] % timesteps:
        raise ValueError(f'forward_head takes the features of all timesteps as forward_features returns them, '
                         f'(T * B, ...) with timesteps={timesteps}; got {tuple(features.shape)}, as after a mean over '
                         f'time. It averages the logits itself.')


def decode(out: Any, timesteps: int, per_step: bool = False, batch: Optional[int] = None) -> Any:
    """Decode (T * B, ...) to the mean over time (B, ...), or to (T, B, ...) with per_step.

    Containers and dataclasses are decoded entry by entry.

    Args:
        out: Output of the model.
        timesteps: T.
        per_step: Whether to return every timestep.
        batch: B, if known. Tensors must then have T * B rows or a multiple.

    Raises:
        ValueError: A tensor does not have such rows, or its dtype has no mean.
        TypeError: An object holds tensors that cannot be reached.
    """
    if isinstance(out, torch.Tensor):
        return _decode_tensor(out, timesteps, per_step, batch)

    def inside(entry: Any) -> Any:
        return decode(entry, timesteps, per_step, batch)
    if isinstance(out, tuple) and hasattr(out, '_fields'):
        return type(out)(*map(inside, out))
    if type(out) in (list, tuple):
        return type(out)(map(inside, out))
    if isinstance(out, dict):
        decoded: Any = {} if type(out) is dict else copy.copy(out)  # other classes may have further attributes
        for key, entry in out.items():
            decoded[key] = inside(entry)
        return decoded
    if dataclasses.is_dataclass(out) and not isinstance(out, type):
        decoded = copy.copy(out)
        for field in dataclasses.fields(out):
            object.__setattr__(decoded, field.name, inside(getattr(out, field.name)))
        return decoded
    if type(out) in SUPPORTED_NODES:  # containers registered with torch's pytree
        return tree_map(lambda leaf: leaf if type(leaf) is type(out) else inside(leaf), out)
    if isinstance(out, (list, tuple)):
        return type(out)(map(inside, out))
    if _holds_rows(out):
        raise TypeError(f'a spiking model returned a {type(out).__name__}, where time cannot be taken from the batch; '
                        f'return tensors, in lists, tuples, dicts or dataclasses.')
    return out


def _decode_tensor(out: torch.Tensor, timesteps: int, per_step: bool, batch: Optional[int]) -> torch.Tensor:
    rows = timesteps * (batch or 1)
    if out.ndim == 0 or (not torch.jit.is_tracing() and out.shape[0] % rows):
        raise ValueError(
            f'a spiking model returned a tensor of shape {tuple(out.shape)}, but time is folded into the batch: it has '
            f'timesteps={timesteps}{f" times {batch} samples" if batch else ""} on axis 0. What is no result of each '
            f'sample (a sum over the batch, a weight) has no place in what forward returns.')
    out = out.unflatten(0, (timesteps, out.shape[0] // timesteps))
    if per_step:
        return out
    if not (out.is_floating_point() or out.is_complex()):
        raise ValueError(f'a spiking model returned a tensor of {out.dtype}, which has no mean over time; '
                         f'per_step=True returns every step.')
    return mean_over_time(out)


def _holds_rows(out: Any) -> bool:
    """Return whether an object that is no known container may hold tensors."""
    if isinstance(out, Mapping):
        return any(map(_is_or_holds_rows, out.values()))
    if isinstance(out, Set):
        return any(map(_is_or_holds_rows, out))
    if isinstance(out, Iterator) or bool(getattr(out, 'ndim', 0)):  # a generator, or an array
        return True
    return not isinstance(out, type) and any(isinstance(leaf, torch.Tensor)
                                             for leaf in tree_leaves(dict(getattr(out, '__dict__', {}))))


def _is_or_holds_rows(out: Any) -> bool:
    return isinstance(out, torch.Tensor) or _holds_rows(out)
