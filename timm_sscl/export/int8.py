"""Convolutions and linear maps of int8 weights and uint8 inputs by oneDNN. A weight of more bits is a sum of planes.

A plane is an int8 tensor of the weight's shape. The weight is scale * (plane 0 + plane 1 / 254 + plane 2 / 254^2), with
one scale per output channel. The products of every plane with whole inputs are exact; their sums are float32.
"""
from functools import lru_cache
from typing import Any, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode

from timm_sscl.cpu_features import int8_instructions

__all__ = ['Geometry', 'Packed', 'columns', 'conv2d', 'int8_missing', 'int8_pays', 'join_planes', 'linear',
           'pack_conv2d', 'pack_linear', 'runs_int8', 'split_weight', 'wants_columns']

_TOP = 127  # highest level of a weight
_BASE = 2 * _TOP  # what is left after a plane is at most half a level of it
# instructions -> planes -> least number of inputs of an output for which they take less time than one float32 map
_PAYS = {'AMX': {2: 64, 3: 128}, 'VNNI': {2: 256, 3: 1152}, '': {2: 4608}}
_NARROW = 4  # maps up to this width leave most rows of oneDNN's convolution kernels empty


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
    planes: Tuple[Any, ...]
    scales: Tuple[torch.Tensor, ...]  # of the planes, per output channel
    zeros: torch.Tensor  # zero points of the weights


