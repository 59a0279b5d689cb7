"""Which axis of a tensor holds the channels: followed through a forward from the layers that made it."""
import re
from typing import Any, Callable, Dict, Optional, Sequence, Tuple

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ['ChannelAxes', 'default_axis', 'moved_axis', 'layer_axis']

_SPATIAL = re.compile(r'(?:conv|conv_transpose|\w*pool)([123])d')  # channels, then so many spatial axes
_FIRST = {'batch_norm', 'group_norm', 'instance_norm'}  # channels behind the batch
_LAST = {'linear', 'bilinear', 'embedding', 'multi_head_attention_forward'}
_OVER_LAST = {'layer_norm', 'rms_norm'}
_MOVES = {
    'permute', 'transpose', 'transpose_', 'swapaxes', 'swapdims', 'movedim', 'moveaxis', 't', 'adjoint', '__get__',
    'reshape', 'view', 'flatten', 'unflatten', 'squeeze', 'unsqueeze', 'squeeze_', 'unsqueeze_', 'contiguous',
    '__getitem__', 'select', 'narrow', 'index_select', 'expand', 'repeat', 'tile', 'roll', 'flip', 'rot90',
    'mean', 'sum', 'amax', 'amin', 'chunk', 'split', 'unbind', 'tensor_split',
}


def default_axis(ndim: int) -> int:
    """The axis of the channels where nothing is known: 1 in maps and volumes, the last in tokens and vectors."""
    return 1 if ndim >= 4 else ndim - 1


def layer_axis(name: str, args: Sequence[Any], ndim: int) -> Optional[int]:
    """The axis of the channels that a layer's function takes and returns; None where the function fixes none.

    Args:
        name: Name of the function: 'conv1d', 'linear', ...
        args: Its arguments.
        ndim: Axes of the tensor.
    """
    spatial = _SPATIAL.fullmatch(name)
    if spatial is not None:
        return ndim - 1 - int(spatial[1])
    if name in _FIRST:
        return 1
    if name in _LAST or (name in _OVER_LAST and len(args) > 1 and len(args[1]) == 1):
        return ndim - 1
    return None


def moved_axis(
        func: Callable,
        source: torch.Tensor,
        axis: int,
        args: Tuple[Any, ...],
        kwargs: Dict[str, Any],
) -> Optional[int]:
    """Where a function that moves elements, as reshape or a mean, brings an axis of its source; None where it is gone.

    The function runs on a tensor of the source's shape that holds the index along this axis.
    """
    if getattr(func, '__name__', '') not in _MOVES or source.shape[axis] < 2:
        return None
    index = torch.arange(source.shape[axis], dtype=torch.float32, device=source.device)
    index = index.view(-1, *(1,) * (source.ndim - 1 - axis)).expand(source.shape)
    args, kwargs = tree_map(lambda leaf: index if leaf is source else leaf, (args, kwargs))
    moved = func(*args, **kwargs)
    moved = moved[0] if isinstance(moved, (tuple, list)) and moved else moved
    if not isinstance(moved, torch.Tensor):
        return None
    varies = [d for d in range(moved.ndim) if moved.shape[d] > 1 and (moved != moved.narrow(d, 0, 1)).any()]
    return varies[0] if len(varies) == 1 else None


class ChannelAxes(TorchFunctionMode):
    """While active, follows the axis of the channels from layer to layer.

    A convolution, batch norm or pooling has them behind the batch, a linear map last. Elementwise functions leave them
    where they are, reshapes and means move them.
    """

    def __init__(self):
        super().__init__()
        self._axes = WeakTensorKeyDictionary()

    def axis(self, x: torch.Tensor) -> int:
        """Axis of the channels of a tensor that was seen; 1 of other maps, the last of other tokens and vectors."""
        known = self._axes.get(x)
        return known if known is not None else default_axis(x.ndim)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        if tensors:
            self._follow(func, args, kwargs, tensors)
        return out

    def _follow(self, func: Callable, args: Any, kwargs: Any, outputs: Sequence[torch.Tensor]) -> None:
        out, name = outputs[0], getattr(func, '__name__', '')
        axis = layer_axis(name, args, out.ndim)
        if axis is None:
            sources = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
            source = next((leaf for leaf in sources if leaf in self._axes), None)
            axis = None if source is None else self._from(func, name, source, args, kwargs, out)
        if axis is not None and 0 <= axis < out.ndim:
            for tensor in outputs:
                if tensor.ndim == out.ndim:
                    self._axes[tensor] = axis

    def _from(self, func, name, source, args, kwargs, out: torch.Tensor) -> Optional[int]:
        axis = self._axes[source]
        if name in _MOVES:
            return moved_axis(func, source, axis, args, kwargs)
        return axis if out.ndim == source.ndim and out.shape[axis] == source.shape[axis] else None
