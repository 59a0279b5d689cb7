"""Fused paths of torch's modules that compute a layer without calling its activation module."""

import torch.nn as nn

from timm_sscl.neurons import SpikingNeuron

from .functional_calls import NEURON_NAME

__all__ = ['leave_fused_path', 'return_to_fused_path']

# what nn.TransformerEncoderLayer and nn.TransformerEncoder ask before they take their fused path
_SWITCHES = {'activation_relu_or_gelu': 0, 'use_nested_tensor': False}


def leave_fused_path(module: nn.Module) -> None:
    """Keep a module, in place, from its fused path if neurons in it would be bypassed; others stay as they are."""
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
    """Modules that a fused path of this module would not call."""
    if hasattr(module, 'activation_relu_or_gelu'):
        return [module._modules.get('activation'), module._modules.get(NEURON_NAME)]
    return module.modules() if hasattr(module, 'use_nested_tensor') else []
