from .conversion import SpikingReport
from .firing import FiringRates
from .macs import MacShares, count_macs
