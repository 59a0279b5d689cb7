"""Common base of norm variants: a mixin for every batch norm, which computes another batch norm."""
from collections import Counter
from typing import Any, Iterator, List, NamedTuple, Optional, Tuple, Type

import torch
import torch.nn as nn
import torch.nn.functional as F

from timm.layers import BatchNormAct2d

from timm_sscl.class_swap import Mixin, mix_in, take_out

from .base import Variant

__all__ = ['BatchNormOverTime', 'BatchNormVariant', 'NormRecord', 'batch_norms']

_PLAIN = nn.BatchNorm1d, nn.BatchNorm2d, BatchNormAct2d


class NormRecord(NamedTuple):
    """One norm of a model with a norm variant."""
    name: str
    was: str  # class before
    now: str  # what it is now
    alpha: Optional[float]  # further factor on the scale (tdBN), 1 for other variants; None if the norm is unchanged


class BatchNormOverTime(Mixin):
    """Mixin for a batch norm on (T * B, C, ...).

    A subclass implements `normalise`. In a norm-act layer, dropout and neuron follow.

    Attributes:
        own_state: Names of the parameters and buffers that the mixin adds to the norm.
        per_step: Whether the norm differs between timesteps; `share_stem` then refuses it.
        step_factor: Name of a parameter (steps,) that multiplies the whole output and is all that differs between
            timesteps; '' for none. `fold_norms` makes it a gain of the neuron.
        timesteps: T, set by the variant.
    """
    own_state: Tuple[str, ...] = ()
    per_step = False
    step_factor = ''
    timesteps: int

    def normalise(self, x: torch.Tensor) -> torch.Tensor:
        """Return the normalised input, (T * B, C, ...)."""
        return self.batch_norm(x, self.weight, self.bias)

    def steps_used(self) -> List[int]:
        """Return the index of the parameters that each timestep uses. Further timesteps use the last."""
        steps = len(getattr(self, self.own_state[0] if self.own_state else 'weight'))
        return [min(t, steps - 1) for t in range(self.timesteps)]

    def over_time(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return a parameter per timestep for the current T: its first T entries, or with the last entry repeated."""
        missing = self.timesteps - len(parameter)  # slices, since indices would be copied from the host at every call
        if missing <= 0:
            return parameter[:self.timesteps]
        return torch.cat([parameter, parameter[-1:].expand(missing, *parameter.shape[1:])])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._check_input_dim(x)
        x = self.normalise(x)
        for name in ('drop', 'act'):  # present only in norm-act layers
            x = getattr(self, name)(x) if name in self._modules else x
        return x

    def batch_norm(self, x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor]) -> torch.Tensor:
        """Run nn.BatchNorm's forward with this scale and shift, with statistics over T, B, H and W."""
        momentum = 0. if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1. / float(self.num_batches_tracked)
        by_batch = self.training or (self.running_mean is None and self.running_var is None)
        tracks = not self.training or self.track_running_stats
        return F.batch_norm(
            x, self.running_mean if tracks else None, self.running_var if tracks else None, weight, bias, by_batch,
            momentum, self.eps)


def plain_class(module: nn.Module) -> type:
    """Return a norm's class without the mixins of variants."""
    cls = type(module)
    while issubclass(cls, BatchNormOverTime):
        cls = cls.mixed[1]
    return cls


def batch_norms(model: nn.Module) -> Iterator[Tuple[str, nn.Module]]:
    """Yield (name, module) of batch norms with a scale whose class, apart from variants, is torch's or timm's own."""
    for name, module in model.named_modules():
        if plain_class(module) in _PLAIN and module._parameters.get('weight') is not None:
            yield name, module


class BatchNormVariant(Variant):
    """Base of a variant that adds a mixin to every batch norm with a scale.

    Attributes:
        mixin: The mixin.
        label: Name of such a norm in a report.
    """
    mixin: Type[BatchNormOverTime]
    label = ''

    def check(self, model: nn.Module, settings: Any) -> None:
        if not any(True for _ in batch_norms(model)):
            kind = getattr(type(model), 'mixed', (None, type(model)))[1].__name__
            raise ValueError(f'{self}: {kind} has no batch norm with a scale.')

    def apply(self, model: nn.Module, settings: Any) -> None:
        for _, norm in batch_norms(model):
            mix_in(norm, self.mixin)
            norm.timesteps = settings.timesteps
            self.set_up(norm, settings)

    def set_up(self, norm: nn.Module, settings: Any) -> None:
        """Set the attributes of a norm that the mixin uses. The norm may already have them.

        Args:
            norm: A batch norm with the mixin.
            settings: The model's SpikingSettings.
        """

    def remove(self, model: nn.Module) -> None:
        for _, norm in batch_norms(model):
            if isinstance(norm, self.mixin):
                self.tear_down(norm)
                take_out(norm, self.mixin)

    def tear_down(self, norm: nn.Module) -> None:
        """Remove the mixin's own parameters and buffers."""
        for name in self.mixin.own_state:
            delattr(norm, name)

    def own_state(self, model: nn.Module) -> List[str]:
        return [f'{name}.{key}' for name, norm in batch_norms(model) if isinstance(norm, self.mixin)
                for key in self.mixin.own_state]

    def records(self, model: nn.Module) -> List[NormRecord]:
        """Return what became of every norm with a scale."""
        changed = {name: norm for name, norm in batch_norms(model) if isinstance(norm, self.mixin)}
        records = []
        for name, module in model.named_modules():
            kind = type(module).__name__
            if name in changed:
                records.append(NormRecord(
                    name, plain_class(module).__name__, self.label, getattr(module, 'alpha', 1.)))
            elif 'norm' in kind.lower() and module._parameters.get('weight') is not None:
                records.append(NormRecord(name, kind, kind, None))
        return records

    def summary(self, model: nn.Module) -> str:
        records = self.records(model)
        left = Counter(record.was for record in records if record.alpha is None)
        changed = [record for record in records if record.alpha is not None]
        return f'{len(changed)} {self.label}{self.details(model, changed)}' + ''.join(
            f'; {n} {kind} as they were' for kind, n in left.most_common())

    def details(self, model: nn.Module, changed: List[NormRecord]) -> str:
        """Return the text after the number of norms in the report."""
        return ''

    def set_parameter(self, norm: nn.Module, name: str, value: torch.Tensor) -> None:
        """Give a norm a parameter with this value, in the norm's device and dtype. An existing one of this shape is
        kept.
        """
        own = norm._parameters.get(name)
        if own is None or own.shape != value.shape:
            setattr(norm, name, nn.Parameter(value.to(norm.weight.device, norm.weight.dtype)))
