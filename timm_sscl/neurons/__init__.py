"""One neuron per file; `kernels` holds the recursion over time and what makes it fast."""
from .kernels.backend import lif_backend
from .kernels.packing import packed_spikes
from .lif import LIF, lif
from .surrogate import rectangle_window

__all__ = ['LIF', 'lif', 'lif_backend', 'packed_spikes', 'rectangle_window']
