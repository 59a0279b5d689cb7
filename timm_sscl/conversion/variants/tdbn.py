"""tdBN (Zheng et al. 2020): batch norm over time, batch and space whose scale counts in units of the threshold."""
from typing import List, NamedTuple, Optional, Set

import torch
import torch.nn as nn
import torch.nn.functional as F

from timm.layers import BatchNormAct2d

from timm_sscl.untouched import all_or_nothing

__all__ = ['TdBatchNorm', 'NormRecord', 'set_norm', 'check_norm', 'scaled_batch_norms', 'norm_records']

_WHERE_BRANCHES_ADD = 0.5 ** 0.5


class TdBatchNorm:
    """Mixin for a batch norm.

        y = weight * alpha * v_threshold * (x - mean) / sqrt(var + eps) + bias

    In a spiking model the batch axis holds T * B samples, so that mean and var are over T, B, H and W as in any batch
    norm there; the factor on the scale is what is new. It is no parameter: keys and shapes stay.
    """
    alpha: float
    v_threshold: float

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._check_input_dim(x)
        momentum = 0. if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1. / float(self.num_batches_tracked)
        by_batch = self.training or (self.running_mean is None and self.running_var is None)
        tracks = not self.training or self.track_running_stats
        x = F.batch_norm(
            x, self.running_mean if tracks else None, self.running_var if tracks else None,
            self.weight * (self.alpha * self.v_threshold), self.bias, by_batch, momentum, self.eps)
        for name in ('drop', 'act'):  # there in a norm with activation
            x = self._modules[name](x) if name in self._modules else x
        return x

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, alpha={self.alpha:.4g}, v_threshold={self.v_threshold}'


class TdBatchNorm1d(TdBatchNorm, nn.BatchNorm1d):
    pass


class TdBatchNorm2d(TdBatchNorm, nn.BatchNorm2d):
    pass


class TdBatchNormAct2d(TdBatchNorm, BatchNormAct2d):
    pass


_TD_CLASS = {
    nn.BatchNorm1d: TdBatchNorm1d, nn.BatchNorm2d: TdBatchNorm2d, BatchNormAct2d: TdBatchNormAct2d}
_PLAIN_CLASS = {td: plain for plain, td in _TD_CLASS.items()}


class NormRecord(NamedTuple):
    """One norm of a model with tdBN."""
    name: str
    was: str  # class before
    now: str  # class after
    alpha: Optional[float]  # None where it stays what it was


def scaled_batch_norms(model: nn.Module) -> List[nn.Module]:
    """Batch norms with a scale, tdBN already or not, of exactly the classes that have a tdBN form."""
    return [module for module in model.modules()
            if type(module) in {**_TD_CLASS, **_PLAIN_CLASS} and module._parameters.get('weight') is not None]


def _where_branches_add(model: nn.Module) -> Set[nn.Module]:
    """The last norm of the residual branch and the norms of the shortcut in every block like timm's BasicBlock and
    Bottleneck: one with norms bn1, bn2 (bn3), and a shortcut, or None, called downsample."""
    found: Set[nn.Module] = set()
    for block in model.modules():
        last = block._modules.get('bn3') or block._modules.get('bn2')
        if last is not None and 'bn1' in block._modules and hasattr(block, 'downsample'):
            found.update([last, *(block.downsample.modules() if block.downsample is not None else ())])
    return found


def check_norm(norm: Optional[str]) -> None:
    """Raise ValueError where there is no such kind of norm."""
    if norm not in (None, 'tdbn'):
        raise ValueError(f"norm={norm!r}: must be 'tdbn', or None for the model's own norms.")


@all_or_nothing()
def set_norm(model: nn.Module, norm: Optional[str], v_threshold: float) -> None:
    """Make all batch norms with a scale tdBN for this threshold, or plain again, in place.

    alpha is 1/sqrt(2) where two branches add, in blocks like timm's BasicBlock and Bottleneck: for the last norm of
    the residual branch (bn2 or bn3) and for the shortcut's (downsample). It is 1 for all other norms.

    Args:
        model: Spiking model.
        norm: 'tdbn' or None.
        v_threshold: Firing threshold.

    Raises:
        ValueError: norm is neither.
    """
    check_norm(norm)
    added = _where_branches_add(model) if norm is not None else ()
    for module in scaled_batch_norms(model):
        module.__class__ = _PLAIN_CLASS.get(type(module), type(module))
        if norm is not None:
            module.__class__ = _TD_CLASS[type(module)]
            module.alpha = _WHERE_BRANCHES_ADD if module in added else 1.
            module.v_threshold = v_threshold


def norm_records(model: nn.Module) -> List[NormRecord]:
    """What became of every norm with a scale."""
    records = []
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, TdBatchNorm):
            records.append(NormRecord(name, _PLAIN_CLASS[type(module)].__name__, 'tdBN', module.alpha))
        elif 'norm' in kind.lower() and module._parameters.get('weight') is not None:
            records.append(NormRecord(name, kind, kind, None))
    return records
