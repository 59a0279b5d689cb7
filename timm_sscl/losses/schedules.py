"""The progress of the training, for losses whose weight depends on it."""
from typing import Any

import torch

from .inputs import TrainStep

__all__ = ['known_progress']


def known_progress(step: TrainStep, **option: Any) -> torch.Tensor:
    """Return the completed share of the training, 0-d.

    Args:
        step: Training step.
        option: Option that needs it, for the message.

    Raises:
        ValueError: It is unknown.
    """
    if step.progress is None:
        (name, value), = option.items()
        raise ValueError(f'{name}={value}: needs the progress of the training; call set_progress of SSCLTask at every '
                         f'epoch.')
    return step.progress
