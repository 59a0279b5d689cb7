"""Energy of the arithmetic of one image, spiking and real-valued (45 nm, float32; Horowitz 2014)."""
from typing import NamedTuple

import torch
import torch.nn as nn

from timm_sscl.untouched import untouched

from .macs import count_macs

__all__ = ['Energy', 'estimate_energy', 'MAC_PJ', 'AC_PJ']

MAC_PJ = 4.6  # a multiplication and an addition
AC_PJ = 0.9  # an addition


class Energy(NamedTuple):
    """Energy per image in microjoules; memory traffic, norms and neurons are not in it.

        spiking = 4.6 pJ * MACs whose input is not whole numbers
                  + 0.9 pJ * sum_l fr_l * MACs_l over the others, all T steps
        ann     = 4.6 pJ * MACs of one step

    The analog stem counts T times, or once where `share_stem` has it run once. Layers with fractional input (average
    pooling of spikes) count as MACs; sums of spikes count by their value.
    """
    spiking: float
    ann: float
    macs: int  # multiply-accumulates of the spiking network
    additions: float  # its additions
    ann_macs: int

    @property
    def ratio(self) -> float:
        """Spiking over real-valued."""
        return self.spiking / self.ann


def estimate_energy(model: nn.Module, images: torch.Tensor) -> Energy:
    """Energy of a spiking model's arithmetic, and of the same network with one real-valued step.

    Args:
        model: Spiking model.
        images: Real images as the model takes them, on its device: the firing rates are theirs.

    Returns:
        Energy per image.
    """
    shares = count_macs(model, images)
    frames = images[:, :1] if images.ndim == 5 else images
    with untouched(model):
        model.set_timesteps(1)
        ann_macs = count_macs(model, frames[:1]).total
    macs = shares.total - shares.whole
    return Energy(
        (MAC_PJ * macs + AC_PJ * shares.additions) * 1e-6, MAC_PJ * ann_macs * 1e-6, macs, shares.additions, ann_macs)
