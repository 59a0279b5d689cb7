"""SEW (Fang et al. 2021): residual blocks that join spikes, after the last neuron."""
from dataclasses import dataclass
from typing import Any, Set

import torch
import torch.nn as nn

from timm_sscl.class_swap import Mixin
from timm_sscl.knobs import knob
from timm_sscl.neurons import SpikingNeuron

from .base import VariantSettings
from .registry import register_variant
from .resnet_blocks import ResidualVariant, add_neuron, last_act, residual_branch

__all__ = ['SpikeElementWiseBlock', 'SEW', 'CONNECT']

CONNECT = 'add', 'and', 'iand'


class SpikeElementWiseBlock(Mixin):
    """Mixin for a BasicBlock or Bottleneck: g(neuron(branch(x)), shortcut(x)).

    With S from the branch and I from the shortcut, g is S + I ('add'), S * I ('and') or I * (1 - S) ('iand').

    Attributes:
        connect: Which g.
        joins_spikes: Tells norm variants that no currents are added here.
    """
    connect: str
    joins_spikes = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spikes = getattr(self, last_act(self))(residual_branch(self, x))
        if self.drop_path is not None:
            spikes = self.drop_path(spikes)
        shortcut = x if self.downsample is None else self.downsample(x)
        if self.connect == 'add':
            return spikes + shortcut
        return spikes * shortcut if self.connect == 'and' else shortcut * (1 - spikes)


@register_variant('residual', 'sew')
class SEW(ResidualVariant):
    """Move the last neuron of each block before the sum, and add a neuron after the downsampling of each shortcut.

    The sums are whole numbers up to the number of blocks in a stage plus 1 ('add'), or spikes. Stochastic depth scales
    the branch by 1 / (1 - p) in training. A last norm whose scale starts at zero makes the block the identity with
    'add' and 'iand'; `calibrate` does not change it. The authors train integrate-and-fire neurons with a threshold of
    1.
    """
    mixin = SpikeElementWiseBlock
    label = 'SEW'
    changes_state = True

    @dataclass(frozen=True)
    class Settings(VariantSettings):
        connect: str = knob('add', 'how spikes of branch and shortcut join: add, and, iand')

        def check(self) -> None:
            if self.connect not in CONNECT:
                raise ValueError(f'connect={self.connect!r}: must be one of {", ".join(CONNECT)}.')

    @property
    def connect(self) -> str:
        return self.settings.connect

    def check_block(self, name: str, block: nn.Module) -> None:
        if block.downsample is not None and not isinstance(block.downsample, nn.Sequential):
            raise ValueError(f'{self}: {name}.downsample is a {type(block.downsample).__name__}, to which no neuron '
                             f'can be added; it has to be an nn.Sequential.')
        if self.connect != 'add' and bool(getattr(block.drop_path, 'drop_prob', 0)):
            raise ValueError(f"{self}: connect='{self.connect}' multiplies spikes, which stochastic depth would scale "
                             f"in {name}; use connect='add', or create the model with drop_path_rate=0.")

    def set_up(self, model: nn.Module, block: nn.Module, settings: Any) -> None:
        block.connect = self.connect
        if block.downsample is not None and not isinstance(block.downsample[-1], SpikingNeuron):
            add_neuron(model, block.downsample, str(len(block.downsample)), self, settings)

    def tear_down(self, block: nn.Module) -> None:
        del block.connect
        if block.downsample is not None and isinstance(block.downsample[-1], SpikingNeuron):
            del block.downsample[-1]

    def zeros_stay(self, model: nn.Module) -> Set[str]:
        return set() if self.connect == 'and' else super().zeros_stay(model)
