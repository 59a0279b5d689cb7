from . import models  # registers the architectures that timm lacks, before their spiking_ twins
from . import registry as _registry  # importing it registers the spiking_ names with timm
from .activations import register_activation, unregister_activation
from .ann import convert_ann
from .calibrate import calibrate
from .convert import convert_to_spiking
from .fold import fold_gains
from .losses import create_loss, list_losses, nce_loss, register_loss
from .neurons import LIF, lif
from .report import record_spikes
from .representation import representation_bits
from .similarity import cka, hsic
from .sscl import SSCLLoss
from .stem import share_stem
from .stem_pool import set_stem_pool
from .task import SSCLTask
from . import tracing as _tracing  # tells timm which parts torch.fx takes as one node

__version__ = '0.1.0'
