"""Convert a model to a spiking network: choose activations, replace them by neurons, fold time into the batch, keep
settings and state, set gains and thresholds.

`variants` holds the options that change more than the activation.
"""
from .finding import tracing as _tracing  # noqa: F401, tells timm which parts torch.fx takes as one node
from .finding.activations import register_activation, unregister_activation
from .convert import SOFT_RESET, convert_to_spiking
from .over_time.encoding import poisson_input
from .scales.gain_folding import fold_gains
from .scales.gains import calibrate
from .scales.norm_folding import fold_norms
from .model import SpikingModel, SpikingModule
from .finding.plan import ConversionRecord
from .from_ann.qcfs import QCFS, convert_to_qcfs
from .report import SpikingReport
from .rules import (
    ThresholdRule, list_threshold_rules, register_threshold_rule, unregister_threshold_rule)
from .settings import SpikingSettings
from .from_ann.thresholds import convert_ann
from .variants import bntt as _bntt, ds as _ds, ms as _ms, sew as _sew  # noqa: F401, they register themselves
from .variants import mpbn as _mpbn, tab as _tab, tdbn as _tdbn, tebn as _tebn  # noqa: F401, likewise
from .variants.base import PerStepSettings, Variant, VariantRecord, VariantSettings
from .variants.batch_norms import BatchNormOverTime, BatchNormVariant
from .variants.resnet_blocks import ResidualVariant, last_act, residual_branch
from .variants.registry import list_variants, register_variant, unregister_variant
from .variants.shared_stem import share_stem
from .variants.stem_pool import set_stem_pool

__all__ = [
    'BatchNormOverTime', 'BatchNormVariant', 'ConversionRecord', 'PerStepSettings', 'QCFS', 'ResidualVariant',
    'SOFT_RESET', 'SpikingModel', 'SpikingModule', 'SpikingReport', 'SpikingSettings', 'ThresholdRule', 'Variant',
    'VariantRecord', 'VariantSettings', 'calibrate', 'convert_ann', 'convert_to_qcfs', 'convert_to_spiking',
    'fold_gains', 'fold_norms', 'last_act', 'list_threshold_rules', 'list_variants', 'poisson_input',
    'register_activation', 'register_threshold_rule', 'register_variant', 'residual_branch', 'set_stem_pool',
    'share_stem', 'unregister_activation', 'unregister_threshold_rule', 'unregister_variant',
]
