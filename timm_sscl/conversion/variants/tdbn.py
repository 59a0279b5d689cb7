"""tdBN (Zheng et al. 2020): batch norm over time, batch and space with a scale relative to the threshold."""
from typing import Any, List, Set

import torch
import torch.nn as nn

from timm.layers import BatchNormAct2d

from timm_sscl.class_swap import mixed_class

from .batch_norms import BatchNormOverTime, BatchNormVariant, NormRecord
from .registry import register_variant

__all__ = ['TdBatchNorm', 'TdBN']

_WHERE_BRANCHES_ADD = 0.5 ** 0.5


class TdBatchNorm(BatchNormOverTime):
    """Mixin for a batch norm.

        y = weight * alpha * v_threshold * (x - mean) / sqrt(var + eps) + bias

    In a spiking model the batch axis holds T * B samples, so mean and var of any batch norm are over T, B, H and W.
    Only the factor on the scale is new. It is not a parameter: keys and shapes do not change.
    """
    alpha: float
    v_threshold: float

    @classmethod
    def class_name(cls, base: type) -> str:
        return f'Td{base.__name__}'

    def normalise(self, x: torch.Tensor) -> torch.Tensor:
        return self.batch_norm(x, self.weight * (self.alpha * self.v_threshold), self.bias)

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, alpha={self.alpha:.4g}, v_threshold={self.v_threshold}'


# names in pickles of version 0.1.0
TdBatchNorm1d = mixed_class(TdBatchNorm, nn.BatchNorm1d)
TdBatchNorm2d = mixed_class(TdBatchNorm, nn.BatchNorm2d)
TdBatchNormAct2d = mixed_class(TdBatchNorm, BatchNormAct2d)


def _where_branches_add(model: nn.Module) -> Set[nn.Module]:
    """Return the norms before a sum of branches, in blocks like timm's BasicBlock and Bottleneck.

    These are the last norm of the residual branch (bn2 or bn3) and the norms of the shortcut (downsample).
    """
    found: Set[nn.Module] = set()
    for block in model.modules():
        last = block._modules.get('bn3') or block._modules.get('bn2')
        if (last is not None and 'bn1' in block._modules and hasattr(block, 'downsample')
                and not getattr(block, 'joins_spikes', False)):
            found.update([last, *(block.downsample.modules() if block.downsample is not None else ())])
    return found


@register_variant('norm', 'tdbn')
class TdBN(BatchNormVariant):
    """Turn all batch norms with a scale into tdBN for the neurons' threshold.

    alpha is 1/sqrt(2) where two branches add, in blocks like timm's BasicBlock and Bottleneck: for the last norm of the
    residual branch (bn2 or bn3) and for the norms of the shortcut (downsample). It is 1 for all other norms, and
    everywhere if spikes are added (residual='sew').
    """
    mixin = TdBatchNorm
    label = 'tdBN'
    scales_currents = True

    def apply(self, model: nn.Module, settings: Any) -> None:
        self._added = _where_branches_add(model)
        super().apply(model, settings)

    def set_up(self, norm: nn.Module, settings: Any) -> None:
        norm.alpha = _WHERE_BRANCHES_ADD if norm in self._added else 1.
        norm.v_threshold = settings.threshold()

    def details(self, model: nn.Module, changed: List[NormRecord]) -> str:
        return (f', scale times the threshold {model.settings.threshold():g}, and times 1/sqrt(2) in the '
                f'{sum(record.alpha != 1 for record in changed)} where branches add')
