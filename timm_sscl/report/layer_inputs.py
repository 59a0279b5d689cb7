"""Measure the mean input of every layer with weights while a model runs: how many additions a layer makes."""
from contextlib import ExitStack
from typing import Any, Callable, Dict

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.modules.conv import _ConvNd

from timm_sscl.distributed import world_size
from timm_sscl.neurons import SpikingNeuron

__all__ = ['LayerInputs']


class LayerInputs:
    """Sums of |input| of the layers with weights. Layers that no forward called have none.

    Args:
        model: Model. Layers are its convolutions and linear layers, and other modules without children that have a
            parameter with two or more axes.
    """

    def __init__(self, model: nn.Module):
        self._layers = {name.replace('_orig_mod.', ''): module for name, module in model.named_modules()
                        if _has_weights(module)}
        self._sums: Dict[str, torch.Tensor] = {}
        self._elements: Dict[str, int] = {}

    def attach(self, resources: ExitStack) -> None:
        """Add hooks to the layers; `resources` removes them."""
        for name, layer in self._layers.items():
            resources.callback(layer.register_forward_pre_hook(self._count(name)).remove)

    def _count(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            if args and isinstance(args[0], torch.Tensor):
                x = args[0].detach()
                dtype = torch.float64 if x.device.type != 'mps' else torch.float32
                self._sums[name] = self._sums.get(name, 0) + x.abs().sum(dtype=dtype)
                self._elements[name] = self._elements.get(name, 0) + x.numel()
        return hook

    def sum_over_processes(self) -> None:
        """Add up the sums of all processes, which have all called the same layers."""
        if world_size() > 1:
            for name, total in self._sums.items():
                elements = torch.full_like(total, self._elements[name])
                dist.all_reduce(total)
                dist.all_reduce(elements)
                self._elements[name] = round(elements.item())

    def means(self) -> Dict[str, float]:
        """Return the mean |input| of every layer that ran."""
        return {name: total.item() / self._elements[name] for name, total in self._sums.items() if self._elements[name]}


def _has_weights(module: nn.Module) -> bool:
    if isinstance(module, (nn.Linear, _ConvNd)):
        return True
    return (not isinstance(module, SpikingNeuron) and not any(True for _ in module.children())
            and any(p.ndim > 1 for p in module.parameters(recurse=False)))
