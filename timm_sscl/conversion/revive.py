"""Scales and weights that are zero throughout, behind which no neuron gets a gradient, become small."""
import logging
from typing import Optional

import torch
import torch.nn as nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrizations import _WeightNorm

__all__ = ['revive_zeros']

_logger = logging.getLogger(__name__)

_REVIVED = 0.1  # of a usual initialisation: what starts at zero stays weak, but passes a gradient on


def _stored(module: nn.Module, *names: str) -> Optional[torch.Tensor]:
    """The first of a module's own parameters of these names."""
    found = (module._parameters.get(name) for name in names)
    return next((p for p in found if p is not None and not nn.parameter.is_lazy(p)), None)


def _parametrization(module: nn.Module) -> Optional[nn.Module]:
    """What computes a module's weight (torch.nn.utils.parametrize), where something does."""
    return module.parametrizations['weight'] if 'weight' in getattr(module, 'parametrizations', ()) else None


def _weight(module: nn.Module) -> Optional[torch.Tensor]:
    """The parameter that holds a module's weight, or that weight norm, spectral norm or pruning compute it from."""
    computed = _parametrization(module)
    if computed is not None:
        return _stored(computed, 'original', 'original1' if isinstance(computed[0], _WeightNorm) else 'original0')
    return _stored(module, 'weight', 'weight_orig', 'weight_v')


def _scale(module: nn.Module) -> Optional[torch.Tensor]:
    """The parameter that scales what a module computes: a norm's weight, the magnitude of weight norm, a gain."""
    computed = _parametrization(module)
    if computed is not None and isinstance(computed[0], _WeightNorm):
        return _stored(computed, 'original0')
    kind = type(module).__name__.lower()
    if 'norm' in kind and 'globalresponse' not in kind:  # GRN adds
        return _weight(module)
    return _stored(module, 'weight_g', 'gain')


def revive_zeros(model: nn.Module) -> None:
    """Make scales that are zero throughout 0.1, and such weights of convolutions and linear maps small noise.

    A weight that weight norm, spectral norm or pruning compute is judged and changed by the parameter that they compute
    it from; a mask of zeros stays.
    """
    revived = []
    generator = torch.Generator().manual_seed(0)  # the global generator stays where it is
    for name, module in model.named_modules():
        scale, weight = _scale(module), _weight(module)
        if scale is not None and not scale.any():
            nn.init.constant_(scale, _REVIVED)
            revived.append(name)
        if isinstance(module, (nn.Linear, _ConvNd)) and weight is not None and not weight.any():
            with torch.no_grad():
                weight.copy_(torch.randn(weight.shape, generator=generator) * _REVIVED / weight[0].numel() ** 0.5)
            revived.append(name)
    if revived:
        _logger.info(f'{type(model).__name__}: {len(revived)} scales or weights started at zero and are small now '
                     f'({", ".join(revived[:3])}{", ..." if len(revived) > 3 else ""}).')
