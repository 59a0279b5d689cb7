"""Set scales and weights that are all zeros to small values, since a neuron behind a zero gets no gradient."""
import logging
from typing import Collection, Optional

import torch
import torch.nn as nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrizations import _WeightNorm

__all__ = ['revive_zeros']

_logger = logging.getLogger(__name__)

_REVIVED = 0.1  # relative to a usual initialisation: the branch stays weak but receives gradients


def _stored(module: nn.Module, *names: str) -> Optional[torch.Tensor]:
    """Return the first of a module's own parameters with one of these names, or None."""
    found = (module._parameters.get(name) for name in names)
    return next((p for p in found if p is not None and not nn.parameter.is_lazy(p)), None)


def _parametrization(module: nn.Module) -> Optional[nn.ModuleList]:
    """Return the parametrization (torch.nn.utils.parametrize) of a module's weight, or None."""
    return module.parametrizations['weight'] if 'weight' in getattr(module, 'parametrizations', ()) else None


def _weight(module: nn.Module) -> Optional[torch.Tensor]:
    """Return the parameter that holds a module's weight, or from which weight norm, spectral norm or pruning compute
    it.
    """
    computed = _parametrization(module)
    if computed is not None:
        return _stored(computed, 'original', 'original1' if isinstance(computed[0], _WeightNorm) else 'original0')
    return _stored(module, 'weight', 'weight_orig', 'weight_v')


def _scale(module: nn.Module) -> Optional[torch.Tensor]:
    """Return the parameter that scales a module's output: weight of a norm, magnitude of weight norm, or gain."""
    computed = _parametrization(module)
    if computed is not None and isinstance(computed[0], _WeightNorm):
        return _stored(computed, 'original0')
    kind = type(module).__name__.lower()
    # GRN adds its input, so a zero scale does not block the gradient
    if 'norm' in kind and 'globalresponse' not in kind:
        return _weight(module)
    return _stored(module, 'weight_g', 'gain')


def revive_zeros(model: nn.Module, stay: Collection[str] = ()) -> None:
    """Set scales that are all zeros to 0.1, and weights of convolutions and linear layers that are all zeros to small
    noise.

    For weight norm, spectral norm and pruning, the underlying parameter is checked and changed. A mask of zeros stays.

    Args:
        model: The model.
        stay: Names of modules whose scale may stay zero.
    """
    revived = []
    generator = torch.Generator().manual_seed(0)  # leaves the global generator alone
    for name, module in model.named_modules():
        scale, weight = _scale(module), _weight(module)
        if scale is not None and not scale.any() and name not in stay:
            nn.init.constant_(scale, _REVIVED)
            revived.append(name)
        if isinstance(module, (nn.Linear, _ConvNd)) and weight is not None and not weight.any():
            with torch.no_grad():
                weight.copy_(torch.randn(weight.shape, generator=generator) * _REVIVED / weight[0].numel() ** 0.5)
            revived.append(name)
    if revived:
        _logger.info(f'{type(model).__name__}: {len(revived)} scales or weights started at zero and are small now '
                     f'({", ".join(revived[:3])}{", ..." if len(revived) > 3 else ""}).')
