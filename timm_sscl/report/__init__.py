from .firing import FiringRates
from .macs import MacShares, count_macs
