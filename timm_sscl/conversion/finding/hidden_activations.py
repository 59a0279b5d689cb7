"""Replace activations inside norms of timm, and let split batch norm split samples, by subclasses set in place."""
import re
from typing import Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from timm.layers import EvoNorm2dS0, EvoNorm2dS1, EvoNorm2dS2, FilterResponseNormTlu2d, SplitBatchNorm2d

from timm_sscl.class_swap import Mixin, mix_in, new_mixed, take_out

from ..over_time.dropout import OverTime

__all__ = ['hidden_activation', 'give_neuron', 'take_neuron', 'why_no_adapter', 'split_over_samples']

_BATCH_EVONORM = re.compile(r'EvoNorm2dB\d')


class _EvoNorm(Mixin):
    """Mixin: group norm, then the neuron. It replaces EvoNorm's activation x * sigmoid(v x) / std, which is not a
    module.
    """
    act: nn.Module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(F.group_norm(x, self.groups, self.weight, self.bias, self.eps))


class _FilterResponseNorm(Mixin):
    """Mixin: filter response norm without its threshold tau, then the neuron."""
    act: nn.Module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(super().forward(x))


# base class -> (mixin, parameters of the replaced activation)
_ADAPTERS = {
    EvoNorm2dS0: (_EvoNorm, ('v',)),
    EvoNorm2dS1: (_EvoNorm, ()),
    EvoNorm2dS2: (_EvoNorm, ()),
    FilterResponseNormTlu2d: (_FilterResponseNorm, ('tau',)),
}


def _adapter(module: nn.Module) -> Optional[Tuple[type, Tuple[str, ...]]]:
    """Return the entry of _ADAPTERS for a norm that applies an activation, else None."""
    if not getattr(module, 'apply_act', False) or isinstance(module, (_EvoNorm, _FilterResponseNorm)):
        return None
    return next((adapter for base, adapter in _ADAPTERS.items() if isinstance(module, base)), None)


def hidden_activation(module: nn.Module) -> bool:
    """Return whether a module has an activation that `give_neuron` replaces."""
    return _adapter(module) is not None


def why_no_adapter(module: nn.Module) -> Optional[str]:
    """Return why a module's activation cannot be replaced; None if it can, or if there is none."""
    kind = type(module).__name__
    if _BATCH_EVONORM.search(kind) and getattr(module, 'apply_act', True):
        return 'divides by a variance over the batch and hides its activation in that; use EvoNorm2dS0 or batch norm.'
    return None


_new_adapted = new_mixed  # name in pickles of version 0.1.0


def give_neuron(module: nn.Module, neuron: nn.Module) -> None:
    """Replace the activation inside a norm by a neuron in its attribute `act`; parameters of the activation are
    dropped.
    """
    adapter = _adapter(module)
    assert adapter is not None, f'{type(module).__name__} hides no activation'
    mixin, dropped = adapter
    mix_in(module, mixin)
    module.__dict__['_kept'] = {
        'act': getattr(module, 'act', None), **{name: getattr(module, name) for name in dropped}}
    for name in dropped:
        setattr(module, name, None)
    module.act = neuron
    module.forgotten = dropped


def take_neuron(module: nn.Module) -> None:
    """Undo give_neuron. Other modules stay."""
    if not isinstance(module, (_EvoNorm, _FilterResponseNorm)):
        return
    del module.act
    for name, value in module.__dict__.pop('_kept').items():
        if value is not None:
            setattr(module, name, value.to(module.weight.device))
    take_out(module, type(module).mixed[0])
    del module.forgotten


class SplitBatchNormOverTime(OverTime, SplitBatchNorm2d):
    """Split batch norm that splits samples, each with all its timesteps."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(input)
        steps = input.unflatten(0, (self.timesteps, self._samples(input)))
        if steps.shape[1] % self.num_splits:
            raise ValueError(f'a batch of {steps.shape[1]} samples does not split into num_splits={self.num_splits} '
                             f'equal parts for split batch norm.')
        first, *others = steps.chunk(self.num_splits, dim=1)
        parts = [nn.BatchNorm2d.forward(self, first.flatten(0, 1))]
        parts += [bn(part.flatten(0, 1)) for bn, part in zip(self.aux_bn, others)]
        x = torch.cat([part.unflatten(0, (self.timesteps, -1)) for part in parts], dim=1).flatten(0, 1)
        for name in ('drop', 'act'):  # present only if a norm-act layer was split
            x = getattr(self, name)(x) if name in self._modules else x
        return x


def split_over_samples(module: nn.Module, timesteps: int) -> None:
    """Let a SplitBatchNorm2d split samples instead of timesteps, in place. Other modules stay."""
    if type(module) is SplitBatchNorm2d:
        module.__class__ = SplitBatchNormOverTime
        module.timesteps = timesteps
