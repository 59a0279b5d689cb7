"""Bound the information in a feature map (Eq. 4 of the paper), and compute the entropy of spikes at a firing rate."""
import math

import torch

__all__ = ['representation_bits', 'spike_entropy', 'level_entropy']


def representation_bits(timesteps: int, c: int, h: int, w: int, bits: int = 1) -> int:
    """Return the representation capability R(M) of a feature map, log2 of the number of its possible values.

    Equation 4 of the SSCL paper.

    Args:
        timesteps: Number of timesteps T; 1 for a real-valued map.
        c: Channels.
        h: Height.
        w: Width.
        bits: Bits per element: 1 for spikes, 32 for float32.

    Returns:
        timesteps * c * h * w * bits, in bits.

    Raises:
        ValueError: A size is not a positive whole number.
    """
    sizes = dict(timesteps=timesteps, c=c, h=h, w=w, bits=bits)
    for name, value in sizes.items():
        if value % 1 != 0 or value < 1:
            raise ValueError(f'{name}={value}: must be a positive whole number.')
    return math.prod(map(int, sizes.values()))


def spike_entropy(rate: torch.Tensor) -> torch.Tensor:
    """Return the entropy of a spike in bits per neuron and timestep, H(p) = -p log2 p - (1 - p) log2(1 - p).

    Args:
        rate: Firing rates p in [0, 1], any shape.

    Returns:
        Entropy in [0, 1], of the same shape; 0 for a neuron that never or always fires.
    """
    return (torch.special.entr(rate) + torch.special.entr(1 - rate)) / torch.log(torch.tensor(2., dtype=rate.dtype))


def level_entropy(p: torch.Tensor) -> torch.Tensor:
    """Return the entropy of an output of several levels in bits per neuron and timestep, -sum p log2 p.

    Args:
        p: Probabilities of the levels other than 0, (L, ...).

    Returns:
        Entropy, 0 to log2(L + 1), of the shape of one level.
    """
    silent = (1 - p.sum(0)).clamp(min=0)
    return (torch.special.entr(p).sum(0) + torch.special.entr(silent)) / math.log(2)
