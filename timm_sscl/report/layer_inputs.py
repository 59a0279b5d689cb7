"""Measure the mean input of every layer with weights while a model runs: how many additions a layer makes."""
from contextlib import ExitStack
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.modules.conv import _ConvNd

from timm_sscl.distributed import world_size
from timm_sscl.neurons import SpikingNeuron

__all__ = ['InputSum', 'LayerInputs']


class InputSum(NamedTuple):
    """Sum of |input| over all calls of one place in a forward.

    It has the axes of the input. Those of length 1 are summed; convolutions and linear layers have one sum per channel.
    """
    total: torch.Tensor
    elements: int  # of each sum

    @property
    def mean(self) -> torch.Tensor:
        return self.total / max(self.elements, 1)


class LayerInputs:
    """Sums of |input| of the layers with weights, by call and channel. Layers that no forward called have none.

    Args:
        model: Model. Layers are its convolutions and linear layers, and other modules without children that have a
            parameter or buffer with two or more axes.
    """

    def __init__(self, model: nn.Module):
        self._root = getattr(model, '_orig_mod', model)
        self._layers = {f'.{name}'.replace('._orig_mod', '')[1:]: module for name, module in model.named_modules()
                        if _has_weights(module)}
        self._calls: Optional[Dict[str, int]] = None  # layer -> number of calls in the forward that runs
        self._sums: Dict[Tuple[str, int], torch.Tensor] = {}  # (layer, call) -> sum, of the input's axes
        self._elements: Dict[Tuple[str, int], int] = {}  # of each sum

    def attach(self, resources: ExitStack) -> None:
        """Add hooks to the layers; `resources` removes them."""
        resources.callback(self._root.register_forward_pre_hook(self._begin).remove)
        resources.callback(self._root.register_forward_hook(self._end, always_call=True).remove)
        for name, layer in self._layers.items():
            resources.callback(layer.register_forward_pre_hook(self._count(name), with_kwargs=True).remove)

    def _begin(self, *_: Any) -> None:
        self._calls = {}

    def _end(self, *_: Any) -> None:
        self._calls = None

    def _count(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Dict[str, Any]) -> None:
            x = next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)), None)
            if x is None:
                return
            key = name, 0
            if self._calls is not None:
                key = name, self._calls.setdefault(name, 0)
                self._calls[name] += 1
            axes = _axes_but_channels(module, x.ndim)
            dtype = torch.float64 if x.device.type != 'mps' else torch.float32
            found = x.detach().abs().sum(axes, keepdim=True, dtype=dtype)
            self._sums[key] = self._sums.get(key, 0) + found
            self._elements[key] = self._elements.get(key, 0) + x.numel() // found.numel()
        return hook

    def sum_over_processes(self) -> None:
        """Add up the sums of all processes, which have all called the same layers."""
        if world_size() > 1:
            for key, total in self._sums.items():
                elements = total.new_tensor(self._elements[key])
                dist.all_reduce(total)
                dist.all_reduce(elements)
                self._elements[key] = round(elements.item())

    def sums(self) -> Dict[str, List[InputSum]]:
        """Return the sums of |input| of every layer that ran, for each of its calls in a forward."""
        found: Dict[str, List[InputSum]] = {}
        for (name, call), total in self._sums.items():
            found.setdefault(name, []).append(InputSum(total, self._elements[name, call]))
        return found


def _axes_but_channels(layer: nn.Module, ndim: int) -> List[int]:
    """Return the axes to sum over: all, or all but the channels of a convolution or linear layer."""
    channels = -1 if isinstance(layer, nn.Linear) else 1 - layer.weight.ndim if isinstance(layer, _ConvNd) else None
    return [axis for axis in range(ndim) if channels is None or axis != ndim + channels]


def _has_weights(module: nn.Module) -> bool:
    if isinstance(module, (nn.Linear, _ConvNd)):
        return True
    return (not isinstance(module, SpikingNeuron) and not any(True for _ in module.children())
            and any(w.ndim > 1 for w in (*module.parameters(recurse=False), *module.buffers(recurse=False))))
