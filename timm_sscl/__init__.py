from .neurons import LIF, lif
from .representation import representation_bits
from .similarity import cka, hsic
