"""Layers of a deployed model: int8 maps, pooling of levels, and neurons that write levels.

Between these layers a tensor of uint8 or int8 holds levels k, and a float tensor holds values k / parts. Each layer
takes both.
"""
from typing import Any, Dict, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F

from timm_sscl.class_swap import Mixin

from .int8 import Geometry, Packed, conv2d, linear, pack_conv2d, pack_linear, quantize_weight, runs_int8
from .levels import Levels

__all__ = ['Int8Conv2d', 'Int8Linear', 'LevelAvgPool', 'LevelMaxPool', 'LevelNeuron']


class _Int8Layer(nn.Module):
    """Base of maps with int8 weights, one scale per output channel, whose input has whole levels.

    The state dict holds weight (int8), weight_scale and bias. oneDNN's packed copy of the weight is made at the first
    call and again when the shape of a sample changes. It is neither copied nor saved. Where int8 kernels are missing,
    and in torch.compile and torch.export, the layer computes with weight * weight_scale in float32.

    Args:
        weight: Weight (O, ...), float32.
        bias: Bias (O,) or None.
        levels: Levels of the input.
    """

    def __init__(self, weight: torch.Tensor, bias: Optional[torch.Tensor], levels: Levels):
        super().__init__()
        self.weight: torch.Tensor
        self.weight_scale: torch.Tensor
        quantized, scale = quantize_weight(weight)
        self.register_buffer('weight', quantized)
        self.register_buffer('weight_scale', scale)
        self.register_buffer('bias', None if bias is None else bias.detach().float().clone())
        self.levels = levels
        self._packed: Optional[Packed] = None

    def float_weight(self) -> torch.Tensor:
        """Return the weight as it is after rounding, in float32."""
        return self.weight.float() * self.weight_scale.float().view(-1, *(1,) * (self.weight.ndim - 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            raise RuntimeError(f'{type(self).__name__} has no gradients; a deployed model is for inference. Call '
                               f'eval(), or train the model that it was made of.')
        if not runs_int8(x):
            values = x if x.is_floating_point() else x.to(self.weight_scale.dtype) / self.levels.parts
            return self.float_map(values)
        x = self._as_uint8(x)
        packed = self._packed
        if packed is None or packed.shape != x.shape[1:]:
            packed = self._packed = self.pack(x, -min(self.levels.low, 0))
        return self.int8_map(x, packed)

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

    def float_map(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def pack(self, x: torch.Tensor, zero_point: int) -> Packed:
        raise NotImplementedError

    def int8_map(self, x: torch.Tensor, packed: Packed) -> torch.Tensor:
        raise NotImplementedError

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._packed = None

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._packed = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> Dict[str, Any]:
        return {**self.__dict__, '_packed': None}

    def extra_repr(self) -> str:
        return f'{tuple(self.weight.shape)}, input {self.levels}'


class Int8Conv2d(_Int8Layer):
    """2-d convolution with int8 weights; `_Int8Layer` has the arguments, `geometry` is stride, padding and so on."""

    def __init__(self, weight: torch.Tensor, bias: Optional[torch.Tensor], levels: Levels, geometry: Geometry):
        super().__init__(weight, bias, levels)
        self.geometry = geometry

    def float_map(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.float_weight(), self.bias, *self.geometry)

    def pack(self, x: torch.Tensor, zero_point: int) -> Packed:
        return pack_conv2d(self.weight, self.weight_scale, x, zero_point, self.geometry)

    def int8_map(self, x: torch.Tensor, packed: Packed) -> torch.Tensor:
        return conv2d(x, 1 / self.levels.parts, packed, self.weight_scale, self.bias, self.geometry)


class Int8Linear(_Int8Layer):
    """Linear map with int8 weights."""

    def float_map(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.float_weight(), self.bias)

    def pack(self, x: torch.Tensor, zero_point: int) -> Packed:
        return pack_linear(self.weight, self.weight_scale, x, zero_point)

    def int8_map(self, x: torch.Tensor, packed: Packed) -> torch.Tensor:
        return linear(x, 1 / self.levels.parts, packed, self.weight_scale, self.bias)


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
