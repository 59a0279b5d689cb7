"""Translate convolutions, linear maps, pooling and flattening to nodes of NIR and back."""
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
import torch
import torch.nn as nn

from timm_sscl.conversion.finding.forward_trace import RESHAPES, Call

from .extra import from_extra
from .nir_neurons import Refused

__all__ = ['LAYERS', 'layer_nodes', 'read_layer']

# function -> why NIR has no node for it
_REASONS = {
    'max_pool2d': "NIR has no max pooling; train with average pooling (set_stem_pool(model, 'avg') in a ResNet)",
    'adaptive_max_pool2d': 'NIR has no max pooling',
    'scaled_dot_product_attention': 'NIR has no attention',
    'softmax': 'NIR has no softmax, which attention needs',
    'batch_norm': 'a batch norm that fold_norms cannot fold, and NIR has no norms',
    'layer_norm': 'NIR has no norms',
    'group_norm': 'NIR has no norms',
    'chunk': 'weights per timestep (a folded norm), or parts of channels: NIR has no node for either',
    'pad': 'NIR has no padding by itself',
    'cat': 'NIR has no concatenation',
    'mul': 'NIR has no product of two tensors',
}
_ARGUMENTS = {
    'conv1d': ('input', 'weight', 'bias', 'stride', 'padding', 'dilation', 'groups'),
    'conv2d': ('input', 'weight', 'bias', 'stride', 'padding', 'dilation', 'groups'),
    'linear': ('input', 'weight', 'bias'),
    'avg_pool2d': ('input', 'kernel_size', 'stride', 'padding', 'ceil_mode', 'count_include_pad', 'divisor_override'),
    'adaptive_avg_pool2d': ('input', 'output_size'),
    'mean': ('input', 'dim', 'keepdim'),
}
LAYERS = _ARGUMENTS.keys() | RESHAPES


def layer_nodes(call: Call) -> List[Any]:
    """Return the NIR nodes of one call of a function, in order; none if it returns its input.

    Raises:
        Refused: NIR has no node for it.
    """
    name, x, out = call.name, call.args[0] if call.args else call.kwargs.get('input'), call.out
    if name not in LAYERS or not isinstance(x, torch.Tensor) or not isinstance(out, torch.Tensor):
        raise Refused(_REASONS.get(name.strip('_'), 'NIR has no node for it'))
    if name in RESHAPES:
        return _reshape(name, x, out)
    given = {**dict(zip(_ARGUMENTS[name], call.args)), **call.kwargs}
    if name in ('conv1d', 'conv2d'):
        return [_convolution(given, x, int(name[4]))]
    if name == 'linear':
        return [_linear(given, x)]
    return _pooling(name, given, x, out)


def _reshape(name: str, x: torch.Tensor, out: torch.Tensor) -> List[Any]:
    if x.shape == out.shape and name not in ('permute', 'transpose', 'movedim'):
        return []
    if name in ('permute', 'transpose', 'movedim') or out.ndim != 2 or len(out) != len(x):
        raise Refused(f'{tuple(x.shape[1:])} becomes {tuple(out.shape[1:])}; NIR has Flatten only')
    return [_flatten(x.shape[1:])]


def _flatten(shape: Tuple[int, ...]) -> Any:
    # axes from the end mean the same with and without a batch axis, about which importers differ
    return from_extra('nir').Flatten({'input': np.array(shape)}, start_dim=-len(shape), end_dim=-1)


def _convolution(given: Dict[str, Any], x: torch.Tensor, ndim: int) -> Any:
    nir: Any = from_extra('nir')
    weight, bias = given['weight'], given.get('bias')
    if given.get('groups', 1) != 1:
        raise Refused(f"groups={given['groups']}: NIR counts the input channels of one group, and the tools that read "
                      f'it refuse it or fail')
    padding = given.get('padding', 0)
    if isinstance(padding, str) and padding != 'valid':
        raise Refused(f"padding='{padding}': give it in numbers")
    stride, padding, dilation = (_numbers(value, ndim) for value in (
        given.get('stride', 1), 0 if padding == 'valid' else padding, given.get('dilation', 1)))
    if len(set(weight.shape[2:])) != 1:
        raise Refused(f'kernel of {tuple(weight.shape[2:])}: NIR computes the shape behind square kernels only')
    zeros = torch.zeros(len(weight), dtype=weight.dtype)
    arrays = dict(weight=_array(weight), bias=_array(zeros if bias is None else bias), groups=1)
    if ndim == 1:
        return nir.Conv1d(x.shape[2], stride=stride[0], padding=padding[0], dilation=dilation[0], **arrays)
    return nir.Conv2d(tuple(x.shape[2:]), stride=stride, padding=padding, dilation=dilation, **arrays)


