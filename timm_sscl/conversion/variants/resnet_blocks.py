"""What the residual variants have in common: they change the forward of timm's BasicBlock and Bottleneck."""
from typing import Any, Dict, Iterator, List, Set, Tuple, Type

import torch
import torch.nn as nn

from timm.models.resnet import BasicBlock, Bottleneck, ResNet

from timm_sscl.class_swap import Mixin, mix_in, take_out
from timm_sscl.conversion.plan import new_neuron
from timm_sscl.neurons import SpikingNeuron

from .base import Variant, VariantRecord

__all__ = ['ResidualVariant', 'residual_branch', 'last_act', 'last_norm', 'add_neuron', 'STAGES']

STAGES = 'layer1', 'layer2', 'layer3', 'layer4'


def _own_class(module: nn.Module) -> type:
    """A module's class without mixins."""
    cls = type(module)
    while hasattr(cls, 'mixed'):
        cls = cls.mixed[1]
    return cls


def _is_block(module: nn.Module) -> bool:
    return _own_class(module).forward in (BasicBlock.forward, Bottleneck.forward)


def last_act(block: nn.Module) -> str:
    """Name of a block's last activation, which timm runs after the sum."""
    return 'act3' if hasattr(block, 'conv3') else 'act2'


def last_norm(block: nn.Module) -> str:
    """Name of the last norm of a block's residual branch."""
    return 'bn3' if hasattr(block, 'conv3') else 'bn2'


def residual_branch(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A block's residual branch as timm runs it, up to the last norm and the attention behind it."""
    if hasattr(block, 'conv3'):
        x = block.act1(block.bn1(block.conv1(x)))
        x = block.aa(block.act2(block.drop_block(block.bn2(block.conv2(x)))))
        x = block.bn3(block.conv3(x))
    else:
        x = block.aa(block.act1(block.drop_block(block.bn1(block.conv1(x)))))
        x = block.bn2(block.conv2(x))
    return x if block.se is None else block.se(x)


def add_neuron(model: nn.Module, parent: nn.Module, name: str, by: Any, settings: Any) -> None:
    """Give a module a child that is a neuron with the model's settings; one that is there stays."""
    if not isinstance(parent._modules.get(name), SpikingNeuron):
        like = next(model.parameters())
        neuron = new_neuron(settings, model.training, like)
        neuron.keep_factors(like)
        neuron.added_by = str(by)
        parent.add_module(name, neuron)


class ResidualVariant(Variant):
    """Base of a variant that puts a mixin in front of every residual block of a ResNet of timm's.

    The blocks have to be timm's BasicBlock and Bottleneck, or share their forward, and the model has to run its stages
    as timm's ResNet does. All others are refused by name.

    Attributes:
        mixin: The mixin.
        label: What a report calls such a block.
    """
    mixin: Type[Mixin]
    label = ''

    def check(self, model: nn.Module, settings: Any) -> None:
        cls = _own_class(model)
        if not issubclass(cls, ResNet) or cls.forward_features is not ResNet.forward_features:
            raise ValueError(f"{self}: {cls.__name__} is no ResNet with timm's forward, whose blocks this changes.")
        for name in STAGES:
            for child, block in getattr(model, name).named_children():
                if not _is_block(block) and not isinstance(block, SpikingNeuron):
                    raise ValueError(f"{self}: {name}.{child} is a {_own_class(block).__name__}; only blocks with the "
                                     f"forward of timm's BasicBlock or Bottleneck are known.")
                if isinstance(block, nn.Module) and _is_block(block):
                    self.check_block(f'{name}.{child}', block)

    def check_block(self, name: str, block: nn.Module) -> None:
        """Raise ValueError where a block cannot be changed."""

    def blocks(self, model: nn.Module) -> Iterator[Tuple[str, nn.Module]]:
        """Names and modules of the blocks."""
        for stage in STAGES:
            for child, block in getattr(model, stage).named_children():
                if _is_block(block):
                    yield f'{stage}.{child}', block

    def apply(self, model: nn.Module, settings: Any) -> None:
        for name, block in self.blocks(model):
            if not isinstance(getattr(block, last_act(block)), SpikingNeuron):
                raise ValueError(f'{self}: {name}.{last_act(block)} is no neuron (include, exclude); it has to be one.')
            mix_in(block, self.mixin)
            self.set_up(model, block, settings)

    def set_up(self, model: nn.Module, block: nn.Module, settings: Any) -> None:
        """Give a block what the mixin reads; again where it has it already."""

    def remove(self, model: nn.Module) -> None:
        for _, block in self.blocks(model):
            if isinstance(block, self.mixin):
                self.tear_down(block)
                take_out(block, self.mixin)

    def tear_down(self, block: nn.Module) -> None:
        """Take away what `set_up` gave."""

    def records(self, model: nn.Module) -> List[VariantRecord]:
        return [VariantRecord(name, _own_class(block).__name__, self.label) for name, block in self.blocks(model)
                if isinstance(block, self.mixin)]

    def summary(self, model: nn.Module) -> str:
        kinds: Dict[str, int] = {}
        for record in self.records(model):
            kinds[record.was] = kinds.get(record.was, 0) + 1
        return f'{self.label}: ' + ', '.join(f'{n} {kind}' for kind, n in kinds.items())

    def zeros_stay(self, model: nn.Module) -> Set[str]:
        return {f'{name}.{last_norm(block)}' for name, block in self.blocks(model)}