def split_weight(weight: torch.Tensor, planes: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """Round a weight (O, ...) to planes of int8, symmetrically per output channel.

    Args:
        weight: Weight.
        planes: Largest number of planes. Fewer are returned if they are exact, at least one.

    Returns:
        Planes (P, O, ...) of levels from -127 to 127, int8, and the size of a level of the first per output channel,
        (O,). A level of a plane is 1 / 254 of one of the plane before. The weight that `join_planes` makes of them
        differs from the given one by at most half a level of the last plane.
    """
    flat = weight.detach().flatten(1).double()
    scale = (flat.abs().amax(1) / _TOP).float()
    scale = torch.where(scale == 0, 1., scale)
    rest = flat / scale.double()[:, None]
    levels: List[torch.Tensor] = []
    while not levels or (len(levels) < planes and rest.any()):
        level = rest.round().clamp(-_TOP, _TOP)
        levels.append(level.to(torch.int8).view(weight.shape))
        rest = (rest - level) * _BASE
    return torch.stack(levels), scale


def join_planes(planes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the weight (O, ...) that planes (P, O, ...) and scales (O,) stand for, in the dtype of the scales."""
    weight = planes[-1].double()
    for plane in reversed(planes[:-1]):
        weight = plane.double() + weight / _BASE
    return (weight * scale.double().view(-1, *(1,) * (weight.ndim - 1))).to(scale.dtype)


def _pack(planes: torch.Tensor, scale: torch.Tensor, x: torch.Tensor, zero_point: int, prepack: Any) -> Packed:
    scales = tuple(scale.float() / _BASE ** i for i in range(len(planes)))
    packed = tuple(prepack(plane.contiguous(), s) for plane, s in zip(planes, scales))
    return Packed(tuple(x.shape[1:]), zero_point, packed, scales, torch.zeros(len(scale), dtype=torch.int32))


def pack_conv2d(planes: torch.Tensor, scale: torch.Tensor, x: torch.Tensor, zero_point: int, g: Geometry) -> Packed:
    """Pack the planes of a convolution for inputs of x's shape, in which `zero_point` stands for 0."""
    def prepack(plane: torch.Tensor, s: torch.Tensor) -> Any:
        return torch.ops.onednn.qconv_prepack(
            plane, s, 1., zero_point, g.stride, g.padding, g.dilation, g.groups, x.shape)
    return _pack(planes, scale, x, zero_point, prepack)


def pack_linear(planes: torch.Tensor, scale: torch.Tensor, x: torch.Tensor, zero_point: int) -> Packed:
    """Pack the planes of a linear map for inputs of x's shape, in which `zero_point` stands for 0."""
    return _pack(planes, scale, x, zero_point, lambda plane, s: torch.ops.onednn.qlinear_prepack(plane, x.shape))


def _sum_planes(packed: Packed, bias: Optional[torch.Tensor], run: Any) -> torch.Tensor:
    """Return the sum of run(plane, scales, bias) over the planes."""
    out = run(packed.planes[0], packed.scales[0], bias)
    for plane, scale in zip(packed.planes[1:], packed.scales[1:]):
        out.add_(run(plane, scale, None))
    return out


def conv2d(x: torch.Tensor, unit: float, packed: Packed, bias: Optional[torch.Tensor], g: Geometry) -> torch.Tensor:
    """Return the convolution of unit * (x - zero point), x uint8 and channels_last, in float32 and channels_last."""
    def run(plane: Any, scale: torch.Tensor, bias: Optional[torch.Tensor]) -> torch.Tensor:
        return torch.ops.onednn.qconv2d_pointwise(
            x, unit, packed.zero_point, plane, scale, packed.zeros, bias, g.stride, g.padding, g.dilation, g.groups,
            1., 0, torch.float32, 'none', [], '')
    return _sum_planes(packed, bias, run)


def linear(x: torch.Tensor, unit: float, packed: Packed, bias: Optional[torch.Tensor]) -> torch.Tensor:
    """Return the linear map of unit * (x - zero point), x uint8, in float32."""
    def run(plane: Any, scale: torch.Tensor, bias: Optional[torch.Tensor]) -> torch.Tensor:
        return torch.ops.onednn.qlinear_pointwise(
            x, unit, packed.zero_point, plane, scale, packed.zeros, bias, 1., 0, torch.float32, 'none', [], '')
    return _sum_planes(packed, bias, run)


def wants_columns(x: torch.Tensor, kernel: Sequence[int], g: Geometry) -> bool:
    """Return whether a convolution runs faster as a linear map of its windows: one with a narrow output."""
    return (g.groups == 1 and tuple(kernel) != (1, 1) and int8_instructions() != ''
            and _output_size(x, kernel, g)[1] <= _NARROW)


def _output_size(x: torch.Tensor, kernel: Sequence[int], g: Geometry) -> Tuple[int, int]:
    height, width = ((n + 2 * p - d * (k - 1) - 1) // s + 1
                     for n, k, s, p, d in zip(x.shape[2:], kernel, g.stride, g.padding, g.dilation))
    return height, width


def columns(x: torch.Tensor, kernel: Sequence[int], g: Geometry, zero_point: int) -> torch.Tensor:
    """Return the windows of a convolution of x (N, C, H, W), (N, height, width, kernel height * kernel width * C)."""
    height, width = _output_size(x, kernel, g)
    (top, left), (down, right), (row, column) = g.padding, g.stride, g.dilation
    x = F.pad(x, (left, left, top, top), value=zero_point).permute(0, 2, 3, 1).contiguous()
    n, c = len(x), x.shape[3]
    image, line, pixel, one = x.stride()
    windows = x.as_strided((n, height, width, *kernel, c),
                           (image, line * down, pixel * right, line * row, pixel * column, one))
    return windows.reshape(n, height, width, -1)


def int8_pays(planes: int, fan_in: int) -> bool:
    """Return whether a map of int8 planes takes less time on this CPU than in float32; one plane always does.

    Args:
        planes: Number of planes.
        fan_in: Inputs of an output.
    """
    return planes == 1 or fan_in >= _PAYS[int8_instructions()].get(planes, float('inf'))


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
            of_images = conv2d(x, 1., pack_conv2d(weight[None], ones, x, 1, g), None, g)
            of_tokens = linear(tokens, 1., pack_linear(matrix[None], ones, tokens, 1), None)
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
