"""Add the options of the neuron, the teacher and the losses. This does not import torch."""
import argparse

from .declared import constant, settings
from .loss_flags import add_loss_flags
from .option_types import KeyValues, home_path, reset_potential

__all__ = ['add_spiking_options', 'add_distillation_options']

_QCFS_THRESHOLD = constant('conversion.from_ann.qcfs', 'QCFS_THRESHOLD')
_FRAMES = constant('distillation.frames_ann', 'FRAMES')
_PRESETS = constant('distillation.presets', 'PRESETS')


def add_spiking_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the neuron and the conversion."""
    group = parser.add_argument_group('Spiking neuron parameters')
    group.add_argument('--timesteps', '-T', type=int, default=None,
                       help='timesteps T (default: 4; a checkpoint\'s own)')
    _add_neuron_options(group)
    group.add_argument('--neuron-init', default='calibrated', choices=['calibrated', 'ann', 'none'],
                       help='before training: an input gain per layer measured on real images; thresholds from the '
                            'weights\' own ANN (ReLU networks, integrate-and-fire); or nothing')
    group.add_argument('--ann-percentile', type=float, default=100., metavar='P',
                       help='--neuron-init ann: percentile of the ANN\'s activations that is the threshold')
    group.add_argument('--threshold-rule', default=None, metavar='NAME',
                       help='rule of --neuron-init: rms or spike_norm for calibrated; percentile, ltb or '
                            'spike_norm for ann; a plug-in may register others (default: rms; percentile for ann)')
    group.add_argument('--threshold-factor', type=float, default=1., metavar='F',
                       help='factor on the thresholds that --neuron-init measures; 0.7 with spike_norm starts hybrid '
                            'training')
    group.add_argument('--qcfs', type=int, default=None, metavar='LEVELS',
                       help='train an ANN whose ReLUs are QCFS activations with this number of levels, for convert_ann')
    group.add_argument('--qcfs-threshold', type=float, default=_QCFS_THRESHOLD, metavar='V',
                       help='--qcfs: initial threshold; it is trained')
    _add_variant_options(group)
    group.add_argument('--stem-pool', default=None, choices=['avg'],
                       help='average pooling in a ResNet\'s stem, as in the paper; the student\'s own ANN has it too')
    group.add_argument('--share-stem', action='store_true',
                       help='run what comes before the first neuron once per image, where a probe finds that legal')
    group.add_argument('--pack-spikes', action='store_true',
                       help='keep spikes as bits for the backward: less memory, more time')
    group.add_argument('--neuron-include', nargs='+', default=None, metavar='PATTERN',
                       help='only these activations become neurons: names or classes, of modules around them too')
    group.add_argument('--neuron-exclude', nargs='+', default=None, metavar='PATTERN',
                       help='these stay analog; also attention, squeeze_excite, head')
    group.add_argument('--allow-analog', action='store_true', default=None,
                       help='train a model of your own whose nonlinear operations are not all known activations; they '
                            'stay analog, the report lists them')


def _add_neuron_options(group: argparse._ArgumentGroup) -> None:
    """Add the options of the neuron, its surrogate, and the LIF, with the help texts of its settings."""
    group.add_argument('--neuron', default=None, metavar='NAME',
                       help='neuron that the activations become; a plug-in may register others (default: lif)')
    group.add_argument('--neuron-kwargs', nargs='*', default={}, action=KeyValues, metavar='KEY=VALUE',
                       help='options of the neuron')
    lif = {**settings('neurons.settings', 'NeuronSettings'), **settings('neurons.lif', 'LIF.Settings')}
    for name, option in (('tau', dict(type=float)), ('v_threshold', dict(type=float)),
                         ('v_reset', dict(type=reset_potential)), ('detach_reset', dict(action='store_true'))):
        default = lif[name].default
        text = f'{lif[name].help} (default: {default})'
        group.add_argument(f'--{name.replace("_", "-")}', default=None, help=text, **option)
    group.add_argument('--surrogate', default=None, metavar='NAME',
                       help=f'{lif["surrogate"].help} (default: the neuron\'s own; '
                            f'{lif["surrogate"].default} for the LIF)')
    group.add_argument('--surrogate-kwargs', nargs='*', default={}, action=KeyValues, metavar='KEY=VALUE',
                       help=lif['surrogate_kwargs'].help)


def _add_variant_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument('--norm', default=None, metavar='NAME',
                       help='what the batch norms become: tdbn (best with --neuron-init none), tebn, bntt, tab, mpbn')
    group.add_argument('--norm-kwargs', nargs='*', default={}, action=KeyValues, metavar='KEY=VALUE',
                       help='options of the norm')
    group.add_argument('--residual', default=None, metavar='NAME',
                       help='how the branches of residual blocks join: sew, ms, ds')
    group.add_argument('--residual-kwargs', nargs='*', default={}, action=KeyValues, metavar='KEY=VALUE',
                       help='options of the residual')


def add_distillation_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the teacher and the losses."""
    group = parser.add_argument_group('Teacher and distillation parameters')
    group.add_argument('--teacher', type=home_path, default=None, metavar='NAME',
                       help='teacher model (default: the student\'s own ANN)')
    group.add_argument('--kd-model-name', type=home_path, default=None, metavar='NAME',
                       help='timm\'s: --teacher NAME --distill kd')
    group.add_argument('--teacher-checkpoint', type=home_path, default=None, metavar='FILE',
                       help='weights of the teacher')
    group.add_argument('--teacher-pretrained', action='store_true', help='start from timm\'s pretrained weights')
    group.add_argument('--teacher-epochs', type=int, default=None, metavar='N',
                       help='epochs to train the teacher for where there are no weights for it (default: --epochs)')
    group.add_argument('--teacher-size', type=int, nargs=2, default=None, metavar=('H', 'W'),
                       help='size of the teacher\'s images, resized from the student\'s (default: the same)')
    group.add_argument('--teacher-frames', default=_FRAMES[0], choices=_FRAMES,
                       help='of event data, the teacher sees each frame and its outputs are averaged, or sees their '
                            'mean')
    group.add_argument('--teacher-mean', type=float, nargs='+', default=None, metavar='MEAN',
                       help='mean that the teacher\'s images were normalised by in its training (default: the '
                            'student\'s)')
    group.add_argument('--teacher-std', type=float, nargs='+', default=None, metavar='STD',
                       help='likewise, standard deviation (default: the student\'s)')
    group.add_argument('--teacher-cache', action='store_true',
                       help='ask the teacher once per training image and keep its features on disk; needs --no-aug')
    group.add_argument('--teacher-kwargs', nargs='*', default={}, action=KeyValues,
                       help='arguments of the teacher\'s architecture (default: --model-kwargs where it is the '
                            'student\'s own ANN)')
    group.add_argument('--distill', default=None, choices=list(_PRESETS),
                       help='what is added to cross-entropy: sscl, contrastive (uniform weights), kd or none (default: '
                            'sscl; kd with --kd-model-name)')
    group.add_argument('--loss', default=None, metavar='NAME=WEIGHT,...',
                       help='losses by name instead of --distill, for example sscl=0.1,kd=1')
    group.add_argument('--loss-file', type=home_path, default=None, metavar='FILE',
                       help='the same as --plugin for one file, as in version 0.1.0')
    group.add_argument('--plugin', type=home_path, default=None, nargs='+', metavar='FILE|MODULE',
                       help='Python files or modules with your own models (timm\'s @register_model), losses, neurons, '
                            'surrogates, norms, residuals and data sets; --help lists them, too')
    _add_loss_options(group)


def _add_loss_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument('--sscl-weight', type=float, default=0.1,
                       help='weight of the sscl or contrastive loss; 1 in the paper')
    add_loss_flags(group)
    group.add_argument('--sscl-taps', default='4', metavar='N|NAMES',
                       help='how many of the last stages to compare (and the pooled feature), or their names: '
                            'layer3,pooled; names of modules, layer1.0.act1, are read by hooks')
    group.add_argument('--sscl-teacher-taps', default=None, metavar='NAMES',
                       help='the teacher\'s stages or modules (default: the student\'s)')
    group.add_argument('--kd-weight', '--distill-loss-weight', type=float, default=None,
                       help='weight of the kd loss (default: 1; 1 - --task-loss-weight where only that is given)')
    group.add_argument('--task-loss-weight', type=float, default=None,
                       help='weight of the classification loss (default: 1)')
    group.add_argument('--kd-distill-type', default='logit', choices=['logit'],
                       help='timm\'s logit distillation is kd here')
    group.add_argument('--kd-loss-type', default='kl', choices=['kl'], help='divergence of the kd loss')
