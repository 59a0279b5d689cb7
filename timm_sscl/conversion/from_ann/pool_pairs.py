"""Find neurons whose spikes only a max pooling takes."""
from typing import Dict, Optional, Tuple

import torch
import torch.nn as nn

from timm_sscl.untouched import untouched

from ..finding.forward_trace import ForwardTrace

__all__ = ['find_pool_pairs']


def find_pool_pairs(model: nn.Module, images: torch.Tensor) -> Optional[Tuple[str, ...]]:
    """Run one forward and return 'neuron:pooling' for each neuron that may fire after its max pooling; None for none.

    Both run once in the forward, and nothing but the pooling, an nn.MaxPool2d, takes the spikes.
    """
    inputs: Dict[int, str] = {}  # id of a pooling's input -> its name
    runs: Dict[str, int] = {}

    with untouched(model), ForwardTrace(model) as trace:
        for name, module in model.named_modules():
            if isinstance(module, nn.MaxPool2d) and not module.return_indices:
                def run(pool, args, name=name):
                    runs[name] = runs.get(name, 0) + 1
                    inputs[id(args[0])] = name

                module.register_forward_pre_hook(run)
        model(images)
    pairs = []
    for name, calls in trace.neurons.items():
        takers = trace.taken.get(id(calls[0][1]), [])
        pool = inputs.get(id(calls[0][1]))
        if len(calls) == 1 and len(takers) == 1 and pool is not None and runs[pool] == 1:
            pairs.append(f'{name}:{pool}')
    return tuple(pairs) or None