def _linear(given: Dict[str, Any], x: torch.Tensor) -> Any:
    nir: Any = from_extra('nir')
    if x.ndim != 2:
        raise Refused(f"a linear map of {tuple(x.shape[1:])}: NIR's takes a vector, not tokens or maps")
    bias = given.get('bias')
    if bias is None:
        return nir.Linear(_array(given['weight']))
    return nir.Affine(_array(given['weight']), _array(bias))


def _pooling(name: str, given: Dict[str, Any], x: torch.Tensor, out: torch.Tensor) -> List[Any]:
    nir: Any = from_extra('nir')
    if x.ndim != 4:
        raise Refused(f'pooling of {tuple(x.shape[1:])}: NIR pools maps (C, H, W) only')
    if name == 'avg_pool2d':
        size, padding = _numbers(given['kernel_size'], 2), _numbers(given.get('padding', 0), 2)
        stride = _numbers(given.get('stride') or size, 2)
        whole = tuple((n + 2 * p - k) // s + 1 for n, p, k, s in zip(x.shape[2:], padding, size, stride))
        if whole != tuple(out.shape[2:]) or (any(padding) and not given.get('count_include_pad', True)):
            raise Refused('its windows reach beyond the map (ceil_mode), or do not count their padding')
        divisor = given.get('divisor_override')
        if divisor not in (None, 1):
            raise Refused(f'divisor_override={divisor}: NIR has the mean and the sum')
        arrays = np.array(size), np.array(stride), np.array(padding)
        return [nir.AvgPool2d(*arrays) if divisor is None else nir.SumPool2d(*arrays)]
    if name == 'mean':
        dims = given.get('dim')
        if not isinstance(dims, (tuple, list)) or sorted(d % 4 for d in dims) != [2, 3]:
            raise Refused(f'mean over the axes {dims}; NIR has the mean over height and width')
    target = (1, 1) if name == 'mean' else tuple(out.shape[2:])
    if any(n % m for n, m in zip(x.shape[2:], target)):
        raise Refused(f'adaptive pooling of {tuple(x.shape[2:])} to {target}, with windows of several sizes')
    window = np.array([n // m for n, m in zip(x.shape[2:], target)])
    pool = nir.AvgPool2d(window, window.copy(), np.zeros(2, dtype=int))
    return [pool] if out.ndim == 4 else [pool, _flatten((x.shape[1], 1, 1))]


def _numbers(value: Any, ndim: int) -> Tuple[int, ...]:
    values = tuple(int(v) for v in np.atleast_1d(np.asarray(value)))
    return values * ndim if len(values) == 1 else values


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy().copy()


# ---- back

def read_layer(node: Any, shape: Optional[Tuple[int, ...]]) -> nn.Module:
    """Return the layer of a node that is no neuron.

    Args:
        node: The node.
        shape: Shape of a sample of its input, if known.

    Raises:
        Refused: There is none.
    """
    kind = type(node).__name__
    if kind in ('Affine', 'Linear'):
        if node.weight.ndim != 2:
            raise Refused(f'weight of shape {node.weight.shape}: must have two axes')
        linear = nn.Linear(node.weight.shape[1], node.weight.shape[0], bias=kind == 'Affine')
        return _with_weights(linear, node.weight, node.bias if kind == 'Affine' else None)
    if kind in ('Conv1d', 'Conv2d'):
        return _read_convolution(node, int(kind[4]))
    if kind in ('AvgPool2d', 'SumPool2d'):
        window: List[Any] = [_numbers(value, 2) for value in (node.kernel_size, node.stride, node.padding)]
        if kind == 'AvgPool2d' and shape is not None and window[0] == tuple(shape[1:]) and not any(window[2]):
            return nn.AdaptiveAvgPool2d(1)  # sums in the order that classifiers' global pooling does
        return nn.AvgPool2d(window[0], window[1], window[2], divisor_override=1 if kind == 'SumPool2d' else None)
    if kind == 'Flatten':
        return nn.Flatten(*(int(d) + 1 if d >= 0 else int(d) for d in (node.start_dim, node.end_dim)))
    raise Refused('not supported; read are Conv1d, Conv2d, Affine, Linear, AvgPool2d, SumPool2d, Flatten, IF and LIF')


def _read_convolution(node: Any, ndim: int) -> nn.Module:
    groups = int(np.asarray(node.groups))
    padding: Any = node.padding if isinstance(node.padding, str) else _numbers(node.padding, ndim)
    options = dict(stride=_numbers(node.stride, ndim), padding=padding, dilation=_numbers(node.dilation, ndim))
    layer = (nn.Conv1d, nn.Conv2d)[ndim - 1](
        node.weight.shape[1] * groups, len(node.weight), node.weight.shape[2:], groups=groups, **options)
    return _with_weights(layer, node.weight, node.bias)


def _with_weights(layer: Any, weight: np.ndarray, bias: Optional[np.ndarray]) -> nn.Module:
    for name, value in (('weight', weight), ('bias', bias)):
        if value is not None:
            setattr(layer, name, nn.Parameter(torch.from_numpy(np.array(value))))
    return layer
