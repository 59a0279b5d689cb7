"""Check the options of the neuron and its thresholds against what is registered."""
import argparse
import math
from typing import Any, Dict

from timm_sscl.conversion import list_variants
from timm_sscl.conversion.scales.gains import RMS, calibration_rule
from timm_sscl.conversion.from_ann.qcfs import QCFS_THRESHOLD
from timm_sscl.conversion.from_ann.thresholds import PERCENTILE, conversion_rule
from timm_sscl.neurons import list_neurons, list_surrogates

from ..errors import OptionError
from .option_types import not_registered

__all__ = ['check_threshold_options', 'neuron_arguments']


def check_threshold_options(args: argparse.Namespace) -> None:
    """Check --threshold-rule, --threshold-factor and --qcfs-threshold, after plug-ins were imported.

    Raises:
        OptionError: The rule is unknown or does not fit --neuron-init, the factor is out of range, or an option is
            given that changes nothing.
    """
    rule, factor = args.threshold_rule, args.threshold_factor
    if not 0 < factor < math.inf:
        raise OptionError(f'--threshold-factor {factor}: must be a finite number above 0.')
    if args.qcfs is None and args.qcfs_threshold != QCFS_THRESHOLD:
        raise OptionError(f'--qcfs-threshold {args.qcfs_threshold}: goes with --qcfs LEVELS.')
    if args.neuron_init == 'none' and (rule is not None or factor != 1.):
        given = f'--threshold-rule {rule}' if rule else f'--threshold-factor {factor}'
        raise OptionError(f'{given}: --neuron-init none measures no thresholds.')
    try:
        if args.neuron_init == 'calibrated':
            calibration_rule(rule or RMS, factor)
        elif args.neuron_init == 'ann':
            conversion_rule(rule or PERCENTILE, args.ann_percentile, factor)
    except (TypeError, ValueError) as error:
        raise OptionError(f'--neuron-init {args.neuron_init} --threshold-rule {rule}: {error}') from error


def neuron_arguments(args: argparse.Namespace) -> Dict[str, Any]:
    """Return the given options of neuron and variants as arguments of create_model and convert_to_spiking.

    Raises:
        OptionError: The neuron, the surrogate or a variant is not registered.
    """
    for name, known in (('neuron', list_neurons()), ('surrogate', list_surrogates()),
                        ('norm', list_variants('norm')), ('residual', list_variants('residual'))):
        value = getattr(args, name)
        if value is not None and value not in known:
            raise not_registered(name, value, known)
    names = ('timesteps', 'tau', 'v_threshold', 'v_reset', 'detach_reset', 'neuron', 'neuron_kwargs', 'surrogate',
             'surrogate_kwargs', 'norm', 'norm_kwargs', 'residual', 'residual_kwargs')
    return {name: getattr(args, name) for name in names if getattr(args, name) not in (None, {})}
