from .lif import LIF, lif
from .surrogate import rectangle_window

__all__ = ['LIF', 'lif', 'rectangle_window']
