"""Spiking neural networks from timm models, trained with their real-valued twins as teachers (SSCL)."""
from timm_sscl import _moved
from timm_sscl import models  # noqa: F401, registers the architectures that timm lacks, before their spiking_ twins
from timm_sscl.conversion import (
    Variant, calibrate, convert_ann, convert_to_qcfs, convert_to_spiking, fold_gains, fold_norms, list_threshold_rules,
    list_variants, poisson_input, register_activation, register_threshold_rule, register_variant, set_stem_pool,
    share_stem, unregister_activation, unregister_threshold_rule, unregister_variant)
from timm_sscl.data import list_datasets, register_dataset, unregister_dataset
from timm_sscl.distillation import SSCLLoss, SSCLTask, accept_frames
from timm_sscl.losses import TrainStep, cka, create_loss, hsic, list_losses, nce_loss, register_loss, unregister_loss
from timm_sscl.models import load
from timm_sscl.models import spiking as _spiking_names  # noqa: F401, registers the spiking_ names with timm
from timm_sscl.neurons import (
    LIF, SpikingNeuron, lif, list_neurons, list_surrogates, register_neuron, register_surrogate, unregister_neuron,
    unregister_surrogate)
from timm_sscl.report import (
    FiringRates, cka_map, estimate_energy, plot_cka_map, plot_energy, plot_firing_rates, plot_raster, record_spikes,
    representation_bits)

__all__ = [
    'FiringRates', 'LIF', 'SSCLLoss', 'SSCLTask', 'SpikingNeuron', 'TrainStep', 'Variant', 'accept_frames', 'calibrate',
    'cka', 'cka_map', 'convert_ann', 'convert_to_qcfs', 'convert_to_spiking', 'create_loss', 'estimate_energy',
    'fold_gains', 'fold_norms', 'hsic', 'lif', 'list_datasets', 'list_losses', 'list_neurons', 'list_surrogates',
    'list_threshold_rules', 'list_variants', 'load', 'nce_loss', 'plot_cka_map', 'plot_energy', 'plot_firing_rates',
    'plot_raster', 'poisson_input', 'record_spikes', 'register_activation', 'register_dataset', 'register_loss',
    'register_neuron', 'register_surrogate', 'register_threshold_rule', 'register_variant', 'representation_bits',
    'set_stem_pool', 'share_stem', 'unregister_activation', 'unregister_dataset', 'unregister_loss',
    'unregister_neuron', 'unregister_surrogate', 'unregister_threshold_rule', 'unregister_variant',
]
__version__ = '0.1.0'

_moved.install()
