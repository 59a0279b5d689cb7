"""Common base of residual variants, which change the forward of timm's BasicBlock and Bottleneck."""
from typing import Any, Dict, Iterator, List, Set, Tuple, Type

import torch
import torch.nn as nn

from timm.models.resnet import BasicBlock, Bottleneck, ResNet

from timm_sscl.class_swap import Mixin, mix_in, take_out
from timm_sscl.conversion.finding.plan import new_neuron
from timm_sscl.neurons import SpikingNeuron

from .base import Variant, VariantRecord

__all__ = ['ResidualVariant', 'residual_branch', 'last_act', 'last_norm', 'add_neuron', 'STAGES']

STAGES = 'layer1', 'layer2', 'layer3', 'layer4'


def _own_class(module: nn.Module) -> Type[nn.Module]:
    """Return a module's class without mixins."""
    cls: Any = type(module)
    while hasattr(cls, 'mixed'):
        cls = cls.mixed[1]
    return cls


def _is_block(module: nn.Module) -> bool:
    return _own_class(module).forward in (BasicBlock.forward, Bottleneck.forward)


def last_act(block: nn.Module) -> str:
    """Return the name of a block's last activation, which timm runs after the sum."""
    return 'act3' if hasattr(block, 'conv3') else 'act2'


def last_norm(block: nn.Module) -> str:
    """Return the name of the last norm in a block's residual branch."""
    return 'bn3' if hasattr(block, 'conv3') else 'bn2'


def residual_branch(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Run a block's residual branch as timm does, up to the last norm and the attention after it."""
    if hasattr(block, 'conv3'):
        x = block.act1(block.bn1(block.conv1(x)))
        x = block.aa(block.act2(block.drop_block(block.bn2(block.conv2(x)))))
        x = block.bn3(block.conv3(x))
    else:
        x = block.aa(block.act1(block.drop_block(block.bn1(block.conv1(x)))))
        x = block.bn2(block.conv2(x))
    return x if block.se is None else block.se(x)


def add_neuron(model: nn.Module, parent: nn.Module, name: str, by: Any, settings: Any) -> None:
    """Add a child neuron with the model's settings to a module. An existing one is kept."""
    if not isinstance(parent._modules.get(name), SpikingNeuron):
        like = next(model.parameters())
        neuron = new_neuron(settings, model.training, like)
        neuron.keep_factors(like)
        neuron.added_by = str(by)
        parent.add_module(name, neuron)


class ResidualVariant(Variant):
    """Base of a variant that adds a mixin to every residual block of a timm ResNet.

    Blocks must be timm's BasicBlock or Bottleneck or share their forward, and the model must run its stages as timm's
    ResNet does. Others are refused with an error that names them.

    Attributes:
        mixin: The mixin.
        label: Name of such a block in a report.
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
        """Raise ValueError if a block cannot be changed."""

    def blocks(self, model: nn.Module) -> Iterator[Tuple[str, nn.Module]]:
        """Yield (name, module) of the blocks."""
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
        """Set the attributes of a block that the mixin uses. The block may already have them."""

    def remove(self, model: nn.Module) -> None:
        for _, block in self.blocks(model):
            if isinstance(block, self.mixin):
                self.tear_down(block)
                take_out(block, self.mixin)

    def tear_down(self, block: nn.Module) -> None:
        """Undo `set_up`."""

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
