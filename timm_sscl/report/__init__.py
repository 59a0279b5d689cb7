from .conversion import SpikingReport
from .energy import Energy, estimate_energy
from .firing import FiringRates, mean_per_step
from .macs import MacShares, count_macs
from .spikes import SpikeRecord, record_spikes
