"""Measure a spiking model: firing rates, recorded spikes, MACs, energy, bound on the representation."""
from .energy import Energy, estimate_energy
from .firing import FiringRates, mean_per_step
from .macs import MacShares, count_macs
from .representation import representation_bits, spike_entropy
from .spikes import SpikeRecord, record_spikes

__all__ = [
    'Energy', 'FiringRates', 'MacShares', 'SpikeRecord', 'count_macs', 'estimate_energy', 'mean_per_step',
    'record_spikes', 'representation_bits', 'spike_entropy',
]
