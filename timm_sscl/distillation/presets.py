"""Presets of losses for --distill, and validation of loss names and weights."""
from typing import Dict, Mapping, Union

from timm_sscl.losses import loss_spec

__all__ = ['PRESETS', 'resolve_losses']

# losses added to cross-entropy
PRESETS: Dict[str, Dict[str, float]] = {
    'sscl': {'sscl': 1.},
    'contrastive': {'contrastive': 1.},
    'kd': {'kd': 1.},
    'none': {},
}


def resolve_losses(losses: Union[str, Mapping[str, float]]) -> Dict[str, float]:
    """Return loss names and weights for a preset's name or a mapping. Losses of weight 0 are left out.

    Raises:
        ValueError: A preset or loss does not exist, or a weight is negative.
    """
    if isinstance(losses, str):
        if losses not in PRESETS:
            raise ValueError(f"unknown preset '{losses}'; there are {', '.join(PRESETS)}, or give {{name: weight}}.")
        losses = PRESETS[losses]
    for name, weight in losses.items():
        loss_spec(name)  # raises for an unknown name
        if not weight >= 0:
            raise ValueError(f"the weight of loss '{name}' is {weight}; it must be 0 or more.")
    return {name: float(weight) for name, weight in losses.items() if weight > 0}
