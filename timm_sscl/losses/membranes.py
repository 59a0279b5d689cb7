"""Common parts of losses on membrane potentials: the layers of a step that a loss regularises."""
from typing import Dict, List

import torch

__all__ = ['hidden_layers']


def hidden_layers(membranes: Dict[str, torch.Tensor], skip_ends: bool) -> List[torch.Tensor]:
    """Return the membrane potentials of the layers, (T, B, ...) each.

    Args:
        membranes: Potentials by layer, in the order of the forward.
        skip_ends: Whether to leave out the first and the last layer.

    Raises:
        ValueError: No layer is left.
    """
    layers = list(membranes.values())
    layers = layers[1:-1] if skip_ends else layers
    if not layers:
        raise ValueError(f'skip_ends={skip_ends}: {len(membranes)} neuron layers ({", ".join(membranes)}) leave none.')
    return layers
