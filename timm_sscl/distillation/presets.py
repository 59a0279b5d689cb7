"""Presets of losses for --distill, and validation of loss names and weights."""
import logging
from numbers import Real
from typing import Any, Dict, Mapping, Union

from timm_sscl.losses import loss_spec

__all__ = ['PRESETS', 'check_loss_options', 'resolve_losses']

_logger = logging.getLogger(__name__)

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
        ValueError: A preset or loss does not exist, or a weight is no number or negative.
    """
    if isinstance(losses, str):
        if losses not in PRESETS:
            raise ValueError(f"unknown preset '{losses}'; there are {', '.join(PRESETS)}, or give {{name: weight}}.")
        losses = PRESETS[losses]
    for name, weight in losses.items():
        loss_spec(name)  # raises for an unknown name
        if not isinstance(weight, Real) or not weight >= 0:
            raise ValueError(f"the weight of loss '{name}' is {weight!r}; it must be a number, 0 or more.")
    return {name: float(weight) for name, weight in losses.items() if weight > 0}


def check_loss_options(options: Mapping[str, Mapping[str, Any]], losses: Union[str, Mapping[str, float]]) -> None:
    """Check the options of all losses, also of those that do not run, and log which of them change nothing.

    Args:
        options: Options per loss.
        losses: A preset's name, or weights by name. Options of a loss of weight 0 are not logged.

    Raises:
        ValueError: A loss or an option does not exist.
    """
    for name, given in options.items():
        spec = loss_spec(name)
        for option in given:
            spec.option(option, f"loss '{name}'")
    runs = PRESETS[losses] if isinstance(losses, str) else losses
    unread = [f'{name}.{option}' for name, given in options.items() if name not in runs for option in given]
    if unread:
        _logger.warning(f'loss_options: {", ".join(unread)} changes nothing, since the losses are '
                        f'{", ".join(runs) or "none"}.')
