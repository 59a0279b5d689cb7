"""Detect neuron layers that do not fire during training."""
from typing import Any, Dict, List

import torch
import torch.distributed as dist
import torch.nn as nn

from timm_sscl.distributed import world_size
from timm_sscl.neurons import SpikingNeuron

__all__ = ['SilentLayers']


class SilentLayers:
    """Context manager that records whether every neuron layer fires in the training forwards inside it.

    Each step adds one reduction per layer on the device, without waiting for it. `names` waits for the device.

    Args:
        model: Spiking model, not compiled, since hooks are added to its neurons.

    Examples:
        ```python
        with SilentLayers(model) as layers:
            for images, labels in loader:
                step(images, labels)
            layers.names()  # ['layer4.0.act1']
        ```
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._fired: Dict[str, torch.Tensor] = {}
        self._handles: List[Any] = []

    def __enter__(self) -> 'SilentLayers':
        for name, module in self.model.named_modules():
            if isinstance(module, SpikingNeuron):
                self._handles.append(module.register_forward_hook(self._note(name)))
        return self

    def __exit__(self, *exc) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _note(self, name: str):
        def hook(module, args, spikes):
            if module.training:
                fired = spikes.detach().any()
                self._fired[name] = self._fired[name] | fired if name in self._fired else fired
        return hook

    def names(self) -> List[str]:
        """Return the layers that ran since the last call without a spike on any process. All processes must call this.
        """
        names, fired = list(self._fired), list(self._fired.values())
        self._fired = {}
        if not names:
            return []
        flags = torch.stack([flag.to(fired[0].device) for flag in fired]).to(torch.uint8)
        if world_size() > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        return [name for name, flag in zip(names, flags.tolist()) if not flag]
