from .backend import lif_backend
from .lif import LIF, lif
from .packing import packed_spikes
from .surrogate import rectangle_window

__all__ = ['LIF', 'lif', 'lif_backend', 'packed_spikes', 'rectangle_window']
