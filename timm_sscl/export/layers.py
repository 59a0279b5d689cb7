"""Layers of a deployed model: int8 maps, pooling of levels, and neurons that write levels.

Between these layers a tensor of uint8 or int8 holds levels k, and a float tensor holds values k / parts. Each layer
takes both.
"""
from typing import Any, Dict, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F

from timm_sscl.class_swap import Mixin

from .int8 import (
    Geometry, Packed, columns, conv2d, int8_pays, join_planes, linear, pack_conv2d, pack_linear, runs_int8,
    split_weight, wants_columns)
from .levels import Levels

__all__ = ['Int8Conv2d', 'Int8Linear', 'LevelAvgPool', 'LevelMaxPool', 'LevelNeuron']


class _Int8Layer(nn.Module):
    """Base of maps with int8 weights, one scale per output channel, whose input has whole levels.

    The state dict holds weight (int8), weight_rest (P - 1, O, ...; int8; absent if P = 1), weight_scale and bias: the
    planes of split_weight. oneDNN's packed copy is made at the first call and again when the shape of a sample changes.
    It is neither copied nor saved. The layer computes with `float_weight()` in float32 where int8 kernels are missing,
    where its planes take longer than that on this CPU (int8_pays), and in torch.compile and torch.export.

    Args:
        weight: Weight (O, ...), float32.
        bias: Bias (O,) or None.
        levels: Levels of the input.
        planes: Largest number of planes; 3 hold a weight of 24 bits.
    """

    def __init__(self, weight: torch.Tensor, bias: Optional[torch.Tensor], levels: Levels, planes: int = 1):
        super().__init__()
        self.weight: torch.Tensor
        self.weight_rest: Optional[torch.Tensor]
        self.weight_scale: torch.Tensor
        split, scale = split_weight(weight, planes)
        self.register_buffer('weight', split[0].clone())
        self.register_buffer('weight_rest', split[1:].clone() if len(split) > 1 else None)
        self.register_buffer('weight_scale', scale)
        self.register_buffer('bias', None if bias is None else bias.detach().float().clone())
        self.levels = levels
        self._packed: Optional[Packed] = None
        self._float_weight: Optional[torch.Tensor] = None

    @property
    def planes(self) -> torch.Tensor:
        """All planes of the weight, (P, O, ...)."""
        return self.weight[None] if self.weight_rest is None else torch.cat([self.weight[None], self.weight_rest])

    @property
    def runs_planes(self) -> bool:
        """Whether this machine computes the layer in int8."""
        planes = 1 if self.weight_rest is None else 1 + len(self.weight_rest)
        return int8_pays(planes, self.weight[0].numel())

    def float_weight(self) -> torch.Tensor:
        """Return the weight as it is after rounding, in float32."""
        return join_planes(self.planes, self.weight_scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            raise RuntimeError(f'{type(self).__name__} has no gradients; a deployed model is for inference. Call '
                               f'eval(), or train the model that it was made of.')
        if self.weight_scale.dtype != torch.float32:
            raise RuntimeError(f'a deployed model computes in float32, this one was cast to {self.weight_scale.dtype}; '
                               'deploy the model again.')
        if not runs_int8(x):
            return self.float_map(self._as_values(x), self.float_weight())
        if not self.runs_planes:
            if self._float_weight is None:
                self._float_weight = self.float_weight()
            return self.float_map(self._as_values(x), self._float_weight)
        x = self._as_uint8(x)
        packed = self._packed
        if packed is None or packed.shape != x.shape[1:]:
            packed = self._packed = self.pack(x, -min(self.levels.low, 0))
        return self.int8_map(x, packed)

    def _as_values(self, x: torch.Tensor) -> torch.Tensor:
        """Return levels as the values that they stand for."""
        if x.is_floating_point():
            return x
        values = x.to(self.weight_scale.dtype)
        return values if self.levels.parts == 1 else values / self.levels.parts

    def _as_uint8(self, x: torch.Tensor) -> torch.Tensor:
        """Return levels, shifted so that the lowest is at least 0, as contiguous uint8."""
        zero_point, parts = -min(self.levels.low, 0), self.levels.parts
        if x.is_floating_point():
            x = x if parts == 1 else (x * parts).round()
            x = (x + zero_point if zero_point else x).to(torch.uint8)
        elif zero_point:
            x = x + zero_point
        x = x.view(torch.uint8)
        return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.contiguous_format)

    def float_map(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def pack(self, x: torch.Tensor, zero_point: int) -> Packed:
        raise NotImplementedError

    def int8_map(self, x: torch.Tensor, packed: Packed) -> torch.Tensor:
        raise NotImplementedError

    def _forget_copies(self) -> None:
        self._packed = self._float_weight = None

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Load, with the number of planes of the state dict."""
        if f'{prefix}weight' in state_dict:
            rest = state_dict.get(f'{prefix}weight_rest')
            self.weight_rest = None if rest is None else torch.empty_like(rest, device=self.weight.device)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._forget_copies()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._forget_copies()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> Dict[str, Any]:
        return {**self.__dict__, '_packed': None, '_float_weight': None}

    def __setstate__(self, state: Dict[str, Any]) -> None:
        super().__setstate__(state)
        self._float_weight = None
        self._buffers.setdefault('weight_rest', None)  # a file that was written before there were planes

    def extra_repr(self) -> str:
        return f'{tuple(self.weight.shape)}, {8 * len(self.planes)} bits, input {self.levels}'


class Int8Conv2d(_Int8Layer):
    """2-d convolution with int8 weights; `_Int8Layer` has the arguments, `geometry` is stride, padding and so on."""

    def __init__(
            self,
            weight: torch.Tensor,
            bias: Optional[torch.Tensor],
            levels: Levels,
            geometry: Geometry,
            planes: int = 1,
    ):
        super().__init__(weight, bias, levels, planes)
        self.geometry = geometry

    @property
    def kernel(self) -> torch.Size:
        return self.weight.shape[2:]

    def float_map(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, weight, self.bias, *self.geometry)

    def pack(self, x: torch.Tensor, zero_point: int) -> Packed:
        if wants_columns(x, self.kernel, self.geometry):
            rows = self.planes.permute(0, 1, 3, 4, 2).flatten(2)
            windows = columns(x[:1], self.kernel, self.geometry, zero_point)
            return pack_linear(rows, self.weight_scale, windows, zero_point)._replace(shape=tuple(x.shape[1:]))
        return pack_conv2d(self.planes, self.weight_scale, x, zero_point, self.geometry)

    def int8_map(self, x: torch.Tensor, packed: Packed) -> torch.Tensor:
        if wants_columns(x, self.kernel, self.geometry):
            windows = columns(x, self.kernel, self.geometry, packed.zero_point)
            return linear(windows, 1 / self.levels.parts, packed, self.bias).permute(0, 3, 1, 2)
        return conv2d(x, 1 / self.levels.parts, packed, self.bias, self.geometry)


class Int8Linear(_Int8Layer):
    """Linear map with int8 weights."""

    def float_map(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.linear(x, weight, self.bias)

    def pack(self, x: torch.Tensor, zero_point: int) -> Packed:
        return pack_linear(self.planes, self.weight_scale, x, zero_point)

    def int8_map(self, x: torch.Tensor, packed: Packed) -> torch.Tensor:
        return linear(x, 1 / self.levels.parts, packed, self.bias)


class LevelNeuron(Mixin):
    """Mixin for a neuron whose output only layers of levels take: it writes uint8, or int8 for ternary spikes."""
    writes: torch.dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        neuron: Any = self
        if self.training or not runs_int8(x) or (torch.is_grad_enabled() and x.requires_grad):
            return super().forward(x)
        return neuron.run_as(*neuron.currents(x), self.writes).flatten(0, 1)


class LevelMaxPool(Mixin):
    """Mixin for max pooling, of levels as well: an OR of binary spikes.

    Attributes:
        window: Kernel size, stride, padding, dilation (two numbers each) and ceil_mode.
        levels: Levels of the input.
    """
    window: Any
    levels: Levels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_floating_point():
            return super().forward(x)
        low = min(self.levels.low, 0)
        shifted = x if low == 0 else (x - low).view(torch.uint8)
        pooled = torch.ops.quantized.max_pool2d(shifted, *self.window)
        return pooled if low == 0 else pooled.view(torch.int8) + low


class LevelAvgPool(Mixin):
    """Mixin for average pooling without overlap. Of levels k / parts it returns their sums, levels k / (parts * n).

    Attributes:
        window: Height and width.
    """
    window: Any

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if x.is_floating_point() else _sum_pool(x, *self.window)


def _sum_pool(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return the sums of windows of whole levels (N, C, H, W), in x's dtype and channels_last."""
    n, c, rows, columns = x.shape[0], x.shape[1], x.shape[2] // height, x.shape[3] // width
    x = x[:, :, :rows * height, :columns * width].permute(0, 2, 3, 1).contiguous()
    by_row = x.view(n, rows, height, columns * width, c)  # whole rows are added, which vectorises
    x = by_row[:, :, 0]
    for i in range(1, height):
        x = x + by_row[:, :, i]
    by_column = x.reshape(n, rows, columns, width, c)
    x = by_column[:, :, :, 0]
    for i in range(1, width):
        x = x + by_column[:, :, :, i]
    return x.permute(0, 3, 1, 2)
