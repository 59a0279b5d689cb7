"""Find the neurons of a model that a report hooks."""
from typing import Dict

import torch.nn as nn

from timm_sscl.neurons import SpikingNeuron

__all__ = ['neurons_to_watch']


def neurons_to_watch(model: nn.Module) -> Dict[str, SpikingNeuron]:
    """Return the spiking neurons of a model by name, without the '_orig_mod.' that torch.compile adds to names.

    Raises:
        ValueError: The model has none.
    """
    neurons = {name.replace('_orig_mod.', ''): module for name, module in model.named_modules()
               if isinstance(module, SpikingNeuron)}
    if not neurons:
        raise ValueError(f'{type(model).__name__} has no spiking neurons; convert_to_spiking(model) makes it spike.')
    return neurons
