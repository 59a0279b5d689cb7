"""Estimate the energy of the arithmetic for one image, spiking and real-valued (45 nm, float32; Horowitz 2014)."""
import warnings
from typing import NamedTuple

import torch
import torch.nn as nn

from timm_sscl.neurons import SpikingNeuron
from timm_sscl.untouched import untouched

from .macs import count_macs

__all__ = ['Energy', 'estimate_energy', 'MAC_PJ', 'AC_PJ']

MAC_PJ = 4.6  # energy of one multiplication and addition
AC_PJ = 0.9  # energy of one addition


class Energy(NamedTuple):
    """Energy per image in microjoules, without memory traffic, norms and neurons.

        spiking = 4.6 pJ * MACs whose input is not whole numbers
                  + 0.9 pJ * sum_l fr_l * MACs_l over the others, all T timesteps; fr_l the mean |value|
        ann     = 4.6 pJ * MACs of one timestep

    The stem, whose input is the analog image, counts T times, or once with `share_stem`. Layers with fractional input
    (average pooling of spikes) count as MACs. Sums of spikes, ternary and integer spikes count by their absolute value.
    Analog output of a neuron counts as MACs, and so do the products inside a parallel spiking neuron.
    """
    spiking: float
    ann: float
    macs: int  # multiply-accumulates of the spiking network
    additions: float  # additions of the spiking network
    ann_macs: int

    @property
    def ratio(self) -> float:
        """Spiking energy divided by real-valued energy."""
        return self.spiking / self.ann


def estimate_energy(model: nn.Module, images: torch.Tensor) -> Energy:
    """Estimate the energy of a spiking model's arithmetic, and of the same network with one real-valued timestep.

    Args:
        model: Spiking model.
        images: Real images in the model's input format, on its device. The firing rates are measured on them.

    Returns:
        Energy per image.
    """
    shares = count_macs(model, images)
    frames = images[:, :1] if images.ndim == 5 else images
    with untouched(model), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # some neurons change with one timestep, which does not affect the count
        model.set_timesteps(1)
        ann = count_macs(model, frames[:1])
    own = (ann.by_module.get(name, {}) for name, m in model.named_modules() if isinstance(m, SpikingNeuron))
    ann_macs = ann.total - sum(sum(macs.values()) for macs in own)  # an activation takes none
    macs = shares.total - shares.whole
    return Energy(
        (MAC_PJ * macs + AC_PJ * shares.additions) * 1e-6, MAC_PJ * ann_macs * 1e-6, macs, shares.additions, ann_macs)
