"""Find the channel axis of a tensor by following it through a forward from the layers that made it."""
import re
from typing import Any, Callable, Dict, Optional, Sequence, Tuple

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ['ChannelAxes', 'default_axis', 'moved_axis', 'layer_axis']

_SPATIAL = re.compile(r'(?:conv|conv_transpose|\w*pool)([123])d')  # input (B, C, *spatial) with 1 to 3 spatial axes
_FIRST = {'batch_norm', 'group_norm', 'instance_norm'}  # channels on axis 1
_LAST = {'linear', 'bilinear', 'embedding', 'multi_head_attention_forward'}
_OVER_LAST = {'layer_norm', 'rms_norm'}
_MOVES = {
    'permute', 'transpose', 'transpose_', 'swapaxes', 'swapdims', 'movedim', 'moveaxis', 't', 'adjoint', '__get__',
    'reshape', 'view', 'flatten', 'unflatten', 'squeeze', 'unsqueeze', 'squeeze_', 'unsqueeze_', 'contiguous',
    '__getitem__', 'select', 'narrow', 'index_select', 'expand', 'repeat', 'tile', 'roll', 'flip', 'rot90',
    'mean', 'sum', 'amax', 'amin', 'chunk', 'split', 'unbind', 'tensor_split',
}


def default_axis(ndim: int) -> int:
    """Return the channel axis of a tensor of unknown origin: 1 for maps and volumes, the last axis for tokens and
    vectors.
    """
    return 1 if ndim >= 4 else ndim - 1


def layer_axis(name: str, args: Sequence[Any], ndim: int) -> Optional[int]:
    """Return the channel axis of a function's input and output, or None if the function determines none.

    Args:
        name: Name of the function: 'conv1d', 'linear', ...
        args: Its arguments.
        ndim: Number of axes of the tensor.
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
    """Return the axis of a function's output that corresponds to an axis of its input; None if the axis is lost.

    This is for functions that move elements, such as reshape or mean. The function is run on a tensor of the input's
    shape whose values are the indices along the axis.
    """
    if getattr(func, '__name__', '') not in _MOVES or source.shape[axis] < 2:
        return None
    index = torch.arange(source.shape[axis], dtype=torch.float32, device='cpu' if source.is_meta else source.device)
    index = index.view(-1, *(1,) * (source.ndim - 1 - axis)).expand(source.shape)
    args, kwargs = tree_map(lambda leaf: index if leaf is source else leaf, (args, kwargs))
    moved = func(*args, **kwargs)
    moved = moved[0] if isinstance(moved, (tuple, list)) and moved else moved
    if not isinstance(moved, torch.Tensor):
        return None
    varies = [d for d in range(moved.ndim) if moved.shape[d] > 1 and (moved != moved.narrow(d, 0, 1)).any()]
    return varies[0] if len(varies) == 1 else None


class ChannelAxes(TorchFunctionMode):
    """Torch function mode that follows the channel axis from layer to layer.

    Convolutions, batch norms and pooling have channels on axis 1 (of a batch), linear maps on the last axis.
    Elementwise functions keep the axis; reshapes and means move it.
    """

    def __init__(self):
        super().__init__()
        self._axes = WeakTensorKeyDictionary()

    def axis(self, x: torch.Tensor) -> int:
        """Return the channel axis of a tensor; `default_axis` if the mode did not see where it comes from."""
        known = self.known_axis(x)
        return known if known is not None else default_axis(x.ndim)

    def known_axis(self, x: torch.Tensor) -> Optional[int]:
        """Return the channel axis of a tensor, or None if it is unknown."""
        return self._axes.get(x)

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
