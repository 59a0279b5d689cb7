"""Support models that call an activation as a function only to return a feature as one of their modules activates it.

nasnet, pnasnet and xception do so in forward_intermediates, and in forward_features after pruning. feature_info names
the module. Its neuron replaces the function.
"""
from functools import wraps
from typing import Any, Callable, Dict, List, Type

import torch
import torch.nn as nn

from timm_sscl.neurons import SpikingNeuron

from .functional_calls import methods_that_fire

__all__ = ['repeats_activations', 'fires_features', 'feature_neuron', 'pruning_methods']

_KEPT = 'feature_neurons'  # child with the neurons of features whose module was pruned
_METHODS = {'forward_intermediates', 'forward_features'}


def repeats_activations(model: nn.Module) -> bool:
    """Return whether all activations that a model calls as functions repeat those of modules named in feature_info."""
    methods = methods_that_fire(type(model))
    if 'forward_intermediates' not in methods or not methods <= _METHODS:
        return False
    modules = dict(model.named_modules())
    named = [modules.get(entry['module']) for entry in getattr(model, 'feature_info', ())]
    return any(m is not None and not list(m.children()) and not list(m.parameters()) for m in named)


def fires_features(model: nn.Module, method: str) -> bool:
    """Return whether this method of such a model calls the activation function itself."""
    return method == 'forward_intermediates' or method != 'forward_head' and model._features_pruned


def feature_neuron(model: nn.Module, x: torch.Tensor) -> SpikingNeuron:
    """Return the neuron that replaces an activation function on a feature x, found by its number of channels.

    Raises:
        RuntimeError: No feature has as many channels.
    """
    names = [entry['module'] for entry in model.feature_info if entry['num_chs'] == x.shape[1]]
    if not names:
        raise RuntimeError(
            f'{type(model).__name__} calls an activation as a function on {x.shape[1]} channels, where it has no '
            f'feature; make it a module that is an activation (nn.ReLU).')
    modules: Dict[str, Any] = model._modules
    return _neurons(model).get(names[0]) or modules[_KEPT][_key(names[0])]


def pruning_methods(base: Type[nn.Module]) -> Dict[str, Callable]:
    """Return a prune_intermediate_layers for such a class that keeps the neurons of features whose modules it removes.

    Empty for other classes.
    """
    prune = getattr(base, 'prune_intermediate_layers', None)
    if prune is None or 'forward_intermediates' not in methods_that_fire(base):
        return {}

    @wraps(prune)
    def prune_and_keep(self, *args: Any, **kwargs: Any) -> List[int]:
        if not self._repeats_activations:
            return prune(self, *args, **kwargs)
        before = _neurons(self)
        indices = prune(self, *args, **kwargs)
        there = _neurons(self)
        gone = [name for name in (self.feature_info[i]['module'] for i in indices) if name in before.keys() - there]
        self._features_pruned = True
        if gone:
            self.add_module(_KEPT, nn.ModuleDict({_key(name): before[name] for name in gone}))
        return indices
    return {'prune_intermediate_layers': prune_and_keep}


def _neurons(model: nn.Module) -> Dict[str, SpikingNeuron]:
    """Return the neurons of a model by module name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, SpikingNeuron)}


def _key(name: str) -> str:
    return name.replace('.', '_')
