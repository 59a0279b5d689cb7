from .firing import FiringRates
