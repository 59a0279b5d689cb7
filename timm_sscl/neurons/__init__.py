"""One neuron per file, found by name; `kernels` holds the recursion over time and what makes it fast."""
from .base import NeuronSettings, SpikingNeuron
from .kernels.backend import lif_backend
from .kernels.packing import packed_spikes
from .lif import LIF, lif
from .registry import create_neuron, list_neurons, neuron_class, neuron_name, register_neuron, unregister_neuron
from .surrogate import (
    list_surrogates, rectangle_window, register_surrogate, spike, surrogate_name, unregister_surrogate)
from .surrogate_shapes import triangle

__all__ = [
    'LIF', 'NeuronSettings', 'SpikingNeuron', 'create_neuron', 'lif', 'lif_backend', 'list_neurons', 'list_surrogates',
    'neuron_class', 'neuron_name', 'packed_spikes', 'rectangle_window', 'register_neuron', 'register_surrogate',
    'spike', 'surrogate_name', 'triangle', 'unregister_neuron', 'unregister_surrogate']
