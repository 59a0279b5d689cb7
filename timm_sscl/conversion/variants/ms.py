"""MS-ResNet (Hu et al. 2021): residual blocks that start with a neuron, with real-valued shortcuts."""
from typing import Any

import torch
import torch.nn as nn

from timm_sscl.class_swap import Mixin
from timm_sscl.neurons import SpikingNeuron

from .registry import register_variant
from .resnet_blocks import STAGES, ResidualVariant, add_neuron, last_act, residual_branch

__all__ = ['MembraneShortcutBlock', 'MS']

_TAIL = 'act'  # child of the last stage: its final neuron


class MembraneShortcutBlock(Mixin):
    """Mixin for a BasicBlock or Bottleneck: shortcut(x) + branch(neuron(x))."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = residual_branch(self, getattr(self, last_act(self))(x))
        if self.drop_path is not None:
            branch = self.drop_path(branch)
        return branch + (x if self.downsample is None else self.downsample(x))


class NoNeuron(nn.Identity):
    """Placeholder for the stem's last neuron, which is stored in its attribute `replaced`."""


@register_variant('residual', 'ms')
class MS(ResidualVariant):
    """Move the last neuron of each block to its start, remove the stem's last neuron, and add one after the last stage.

    Outputs of blocks are real-valued, except the last stage's spikes. The convolutions of the branches receive spikes;
    those of the shortcuts count as multiply-accumulates. timm's max pooling stays. A last norm whose scale starts at
    zero makes the block the identity; `calibrate` does not change it.
    """
    mixin = MembraneShortcutBlock
    label = 'MS'
    changes_state = True

    def apply(self, model: nn.Module, settings: Any) -> None:
        super().apply(model, settings)
        if isinstance(model.act1, SpikingNeuron):
            identity = NoNeuron()
            identity.added_by = str(self)
            identity.__dict__['replaced'] = model.act1  # neither a submodule nor in a checkpoint
            model.act1 = identity
        last = [stage for stage in STAGES if len(getattr(model, stage))][-1]
        add_neuron(model, getattr(model, last), _TAIL, self, settings)

    def summary(self, model: nn.Module) -> str:
        return (f'{super().summary(model)}; values between blocks are real, so that convolutions of shortcuts are '
                f'multiply-accumulates')

    def remove(self, model: nn.Module) -> None:
        super().remove(model)
        if isinstance(model.act1, NoNeuron):
            like = next(model.parameters())
            model.act1 = model.act1.__dict__['replaced'].to(like.device, like.dtype).train(model.training)
        for stage in STAGES:
            getattr(model, stage)._modules.pop(_TAIL, None)
