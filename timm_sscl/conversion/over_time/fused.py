"""Disable fused paths of torch's modules, which compute a layer without calling its activation module."""

import torch.nn as nn

from timm_sscl.neurons import SpikingNeuron

from ..finding.functional_calls import NEURON_NAME

__all__ = ['leave_fused_path', 'return_to_fused_path']

# attributes that nn.TransformerEncoderLayer and nn.TransformerEncoder check before taking the fused path
_SWITCHES = {'activation_relu_or_gelu': 0, 'use_nested_tensor': False}


def leave_fused_path(module: nn.Module) -> None:
    """Switch off a module's fused path in place if it would bypass neurons. Other modules stay."""
    if not any(isinstance(child, SpikingNeuron) for child in _fused_over(module)):
        return
    for name, off in _SWITCHES.items():
        if getattr(module, name, off) != off:
            module.__dict__.setdefault('_fused_before', {})[name] = getattr(module, name)
            setattr(module, name, off)


def return_to_fused_path(module: nn.Module) -> None:
    """Undo leave_fused_path."""
    for name, value in module.__dict__.pop('_fused_before', {}).items():
        setattr(module, name, value)


def _fused_over(module: nn.Module):
    """Return the modules that the fused path of this module does not call."""
    if hasattr(module, 'activation_relu_or_gelu'):
        return [module._modules.get('activation'), module._modules.get(NEURON_NAME)]
    return module.modules() if hasattr(module, 'use_nested_tensor') else []
