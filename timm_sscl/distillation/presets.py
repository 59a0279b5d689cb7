"""Which losses --distill names, and which of a loss file's names there are."""
from typing import Dict, Mapping, Union

from timm_sscl.losses import loss_spec

__all__ = ['PRESETS', 'resolve_losses']

# the four modes of one code path: cross-entropy plus these
PRESETS: Dict[str, Dict[str, float]] = {
    'sscl': {'sscl': 1.},
    'contrastive': {'contrastive': 1.},
    'kd': {'kd': 1.},
    'none': {},
}


def resolve_losses(losses: Union[str, Mapping[str, float]]) -> Dict[str, float]:
    """Loss names and weights from a preset's name or a mapping; a loss of weight 0 is left out.

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
