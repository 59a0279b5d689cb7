"""Average pooling of spikes in the stem of a ResNet instead of max pooling, as in the paper's ResNet18 and 34."""
from dataclasses import replace
from typing import Any, Optional, Tuple, cast

import torch.nn as nn

from timm_sscl.conversion.model import SpikingModule
from timm_sscl.untouched import all_or_nothing

from .base import Variant
from .registry import create_variant, register_variant

__all__ = ['set_stem_pool', 'stem_max_pool', 'has_average_stem_pool', 'AvgStemPool']

_NAME = 'maxpool'  # name of the stem's pooling in timm's and torchvision's ResNets and derived models


class StemAvgPool2d(nn.AvgPool2d):
    """Average over the windows of the stem's max pooling, padding included."""


def _pools(model: nn.Module, kind: type) -> list:
    """Return (name, module) of all modules of a class named 'maxpool'."""
    return [(name, module) for name, module in model.named_modules()
            if name.rpartition('.')[2] == _NAME and type(module) is kind]


def stem_max_pool(model: nn.Module) -> Tuple[str, nn.MaxPool2d]:
    """Return name and module of the only max pooling in a model's stem.

    Raises:
        ValueError: There is none, or it cannot be replaced by an average.
    """
    pools = _pools(model, nn.MaxPool2d)
    if len(pools) != 1 or pools[0][1].dilation not in (1, (1, 1)):
        there = dict(model.named_modules()).get(_NAME)
        raise ValueError(
            f"stem_pool='avg': {type(model).__name__} has no max pooling in its stem to replace "
            + (f"(its '{_NAME}' is {type(there).__name__})." if there is not None else
               f"(a MaxPool2d named '{_NAME}', as timm's ResNets have)."))
    return pools[0]


def has_average_stem_pool(model: nn.Module) -> bool:
    """Return whether set_stem_pool replaced the model's stem pooling."""
    return bool(_pools(model, StemAvgPool2d))


@register_variant('stem_pool', 'avg')
class AvgStemPool(Variant):
    """Replace the stem's max pooling by an average over the same windows."""

    def check(self, model: nn.Module, settings: Any) -> None:
        if not has_average_stem_pool(model):
            stem_max_pool(model)

    def apply(self, model: nn.Module, settings: Any) -> None:
        if not has_average_stem_pool(model):
            # by changing its class, so that name, hooks and the settings of MaxPool2d are kept
            _, pool = stem_max_pool(model)
            pool.__class__ = cast(Any, StemAvgPool2d)
            pool.count_include_pad, pool.divisor_override = True, None

    def remove(self, model: nn.Module) -> None:
        for _, pool in _pools(model, StemAvgPool2d):
            pool.__class__ = nn.MaxPool2d

    def summary(self, model: nn.Module) -> str:
        return 'average pooling instead of max pooling'


@all_or_nothing()
def set_stem_pool(model: nn.Module, kind: Optional[str]) -> nn.Module:
    """Use average pooling in the stem of a ResNet, spiking or not, in place; None restores timm's max pooling.

    MaxPool2d(3, 2, 1) becomes AvgPool2d(3, 2, 1). Neither has weights, so all checkpoints load. An ANN's state_dict
    does not contain which pooling it was trained with; a spiking model's does (convert_to_spiking(stem_pool='avg')).

    Args:
        model: Model with a MaxPool2d named 'maxpool'.
        kind: 'avg' or None.

    Returns:
        The model itself.

    Raises:
        ValueError: kind is neither, or the model has no max pooling in its stem.
    """
    pooling = None if kind is None else create_variant('stem_pool', kind)
    if isinstance(model, SpikingModule):
        model._set_settings(replace(model.settings, stem_pool=kind))
    elif pooling is None:
        AvgStemPool().remove(model)
    else:
        pooling.check(model, None)
        pooling.apply(model, None)
    return model
