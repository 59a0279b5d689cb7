"""Register the parts of a spiking model that are one node of a torch.fx graph with timm's feature extraction."""
from timm.layers import register_notrace_function, register_notrace_module

from .hidden_activations import SplitBatchNormOverTime
from timm_sscl.neurons import SpikingNeuron
from ..model import decode, fold_traced_input
from ..over_time.dropout import OVER_TIME_MODULES
from timm_sscl.conversion.variants.batch_norms import BatchNormOverTime

__all__ = []

for _module in (SpikingNeuron, BatchNormOverTime, SplitBatchNormOverTime, *OVER_TIME_MODULES):
    register_notrace_module(_module)
for _function in (fold_traced_input, decode):
    register_notrace_function(_function)
