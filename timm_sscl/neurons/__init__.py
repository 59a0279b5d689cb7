"""Spiking neurons, one per file, found by name. `kernels` contains the recursion over time and its fast implementation.
"""
from .base import NeuronSettings, SpikingNeuron
from .kernels.backend import lif_backend
from .kernels.packing import packed_spikes
from .alif import ALIF, MultiGaussianALIF
from .diet import Diet
from .glif import GLIF
from .ilif import ILIF
from .integrate_and_fire import IF
from .klif import KLIF
from .liaf import LIAF
from .lif import LIF, lif
from .ltmd import LTMD
from .mlf import MLF
from .plif import PLIF
from .psn import PSN, MaskedPSN, SlidingPSN
from .real_spike import RealSpike
from .registry import create_neuron, list_neurons, neuron_class, neuron_name, register_neuron, unregister_neuron
from .settings import ResetSettings
from .surrogate import (
    list_surrogates, rectangle_window, register_surrogate, spike, surrogate_name, unregister_surrogate)
from .surrogate_shapes import triangle
from .ternary import Ternary

__all__ = [
    'ALIF', 'Diet', 'GLIF', 'IF', 'ILIF', 'KLIF', 'LIAF', 'LIF', 'LTMD', 'MLF', 'MaskedPSN', 'MultiGaussianALIF',
    'NeuronSettings', 'PLIF', 'PSN', 'RealSpike', 'ResetSettings', 'SlidingPSN', 'SpikingNeuron', 'Ternary',
    'create_neuron', 'lif', 'lif_backend', 'list_neurons', 'list_surrogates', 'neuron_class', 'neuron_name',
    'packed_spikes', 'rectangle_window', 'register_neuron', 'register_surrogate', 'spike', 'surrogate_name', 'triangle',
    'unregister_neuron', 'unregister_surrogate']
