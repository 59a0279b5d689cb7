"""Name the weights that are NaN or infinite.

A neuron whose current is NaN does not fire, so that a model with such weights gives finite logits.
"""
from typing import List, Mapping

import torch

__all__ = ['check_finite', 'find_non_finite', 'text_of_non_finite']

_SHOWN = 5  # number of tensors that a message names


def find_non_finite(state: Mapping[str, object]) -> List[str]:
    """Return the names of the tensors in a state dict that hold NaN or infinite values."""
    return [name for name, value in state.items()
            if isinstance(value, torch.Tensor) and value.is_floating_point() and not value.isfinite().all()]


def text_of_non_finite(names: List[str]) -> str:
    """Return a text that says how many tensors are not finite and names the first of them."""
    more = ', ...' if len(names) > _SHOWN else ''
    tensors = 'tensor' if len(names) == 1 else 'tensors'
    return f'{len(names)} {tensors} with NaN or infinite values: {", ".join(names[:_SHOWN])}{more}'


def check_finite(state: Mapping[str, object], source: str) -> None:
    """Check that a state dict holds finite values.

    Args:
        state: State dict.
        source: What holds it, for the message: "--resume: 'last.pth.tar'".

    Raises:
        ValueError: Some are NaN or infinite. The message names the tensors.
    """
    names = find_non_finite(state)
    if names:
        raise ValueError(f'{source} holds {text_of_non_finite(names)}. A neuron whose current is NaN does not fire, so '
                         f'that its accuracy would look like that of an untrained model.')
