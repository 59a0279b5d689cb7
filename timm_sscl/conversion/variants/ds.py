"""DS-ResNet (Feng et al. 2022): SEW's sum of spikes, with neurons of several levels (MLF)."""
from typing import Any

import torch.nn as nn

from timm_sscl.neurons import neuron_class

from .base import VariantSettings
from .registry import register_variant
from .sew import SEW

__all__ = ['DS']


@register_variant('residual', 'ds')
class DS(SEW):
    """SEW blocks with 'add' and neurons whose output is whole numbers, as `neuron='mlf'`.

    A sum is at most the neuron's top level times (number of blocks in a stage + 1). The authors use tdBN (norm='tdbn');
    its factor is 1 everywhere here, since spikes are added.
    """
    label = 'DS'
    Settings: Any = VariantSettings  # SEW's have one more
    connect = 'add'

    def check(self, model: nn.Module, settings: Any) -> None:
        output = neuron_class(settings.neuron).output
        if output != 'integer':
            raise ValueError(f"{self}: needs a neuron of several levels, neuron='mlf'; the output of "
                             f"'{settings.neuron}' is {output}.")
        super().check(model, settings)
