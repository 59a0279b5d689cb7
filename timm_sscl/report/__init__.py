"""Measure a spiking model and draw it: firing rates, spikes, MACs, energy, similarity to its teacher."""
from .energy import Energy, LayerEnergy, estimate_energy
from .firing import FiringRates, mean_per_step
from .macs import MacShares, count_macs
from .plots import plot_cka_map, plot_energy, plot_firing_rates, plot_raster
from .representation import representation_bits, spike_entropy
from .similarity import CKAMap, cka_map
from .spikes import SpikeRecord, record_spikes

__all__ = [
    'CKAMap', 'Energy', 'FiringRates', 'LayerEnergy', 'MacShares', 'SpikeRecord', 'cka_map', 'count_macs',
    'estimate_energy', 'mean_per_step', 'plot_cka_map', 'plot_energy', 'plot_firing_rates', 'plot_raster',
    'record_spikes', 'representation_bits', 'spike_entropy',
]
