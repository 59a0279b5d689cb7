"""Convolutions and linear maps of int8 weights and uint8 inputs by oneDNN."""
from functools import lru_cache
from typing import Any, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode

__all__ = ['Geometry', 'Packed', 'conv2d', 'int8_missing', 'linear', 'pack_conv2d', 'pack_linear', 'quantize_weight',
           'runs_int8']

_TOP = 127  # highest level of a weight


class Geometry(NamedTuple):
    """Geometry of a 2-d convolution."""
    stride: Tuple[int, int]
    padding: Tuple[int, int]
    dilation: Tuple[int, int]
    groups: int


class Packed(NamedTuple):
    """Weights in oneDNN's layout for one shape of a sample. They can neither be copied nor saved."""
    shape: Tuple[int, ...]  # shape of a sample
    zero_point: int
    weight: Any
    zeros: torch.Tensor  # zero points of the weights


def quantize_weight(weight: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Round a weight (O, ...) to int8, symmetrically per output channel.

    Returns:
        Levels from -127 to 127, int8, and the size of a level per output channel, (O,). Their product differs from the
        weight by at most half a level.
    """
    flat = weight.detach().flatten(1).float()
    scale = flat.abs().amax(1) / _TOP
    scale = torch.where(scale == 0, 1., scale)
    return (flat / scale[:, None]).round().clamp(-_TOP, _TOP).to(torch.int8).view(weight.shape), scale


def pack_conv2d(weight: torch.Tensor, scale: torch.Tensor, x: torch.Tensor, zero_point: int, g: Geometry) -> Packed:
    """Pack the int8 weight of a convolution for inputs of x's shape, in which `zero_point` stands for 0."""
    packed = torch.ops.onednn.qconv_prepack(
        weight.contiguous(), scale, 1., zero_point, g.stride, g.padding, g.dilation, g.groups, x.shape)
    return Packed(tuple(x.shape[1:]), zero_point, packed, torch.zeros(len(scale), dtype=torch.int32))


def conv2d(
        x: torch.Tensor,
        unit: float,
        packed: Packed,
        scale: torch.Tensor,
        bias: Optional[torch.Tensor],
        g: Geometry,
) -> torch.Tensor:
    """Return the convolution of unit * (x - zero point), x uint8 and channels_last, in float32 and channels_last."""
    return torch.ops.onednn.qconv2d_pointwise(
        x, unit, packed.zero_point, packed.weight, scale, packed.zeros, bias, g.stride, g.padding, g.dilation,
        g.groups, 1., 0, torch.float32, 'none', [], '')


def pack_linear(weight: torch.Tensor, scale: torch.Tensor, x: torch.Tensor, zero_point: int) -> Packed:
    """Pack the int8 weight of a linear map for inputs of x's shape, in which `zero_point` stands for 0."""
    packed = torch.ops.onednn.qlinear_prepack(weight.contiguous(), x.shape)
    return Packed(tuple(x.shape[1:]), zero_point, packed, torch.zeros(len(scale), dtype=torch.int32))


def linear(
        x: torch.Tensor,
        unit: float,
        packed: Packed,
        scale: torch.Tensor,
        bias: Optional[torch.Tensor],
) -> torch.Tensor:
    """Return the linear map of unit * (x - zero point), x uint8, in float32."""
    return torch.ops.onednn.qlinear_pointwise(
        x, unit, packed.zero_point, packed.weight, scale, packed.zeros, bias, 1., 0, torch.float32, 'none', [], '')


@lru_cache(maxsize=None)
def int8_missing() -> Optional[str]:
    """Return why int8 inference is not available on this machine; None if it is.

    A small convolution and a linear map of integers are tried. Their results must be exact.
    """
    if not torch.backends.mkldnn.is_available():
        return 'this build of torch has no oneDNN'
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-_TOP, _TOP + 1, (8, 16, 3, 3), generator=generator, dtype=torch.int8)
    x = torch.randint(0, 129, (2, 16, 5, 5), generator=generator, dtype=torch.uint8)
    ones, g = torch.ones(8), Geometry((1, 1), (1, 1), (1, 1), 1)
    x = x.contiguous(memory_format=torch.channels_last)
    tokens, matrix = x[:, :, 0, 0].contiguous(), weight[:, :, 0, 0].contiguous()
    try:
        with torch.no_grad():
            of_images = conv2d(x, 1., pack_conv2d(weight, ones, x, 1, g), ones, None, g)
            of_tokens = linear(tokens, 1., pack_linear(matrix, ones, tokens, 1), ones, None)
            pooled = torch.ops.quantized.max_pool2d(x, [2, 2], [2, 2], [0, 0], [1, 1], False)
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        return f'torch {torch.__version__} on this CPU: {" ".join(str(error).split())[:200]}'
    expected = F.conv2d(x.double() - 1, weight.double(), padding=1), F.linear(tokens.double() - 1, matrix.double())
    if not (torch.equal(of_images.double(), expected[0]) and torch.equal(of_tokens.double(), expected[1])
            and torch.equal(pooled.double(), F.max_pool2d(x.double(), 2))):
        return f'torch {torch.__version__} on this CPU computes integer convolutions inexactly'
    return None


def runs_int8(x: torch.Tensor) -> bool:
    """Return whether a layer runs its int8 kernel on x: an ordinary tensor on the CPU, outside of tracing, compilation
    and dispatch modes.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) is not torch.Tensor:
        return False
    return x.device.type == 'cpu' and _get_current_dispatch_mode() is None and int8_missing() is None
