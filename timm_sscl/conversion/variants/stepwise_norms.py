"""Common base of norms with statistics and scale per timestep: tensors are (T, C) instead of (C,)."""
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch
import torch.nn as nn

from .batch_norms import BatchNormOverTime, BatchNormVariant, batch_norms

__all__ = ['StepwiseBatchNorm', 'StepwiseNormVariant']

_STATE = 'weight', 'bias', 'running_mean', 'running_var'


def _tables(norm: nn.Module) -> Tuple[Dict[str, Any], ...]:
    """Return the tables in which a norm holds its parameters and buffers."""
    return norm._parameters, norm._buffers


class StepwiseBatchNorm(BatchNormOverTime):
    """Mixin for a batch norm whose weight, bias, running_mean and running_var are (T, C)."""
    per_step = True

    def update_rate(self) -> float:
        """Count a training batch and return its share in the running statistics."""
        if not (self.training and self.track_running_stats and self.num_batches_tracked is not None):
            return self.momentum or 0.
        self.num_batches_tracked.add_(1)
        return 1. / float(self.num_batches_tracked) if self.momentum is None else self.momentum


class StepwiseNormVariant(BatchNormVariant):
    """Base of a variant whose norms have statistics, scale and shift per timestep.

    Every timestep starts with the norm's own values, also if an ANN's weights are loaded.
    """
    changes_state = True
    has_bias = True

    def set_up(self, norm: nn.Module, settings: Any) -> None:
        with torch.no_grad():
            for table in _tables(norm):
                for name in _STATE:
                    value = table.get(name)
                    if value is not None and value.shape[:-1] != (self.settings.steps,):
                        expanded = self._expand(value.detach())
                        table[name] = self._like(expanded, value)
        if not self.has_bias:
            norm._parameters['bias'] = None

    def _expand(self, value: torch.Tensor) -> torch.Tensor:
        """Return a tensor (C,) or (steps, C) with `steps` rows; the last row is repeated."""
        rows = value if value.ndim == 2 else value[None]
        index = [min(t, len(rows) - 1) for t in range(self.settings.steps)]
        return rows[index].clone()

    @staticmethod
    def _like(value: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """Return a value as a parameter if it replaces one."""
        return nn.Parameter(value, before.requires_grad) if isinstance(before, nn.Parameter) else value

    def tear_down(self, norm: nn.Module) -> None:
        super().tear_down(norm)
        for table in _tables(norm):
            for name in _STATE:
                if table.get(name) is not None:
                    first = table[name].detach()[0].clone()
                    table[name] = self._like(first, table[name])
        if norm._parameters['bias'] is None:
            norm._parameters['bias'] = nn.Parameter(torch.zeros_like(norm.weight))

    def _stepwise(self, model: nn.Module) -> Iterator[Tuple[str, Optional[torch.Tensor]]]:
        """Yield (name, tensor) of all tensors per timestep; None for a shift that was removed."""
        for name, norm in batch_norms(model):
            if isinstance(norm, self.mixin):
                yield from ((f'{name}.{key}', getattr(norm, key)) for key in _STATE)

    def own_state(self, model: nn.Module) -> List[str]:
        return [*super().own_state(model), *(name for name, value in self._stepwise(model) if value is not None)]

    def complete(self, model: nn.Module, state_dict: Dict[str, torch.Tensor], prefix: str) -> None:
        """Repeat a norm's tensors for every timestep, and drop a shift that the variant does not have."""
        for name, own in self._stepwise(model):
            value = state_dict.get(f'{prefix}{name}')
            if own is None:
                state_dict.pop(f'{prefix}{name}', None)
            elif value is not None and value.ndim == 1:
                state_dict[f'{prefix}{name}'] = self._expand(value)
        super().complete(model, state_dict, prefix)
