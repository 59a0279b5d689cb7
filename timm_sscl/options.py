"""Command line of train.py: timm's options with its defaults, ours, and the layers recipe < config < command line."""
import argparse
import difflib
import os
from importlib import resources
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import yaml

from timm.utils import ParseKwargs

from .data.events.aedat import AXES
from .data.events.factory import is_event_dataset
from .data.events.frames import BY, MODES, FrameSettings
from .errors import OptionError
from .losses import create_loss, loss_needs
from .losses.sscl import CRITICS, PROJECTIONS, WEIGHTINGS
from .option_ranges import check_counts
from .plugins import import_plugin
from .similarity import CKA_SCOPES
from .task import PRESETS, resolve_losses

__all__ = ['parse_args', 'create_parser', 'list_recipes', 'load_recipe', 'UNSUPPORTED', 'OptionError']

DIGITS_RECIPE = 'digits'
ARGS_FILE = 'args.yaml'  # in a run's folder
AUTO = 'auto'  # of --resume


# timm's options that are refused when given, with the reason; README lists them under "Differences"
UNSUPPORTED: Dict[str, str] = {
    'kd_student_feature_dim': 'SSCL reads the feature widths off the models; --sscl-dim sets the projections',
    'kd_teacher_feature_dim': 'SSCL reads the feature widths off the models; --sscl-dim sets the projections',
    'kd_token_distill_type': 'token distillation is not part of this script',
    'torchscript': 'spiking models do not support TorchScript; use --torchcompile',
    'fuser': 'a TorchScript setting; spiking models do not support TorchScript',
    'aug_repeats': 'repeated augmentation needs timm\'s distributed sampler; Accelerate shards the data here',
    'aug_splits': 'augmentation splits need split batch norm, which would split time steps',
    'jsd_loss': 'needs --aug-splits',
    'resplit': 'needs --aug-splits: samples are augmented one by one, whatever their place in the batch',
    'split_bn': 'would split time steps instead of samples',
    'use_multi_epochs_loader': 'Accelerate owns the loaders; workers persist already',
    'tta': 'test time augmentation is not part of this script',
    'train_img_sizes': 'scheduled image sizes are not part of this script',
    'train_batch_sizes': 'scheduled image sizes are not part of this script',
    'train_size_probs': 'scheduled image sizes are not part of this script',
    'train_size_schedule': 'scheduled image sizes are not part of this script',
    'train_size_schedule_spread': 'scheduled image sizes are not part of this script',
    'train_size_random_mix': 'scheduled image sizes are not part of this script',
    'train_batches_per_epoch': 'scheduled image sizes are not part of this script',
    'variable_batch_loss_scale': 'scheduled image sizes are not part of this script',
    'naflex_loader': 'NaFlex batches are dictionaries; spiking models take tensors',
    'naflex_train_seq_lens': 'NaFlex batches are dictionaries; spiking models take tensors',
    'naflex_max_seq_len': 'NaFlex batches are dictionaries; spiking models take tensors',
    'naflex_patch_sizes': 'NaFlex batches are dictionaries; spiking models take tensors',
    'naflex_patch_size_probs': 'NaFlex batches are dictionaries; spiking models take tensors',
    'naflex_loss_scale': 'NaFlex batches are dictionaries; spiking models take tensors',
    'naflex_patchify_channels_first': 'NaFlex batches are dictionaries; spiking models take tensors',
    'log_wandb': 'Accelerate owns the trackers: --report-to wandb',
    'wandb_project': 'Accelerate owns the trackers: --report-to wandb and wandb\'s own environment variables',
    'wandb_tags': 'Accelerate owns the trackers: --report-to wandb and wandb\'s own environment variables',
    'wandb_resume_id': 'Accelerate owns the trackers: --report-to wandb and wandb\'s own environment variables',
}


# options that say how images are read or changed, or what event frames cannot go through
IMAGE_ONLY = (
    'class_map', 'input_img_mode', 'input_key', 'target_key', 'img_size', 'crop_pct', 'interpolation', 'epoch_repeats',
    'train_crop_mode', 'scale', 'ratio', 'vflip', 'color_jitter', 'color_jitter_prob', 'grayscale_prob',
    'gaussian_blur_prob', 'aa', 'reprob', 'remode', 'recount', 'cutmix', 'cutmix_minmax',
    'train_interpolation', 'share_stem', 'save_images', 'eval_timesteps')


def list_recipes() -> List[str]:
    """Names of the recipes that --config finds; names with an underscore in front are parts of recipes."""
    folder = resources.files('timm_sscl') / 'configs'
    return sorted(f.name[:-len('.yaml')] for f in folder.iterdir() if f.name.endswith('.yaml') and f.name[0] != '_')


def load_recipe(name: str, inside: Tuple[str, ...] = ()) -> Dict[str, Any]:
    """Options of a recipe, by its name or as a YAML file.

    `base: NAME` in it, or a list of names, stands for the options of other recipes; the later ones win, its own most.

    Args:
        name: Recipe or file.
        inside: Recipes whose base this is.

    Raises:
        OptionError: There is no such recipe or file, it is no YAML mapping, or is its own base.
    """
    if name in inside:
        raise OptionError(f"--config: recipe '{name}' has itself as a base ({' -> '.join([*inside, name])}).")
    text = _recipe_text(name)
    try:
        options = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise OptionError(f"--config: '{name}' is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(options, dict):
        raise OptionError(f"--config: '{name}' must map option names to values.")
    bases = options.pop('base', [])
    result: Dict[str, Any] = {}
    for base in [bases] if isinstance(bases, str) else bases:
        result.update(load_recipe(base, (*inside, name)))
    return {**result, **{key.replace('-', '_'): value for key, value in options.items()}}


def _recipe_text(name: str) -> str:
    path, shipped = Path(name).expanduser(), resources.files('timm_sscl') / 'configs' / f'{name}.yaml'
    if path.suffix in ('.yaml', '.yml') or path.is_file():
        if not path.is_file():
            raise OptionError(f"--config: file '{name}' does not exist.")
        return path.read_text()
    if path.name == name and shipped.is_file():
        return shipped.read_text()
    raise OptionError(f"--config: unknown recipe '{name}'; there are {', '.join(list_recipes())}, or give a YAML file.")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise OptionError(message)


def home_path(text: str) -> str:
    """Type of options that name a file or folder: ~ is the home folder, as in a shell; $VAR is left alone."""
    scheme, colon, path = text.partition(':')
    if colon and scheme == 'local-dir':  # timm's model names
        return scheme + colon + os.path.expanduser(path)
    return os.path.expanduser(text)


class _ParseKwargs(ParseKwargs):
    def __call__(self, parser, namespace, values, option_string=None):
        if not all('=' in value for value in values):
            parser.error(f'{option_string} {" ".join(values)}: takes KEY=VALUE pairs.')
        super().__call__(parser, namespace, values, option_string)


def create_parser() -> argparse.ArgumentParser:
    """Parser of all options, grouped as timm's."""
    parser = _Parser(
        description='Train a spiking timm model with its real-valued twin as the teacher (SSCL)', allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--config', '-c', type=home_path, default=None, metavar='NAME|FILE',
                        help='recipe by name, or a YAML file')
    for add in (_add_spiking, _add_distillation, _add_dataset, _add_events, _add_model, _add_device, _add_optimizer,
                _add_schedule, _add_augmentation, _add_batch_norm, _add_ema, _add_misc, _add_refused):
        add(parser)
    return parser


def _add_spiking(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Spiking neuron parameters')
    group.add_argument('--timesteps', '-T', type=int, default=None, help='time steps T (4; a checkpoint\'s own)')
    group.add_argument('--tau', type=float, default=None, help='decay factor of the membrane (0.25)')
    group.add_argument('--v-threshold', type=float, default=None, help='firing threshold (0.5)')
    group.add_argument('--v-reset', type=_v_reset, default=None, help='reset potential (0.), or soft')
    group.add_argument('--detach-reset', action='store_true', default=None, help='no gradient through the reset')
    group.add_argument('--neuron-init', default='calibrated', choices=['calibrated', 'ann', 'none'],
                       help='before training: an input gain per layer measured on real images; thresholds from the '
                            'weights\' own ANN (ReLU networks, integrate-and-fire); or nothing')
    group.add_argument('--ann-percentile', type=float, default=100., metavar='P',
                       help='--neuron-init ann: percentile of the ANN\'s activations that is the threshold')
    group.add_argument('--norm', default=None, choices=['tdbn'],
                       help='batch norms become tdBN, which scales by the threshold (best with --neuron-init none)')
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


def _v_reset(text: str):
    return text if text == 'soft' else float(text)


def _add_distillation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Teacher and distillation parameters')
    group.add_argument('--teacher', type=home_path, default=None, metavar='NAME',
                       help='teacher model (the student\'s own ANN)')
    group.add_argument('--kd-model-name', type=home_path, default=None, metavar='NAME',
                       help='timm\'s: --teacher NAME --distill kd')
    group.add_argument('--teacher-checkpoint', type=home_path, default=None, metavar='FILE',
                       help='weights of the teacher')
    group.add_argument('--teacher-pretrained', action='store_true', help='start from timm\'s pretrained weights')
    group.add_argument('--teacher-epochs', type=int, default=None, metavar='N',
                       help='epochs to train the teacher for where there are no weights for it (--epochs)')
    group.add_argument('--teacher-size', type=int, nargs=2, default=None, metavar=('H', 'W'),
                       help='size of the teacher\'s images, resized from the student\'s (the same)')
    group.add_argument('--teacher-mean', type=float, nargs='+', default=None, metavar='MEAN',
                       help='mean that the teacher\'s images were normalised by in its training (the student\'s)')
    group.add_argument('--teacher-std', type=float, nargs='+', default=None, metavar='STD', help='likewise, deviation')
    group.add_argument('--teacher-cache', action='store_true',
                       help='ask the teacher once per training image and keep its features on disk; needs --no-aug')
    group.add_argument('--teacher-kwargs', nargs='*', default={}, action=_ParseKwargs,
                       help='model kwargs of the teacher (--model-kwargs where it is the student\'s own ANN)')
    group.add_argument('--distill', default=None, choices=list(PRESETS),
                       help='what is added to cross-entropy: sscl (default), contrastive (uniform weights), kd or none')
    group.add_argument('--loss', default=None, metavar='NAME=WEIGHT,...',
                       help='losses by name instead of --distill, for example sscl=0.1,kd=1')
    group.add_argument('--loss-file', type=home_path, default=None, metavar='FILE',
                       help='Python file with your own @register_loss losses')
    group.add_argument('--plugin', type=home_path, default=None, nargs='+', metavar='FILE|MODULE',
                       help='Python files or modules with your own models (timm\'s @register_model) and losses')
    group.add_argument('--sscl-weight', type=float, default=0.1,
                       help='weight of the sscl or contrastive loss (1: the paper)')
    group.add_argument('--sscl-temperature', type=float, default=0.2, help='temperature of the critic')
    group.add_argument('--sscl-dim', type=int, default=128, help='common dimension of the projections')
    group.add_argument('--sscl-critic', default='infonce', choices=CRITICS,
                       help='contrastive critic; normalized is the paper\'s, literal its formula to the letter')
    group.add_argument('--sscl-weighting', default='cka', choices=WEIGHTINGS,
                       help='weights in the sscl loss: 1/CKA, 1, 1/CKA scaled to mean 1, the mean of 1/CKA for each')
    group.add_argument('--sscl-projection', default='pooled', choices=PROJECTIONS,
                       help='what the projections see: features pooled over space and time, or the whole of them')
    group.add_argument('--sscl-queue', type=int, default=0, metavar='N',
                       help='further negatives: the teacher\'s last N rows, also over accumulated micro-batches')
    group.add_argument('--sscl-taps', default='4', metavar='N|NAMES',
                       help='how many of the last stages to compare (and the pooled feature), or their names: '
                            'layer3,pooled; names of modules, layer1.0.act1, are read by hooks')
    group.add_argument('--sscl-teacher-taps', default=None, metavar='NAMES', help='the teacher\'s, where they differ')
    group.add_argument('--sscl-cka-floor', type=float, default=0.1, help='CKA is not taken below this')
    group.add_argument('--sscl-cka-momentum', type=float, default=0.1,
                       help='share of the newest batch in the running CKA')
    group.add_argument('--sscl-cka-scope', default='process', choices=CKA_SCOPES,
                       help='with several processes: the mean of their own CKA terms, or those of the global batch')
    group.add_argument('--kd-weight', '--distill-loss-weight', type=float, default=None,
                       help='weight of the kd loss (1, or 1 - --task-loss-weight where only that is given)')
    group.add_argument('--kd-temperature', type=float, default=4., help='temperature of the kd loss')
    group.add_argument('--kd-step-temperature', type=float, default=3., help='temperature of the kd_step loss')
    group.add_argument('--tet-lambda', type=float, default=0.05,
                       help='share of the tet loss that holds the outputs near 1; 0 is cross-entropy per step')
    group.add_argument('--firing-rate-target', type=float, nargs='+', default=[0.05, 0.25], metavar='RATE',
                       help='of the firing_rate loss: the rate of every layer, or the ends of a band')
    group.add_argument('--task-loss-weight', type=float, default=None, help='weight of the classification loss (1)')
    group.add_argument('--kd-distill-type', default='logit', choices=['logit'],
                       help='timm\'s logit distillation is kd here')
    group.add_argument('--kd-loss-type', default='kl', choices=['kl'], help='divergence of the kd loss')


def _add_dataset(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Dataset parameters')
    group.add_argument('data', nargs='?', type=home_path, metavar='DIR', default=None, help=argparse.SUPPRESS)
    group.add_argument('--data-dir', type=home_path, metavar='DIR', default=None, help='root of the data set')
    group.add_argument('--dataset', metavar='NAME', default='', help='data set type and name; digits is bundled')
    group.add_argument('--train-split', metavar='NAME', default='train')
    group.add_argument('--val-split', metavar='NAME', default='validation')
    group.add_argument('--train-num-samples', default=None, type=int, metavar='N')
    group.add_argument('--val-num-samples', default=None, type=int, metavar='N')
    group.add_argument('--dataset-download', action='store_true', help='allow the download of torch/ and hfds/ data')
    group.add_argument('--class-map', default='', type=home_path, metavar='FILE')
    group.add_argument('--input-img-mode', default=None, type=str)
    group.add_argument('--input-key', default=None, type=str)
    group.add_argument('--target-key', default=None, type=str)
    group.add_argument('--dataset-trust-remote-code', action='store_true')


def _add_events(parser: argparse.ArgumentParser) -> None:
    default = FrameSettings()
    group = parser.add_argument_group(
        'Event data parameters', 'for --dataset events/digits, events/cifar10dvs and tonic/NAME; --timesteps is the '
                                 f'number of frames ({default.timesteps}), --hflip mirrors a sequence')
    group.add_argument('--event-frames', default=default.by, choices=BY,
                       help='frames of equally many events, or of equal time')
    group.add_argument('--event-mode', default=default.mode, choices=MODES,
                       help='a pixel is 1 where any event fell, or the number of events')
    group.add_argument('--event-size', type=int, default=default.size, metavar='N',
                       help='height and width of the frames (the sensor\'s); binary takes the nearest pixel, count '
                            'adds up')
    group.add_argument('--event-roll', type=int, default=5, metavar='N',
                       help='training sequences are shifted by up to so many pixels, around the edge')
    group.add_argument('--event-split', default='last100', metavar='NAME',
                       help='validation part of data without a split: last100 or first100 (or another number) of every '
                            'class, or random, a tenth; random1, random2, ... are other draws')
    group.add_argument('--event-axes', default=default.axes, choices=AXES,
                       help='whose axes and polarity AEDAT 2.0 files are read with')


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Model parameters')
    group.add_argument('--model', default='spiking_resnet18', type=home_path, metavar='MODEL', help='student')
    group.add_argument('--pretrained', action='store_true', help='start the student from the ANN\'s pretrained weights')
    group.add_argument('--pretrained-path', default=None, type=home_path, help='pretrained weights from this file')
    group.add_argument('--initial-checkpoint', default='', type=home_path, metavar='PATH')
    group.add_argument('--resume', default='', type=home_path, metavar='auto|PATH',
                       help='folder of a run, or a checkpoint file, to go on from; auto: the run of --experiment, or '
                            'the newest with these options, where there is one')
    group.add_argument('--no-resume-opt', action='store_true', help='do not resume the optimizer')
    group.add_argument('--num-classes', type=int, default=None, metavar='N', help='number of classes (the data set\'s)')
    group.add_argument('--gp', default=None, type=str, metavar='POOL', help='global pool type')
    group.add_argument('--img-size', type=int, default=None, metavar='N')
    group.add_argument('--in-chans', type=int, default=None, metavar='N')
    group.add_argument('--input-size', default=None, nargs=3, type=int, metavar='N')
    group.add_argument('--crop-pct', default=None, type=float, metavar='N')
    group.add_argument('--mean', type=float, nargs='+', default=None)
    group.add_argument('--std', type=float, nargs='+', default=None)
    group.add_argument('--interpolation', default='', type=str)
    group.add_argument('-b', '--batch-size', type=int, default=128, metavar='N', help='per process')
    group.add_argument('-vb', '--validation-batch-size', type=int, default=None, metavar='N')
    group.add_argument('--channels-last', action='store_true')
    group.add_argument('--grad-accum-steps', type=int, default=1, metavar='N',
                       help='the contrastive batch is a micro-batch')
    group.add_argument('--grad-checkpointing', action='store_true')
    group.add_argument('--fast-norm', action='store_true')
    group.add_argument('--model-kwargs', nargs='*', default={}, action=_ParseKwargs)
    group.add_argument('--head-init-scale', default=None, type=float)
    group.add_argument('--head-init-bias', default=None, type=float)
    group.add_argument('--torchcompile-mode', type=str, default=None)
    group.add_argument('--torchcompile', nargs='?', type=str, default=None, const='inductor')


def _add_device(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Device parameters')
    group.add_argument('--device', default=None, type=str, help='cpu; by default the accelerator that there is')
    group.add_argument('--threads', default=None, type=int, metavar='N',
                       help='CPU threads per process (its share of cores)')
    group.add_argument('--amp', action='store_true', help='mixed precision in --amp-dtype')
    group.add_argument('--amp-dtype', default='float16', choices=['float16', 'bfloat16'])
    group.add_argument('--model-dtype', default=None, choices=['float32', 'float16', 'bfloat16', 'float64'])
    group.add_argument('--no-ddp-bb', action='store_true', help='no broadcast of buffers')
    group.add_argument('--synchronize-step', action='store_true')
    group.add_argument('--local_rank', default=0, type=int, help=argparse.SUPPRESS)
    group.add_argument('--device-modules', default=None, type=str, nargs='+', help='modules to import first')


def _add_optimizer(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Optimizer parameters')
    group.add_argument('--opt', default='sgd', type=str)
    group.add_argument('--opt-eps', default=None, type=float)
    group.add_argument('--opt-betas', default=None, type=float, nargs='+')
    group.add_argument('--momentum', type=float, default=0.9)
    group.add_argument('--weight-decay', type=float, default=2e-5)
    group.add_argument('--clip-grad', type=float, default=None)
    group.add_argument('--clip-mode', type=str, default='norm', choices=['norm', 'value', 'agc'])
    group.add_argument('--layer-decay', type=float, default=None)
    group.add_argument('--layer-decay-min-scale', type=float, default=0.)
    group.add_argument('--layer-decay-no-opt-scale', type=float, default=None)
    group.add_argument('--opt-kwargs', nargs='*', default={}, action=_ParseKwargs)


def _add_schedule(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Learning rate schedule parameters')
    group.add_argument('--sched', type=str, default='cosine')
    group.add_argument('--sched-on-updates', action='store_true')
    group.add_argument('--lr', type=float, default=None, help='overrides --lr-base')
    group.add_argument('--lr-base', type=float, default=0.1, help='lr = lr_base * global batch / lr_base_size')
    group.add_argument('--lr-base-size', type=int, default=256)
    group.add_argument('--lr-base-scale', type=str, default='', choices=['', 'linear', 'sqrt'])
    group.add_argument('--lr-noise', type=float, nargs='+', default=None)
    group.add_argument('--lr-noise-pct', type=float, default=0.67)
    group.add_argument('--lr-noise-std', type=float, default=1.0)
    group.add_argument('--lr-cycle-mul', type=float, default=1.0)
    group.add_argument('--lr-cycle-decay', type=float, default=0.5)
    group.add_argument('--lr-cycle-limit', type=int, default=1)
    group.add_argument('--lr-k-decay', type=float, default=1.0)
    group.add_argument('--warmup-lr', type=float, default=1e-5)
    group.add_argument('--min-lr', type=float, default=0.)
    group.add_argument('--epochs', type=int, default=300)
    group.add_argument('--epoch-repeats', type=float, default=0.)
    group.add_argument('--start-epoch', default=None, type=int)
    group.add_argument('--decay-milestones', default=[90, 180, 270], type=int, nargs='+')
    group.add_argument('--decay-epochs', type=float, default=90.)
    group.add_argument('--warmup-epochs', type=int, default=5)
    group.add_argument('--warmup-prefix', action='store_true')
    group.add_argument('--cooldown-epochs', type=int, default=0)
    group.add_argument('--patience-epochs', type=int, default=10)
    group.add_argument('--decay-rate', '--dr', type=float, default=0.1)


def _add_augmentation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Augmentation and regularization parameters')
    group.add_argument('--no-aug', action='store_true')
    group.add_argument('--train-crop-mode', type=str, default=None)
    group.add_argument('--scale', type=float, nargs='+', default=[0.08, 1.0])
    group.add_argument('--ratio', type=float, nargs='+', default=[3. / 4., 4. / 3.])
    group.add_argument('--crop-padding', type=int, default=None, metavar='N',
                       help='CIFAR\'s random crop, of the image padded by N, instead of a random resized crop')
    group.add_argument('--cutout', type=int, default=None, metavar='N',
                       help='black out a square of N x N pixels at a random place')
    group.add_argument('--hflip', type=float, default=0.5)
    group.add_argument('--vflip', type=float, default=0.)
    group.add_argument('--color-jitter', type=float, default=0.4)
    group.add_argument('--color-jitter-prob', type=float, default=None)
    group.add_argument('--grayscale-prob', type=float, default=None)
    group.add_argument('--gaussian-blur-prob', type=float, default=None)
    group.add_argument('--aa', type=str, default=None, help='timm\'s policies, or cifar10: AutoAugment\'s for CIFAR-10')
    group.add_argument('--bce-loss', action='store_true')
    group.add_argument('--bce-sum', action='store_true')
    group.add_argument('--bce-target-thresh', type=float, default=None)
    group.add_argument('--bce-pos-weight', type=float, default=None)
    group.add_argument('--reprob', type=float, default=0.)
    group.add_argument('--remode', type=str, default='pixel')
    group.add_argument('--recount', type=int, default=1)
    group.add_argument('--mixup', type=float, default=0.0)
    group.add_argument('--cutmix', type=float, default=0.0)
    group.add_argument('--cutmix-minmax', type=float, nargs='+', default=None)
    group.add_argument('--mixup-prob', type=float, default=1.0)
    group.add_argument('--mixup-switch-prob', type=float, default=0.5)
    group.add_argument('--mixup-mode', type=str, default='batch')
    group.add_argument('--mixup-off-epoch', default=0, type=int)
    group.add_argument('--smoothing', type=float, default=0.1)
    group.add_argument('--train-interpolation', type=str, default='random')
    group.add_argument('--drop', type=float, default=0.0)
    group.add_argument('--drop-connect', type=float, default=None, help='deprecated by timm, use --drop-path')
    group.add_argument('--drop-path', type=float, default=None)
    group.add_argument('--drop-block', type=float, default=None)


def _add_batch_norm(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Batch norm parameters')
    group.add_argument('--bn-momentum', type=float, default=None)
    group.add_argument('--bn-eps', type=float, default=None)
    group.add_argument('--sync-bn', action='store_true')
    group.add_argument('--dist-bn', type=str, default='reduce', choices=['', 'broadcast', 'reduce'])


def _add_ema(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Model exponential moving average parameters')
    group.add_argument('--model-ema', action='store_true')
    group.add_argument('--model-ema-force-cpu', action='store_true')
    group.add_argument('--model-ema-decay', type=float, default=0.9998)
    group.add_argument('--model-ema-warmup', action='store_true')


def _add_misc(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Miscellaneous parameters')
    group.add_argument('--seed', type=int, default=42)
    group.add_argument('--worker-seeding', type=str, default='all')
    group.add_argument('--log-interval', type=int, default=50)
    group.add_argument('--val-interval', type=int, default=1)
    group.add_argument('--recovery-interval', type=int, default=0, help='batches between checkpoints inside an epoch')
    group.add_argument('--max-unreadable', type=int, default=10, metavar='N',
                       help='training samples that may be replaced since they cannot be read; 0 stops at the first')
    group.add_argument('--eval-only', action='store_true', help='evaluate the weights of --resume, train nothing')
    group.add_argument('--eval-timesteps', type=int, nargs='+', default=None, metavar='T',
                       help='with --eval-only: these numbers of time steps (the model\'s own)')
    group.add_argument('--checkpoint-hist', type=int, default=10)
    group.add_argument('-j', '--workers', type=int, default=4)
    group.add_argument('--save-images', action='store_true')
    group.add_argument('--pin-mem', action='store_true')
    group.add_argument('--no-prefetcher', action='store_true',
                       help='accepted; Accelerate moves the batches in any case')
    group.add_argument('--output', default='', type=home_path, metavar='DIR',
                       help='root of all runs and teachers (./output)')
    group.add_argument('--experiment', default='', type=home_path, metavar='NAME', help='name of the run\'s folder')
    group.add_argument('--eval-metric', default='top1', type=str, metavar='METRIC', choices=['top1', 'top5', 'loss'])
    group.add_argument('--report-to', default=None, type=str, metavar='TRACKER',
                       help='tensorboard, wandb, ... (Accelerate)')


def _add_refused(parser: argparse.ArgumentParser) -> None:
    """timm's options that are refused, so that the error can say why."""
    for name in UNSUPPORTED:
        parser.add_argument('--' + name.replace('_', '-'), nargs='*', default=None, help=argparse.SUPPRESS)


# ---- layers and checks

def parse_args(argv: Optional[Sequence[str]] = None) -> Tuple[argparse.Namespace, Dict[str, Any]]:
    """Parse the command line over the configuration file over, without data, the digits recipe.

    Args:
        argv: Arguments; None takes sys.argv's.

    Returns:
        The options, and what the digits recipe filled in (empty with data or a data set named).

    Raises:
        OptionError: An option is unknown, refused or wrong.
    """
    parser = create_parser()
    given = _given(parser, argv)
    args = parser.parse_args(argv)
    args.data_dir = args.data_dir or args.data
    given |= {'data_dir'} if args.data else set()
    layers = load_recipe(args.config) if args.config else _resumed_options(args.resume)
    _apply(parser, args, layers, given, f'--config {args.config}' if args.config else f'--resume {args.resume}')
    recipe: Dict[str, Any] = {}
    if not args.data_dir and not args.dataset:
        options = load_recipe(DIGITS_RECIPE)
        recipe = {k: v for k, v in options.items() if k not in given and k not in layers}
        if 'model' not in recipe:
            recipe.pop('model_kwargs', None)
        _apply(parser, args, recipe, given, DIGITS_RECIPE)
    del args.data
    _check(args, given | {name for name, value in layers.items() if value is not None})
    if is_event_dataset(args.dataset):
        _check_events(parser, args)
    args.losses, args.loss_options = _losses(args)
    return args, recipe


def _resumed_options(resume: str) -> Dict[str, Any]:
    """Options of the run whose folder, or a file in it, is resumed, so that they need not be given again."""
    folder = Path(resume) if Path(resume).is_dir() else Path(resume).parent
    if not resume or resume == AUTO or not (folder / ARGS_FILE).is_file():
        return {}
    try:
        options = load_recipe(str(folder / ARGS_FILE))
    except OptionError as error:
        raise OptionError(str(error).replace('--config', '--resume', 1)) from error
    return {name: value for name, value in options.items() if name not in ('resume', 'eval_only', 'eval_timesteps')}


def _given(parser: argparse.ArgumentParser, argv: Optional[Sequence[str]]) -> set:
    """Names of the options that stand on the command line."""
    missing = object()
    probe = argparse.Namespace(**{action.dest: missing for action in parser._actions if action.dest != 'help'})
    parser.parse_args(argv, namespace=probe)
    return {name for name, value in vars(probe).items() if value is not missing}


def _apply(parser: argparse.ArgumentParser, args: argparse.Namespace, options: Dict[str, Any], given: set, source: str):
    known = {action.dest: action for action in parser._actions}
    if options.get('input_size') and 'input_size' not in given and {'img_size', 'in_chans'} & given:
        channels, size, _ = options['input_size']  # else it would win over what is given
        options = {'in_chans': channels, 'img_size': size, **{k: v for k, v in options.items() if k != 'input_size'}}
    if 'model' in given:  # the architecture's own arguments go with it
        options = {name: value for name, value in options.items() if name not in ('model_kwargs', 'teacher_kwargs')}
    for name, value in options.items():
        if name not in known or name in ('help', 'config', 'data'):
            close = difflib.get_close_matches(name, known, n=1)
            raise OptionError(f"{source}: unknown option '{name}'." + (f" Did you mean '{close[0]}'?" if close else ''))
        if name in given:
            continue
        kind = known[name].type
        if kind is home_path:
            value = [home_path(v) for v in value] if isinstance(value, list) else value and home_path(value)
        if kind in (int, float) and value is not None and not isinstance(value, (list, dict, bool)):
            try:
                value = kind(value)
            except ValueError as error:
                raise OptionError(f"{source}: option '{name}' is {value!r}, expected a number.") from error
        if known[name].choices is not None and value is not None and value not in known[name].choices:
            raise OptionError(f"{source}: option '{name}' is {value!r}, expected one of "
                              f"{', '.join(map(str, known[name].choices))}.")
        setattr(args, name, value)


def _check(args: argparse.Namespace, given: set) -> None:
    for name, reason in UNSUPPORTED.items():
        if getattr(args, name) not in (None, False):  # False: from an older run's options
            raise OptionError(f"--{name.replace('_', '-')} is not supported: {reason}.")
        delattr(args, name)
    check_counts(args)
    if args.eval_only and args.resume == AUTO:
        raise OptionError('--eval-only: --resume auto starts or continues a training; name a folder or a file.')
    if args.eval_timesteps and (not args.eval_only or min(args.eval_timesteps) < 1):
        raise OptionError(f'--eval-timesteps {" ".join(map(str, args.eval_timesteps))}: goes with --eval-only, and '
                          f'takes numbers of 1 or more.')
    if args.teacher_size and min(args.teacher_size) < 1:
        raise OptionError(f'--teacher-size {args.teacher_size[0]} {args.teacher_size[1]}: must be 1 pixel or more.')
    if not 0 < args.ann_percentile <= 100:
        raise OptionError(f'--ann-percentile {args.ann_percentile}: must be above 0 and at most 100.')
    if args.teacher_cache:
        random = [f'--{name.replace("_", "-")}' for name in ('mixup', 'cutmix', 'cutmix_minmax') if getattr(args, name)]
        if random or not args.no_aug:
            raise OptionError(f'--teacher-cache: images must be the same in every epoch; '
                              f'{"leave out " + ", ".join(random) if random else "give --no-aug"}.')
    if 'loss' in given and 'distill' in given:
        raise OptionError('--distill and --loss both say what is added to cross-entropy; use one.')
    if args.kd_model_name and args.teacher and args.kd_model_name != args.teacher:
        raise OptionError('--teacher and --kd-model-name both name the teacher; use one.')
    args.teacher = args.teacher or args.kd_model_name
    if args.teacher_checkpoint and args.teacher_pretrained:
        raise OptionError('--teacher-checkpoint and --teacher-pretrained both name the teacher\'s weights; use one.')
    if args.amp and args.model_dtype not in (None, 'float32'):
        raise OptionError(f'--amp and --model-dtype {args.model_dtype} both set the precision; --amp is for '
                          f'float32 models.')
    if not args.val_split:
        raise OptionError("--val-split '': every run is validated here; name the split.")
    if args.drop_path is None and args.drop_connect is not None:
        args.drop_path = args.drop_connect


def _check_events(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    given = [name for name in IMAGE_ONLY if getattr(args, name) != parser.get_default(name)]
    # what train.py sets itself may come back from a run's arguments
    given += [name for name, own in (('in_chans', 2), ('mean', [0., 0.]), ('std', [1., 1.]))
              if getattr(args, name) not in (None, own)]
    given += ['input_size'] if args.input_size and args.input_size[0] != 2 else []
    given += ['mixup_mode'] if args.mixup > 0 and args.mixup_mode != 'batch' else []
    if given:
        names = ', '.join('--' + name.replace('_', '-') for name in given)
        raise OptionError(f'{names}: not for event data, whose samples are frames (T, 2, H, W); see the event data '
                          f'parameters in --help.')
    if args.neuron_init == 'ann':
        raise OptionError('--neuron-init ann: measures an ANN on images; with event data use calibrated.')
    for name, least in (('event_size', 1), ('event_roll', 0)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise OptionError(f'--{name.replace("_", "-")} {getattr(args, name)}: must be {least} or more.')
    if args.timesteps is None:
        args.timesteps = FrameSettings().timesteps


def _losses(args: argparse.Namespace) -> Tuple[Dict[str, float], Dict[str, Dict[str, Any]]]:
    """Weights and options of the losses that --distill or --loss ask for."""
    _import_plugins(args)
    preset = args.distill or ('kd' if args.kd_model_name else 'sscl')
    args.distill = None if args.loss else preset
    weights = _parse_losses(args.loss) if args.loss else dict(PRESETS[preset])
    if not args.loss:
        kd_weight = args.kd_weight
        if kd_weight is None and args.task_loss_weight is not None:
            kd_weight = 1. - args.task_loss_weight  # timm's complementary mode
        for name, weight in (('sscl', args.sscl_weight), ('contrastive', args.sscl_weight), ('kd', kd_weight)):
            if name in weights and weight is not None:
                weights[name] = weight
    try:
        losses = resolve_losses(weights)
    except ValueError as error:
        raise OptionError(f'--{"loss" if args.loss else "distill"}: {error}') from error
    processes = int(os.environ.get('WORLD_SIZE', 1)) if args.sscl_cka_scope == 'global' else 1
    if 'sscl' in losses and args.batch_size * processes < 4 and args.sscl_weighting != 'uniform':
        raise OptionError(f'--batch-size {args.batch_size} is too small for CKA weights, which need at least 4 '
                          f'samples; use a larger batch or --distill contrastive.')
    contrastive = dict(dim=args.sscl_dim, temperature=args.sscl_temperature, critic=args.sscl_critic,
                       cka_floor=args.sscl_cka_floor, cka_momentum=args.sscl_cka_momentum,
                       cka_scope=args.sscl_cka_scope, projection=args.sscl_projection, queue_size=args.sscl_queue)
    options = dict(
        sscl=dict(contrastive, weighting=args.sscl_weighting), contrastive=contrastive,
        kd=dict(temperature=args.kd_temperature), kd_step=dict(temperature=args.kd_step_temperature),
        tet=dict(mse_share=args.tet_lambda, smoothing=args.smoothing),
        firing_rate=dict(target=args.firing_rate_target))
    options = {name: dict(options[name]) for name in losses if name in options}
    _check_loss_options(options)
    return losses, options


def _check_loss_options(options: Dict[str, Dict[str, Any]]) -> None:
    """Build the losses, on one channel, so that a wrong option is found before a teacher is trained."""
    for name, of_loss in options.items():
        needs = loss_needs(name)
        taps = dict(names=['tap'], student_channels=[1], teacher_channels=[1]) if needs['features'] else {}
        if needs['shapes']:
            taps.update(student_shapes=[(1, 1)], teacher_shapes=[(1, 1)])
        try:
            create_loss(name, **taps, **of_loss)
        except ValueError as error:
            raise OptionError(f"loss '{name}': {error}") from error


def _parse_losses(text: str) -> Dict[str, float]:
    weights = {}
    for part in text.split(','):
        name, _, weight = part.strip().partition('=')
        try:
            weights[name] = float(weight) if weight else 1.
        except ValueError as error:
            raise OptionError(f"--loss: the weight in '{part}' is no number; write NAME=WEIGHT,...") from error
    return weights


def _import_plugins(args: argparse.Namespace) -> None:
    """Import the user's own files; a run that is resumed elsewhere finds them by their full paths."""
    if args.plugin is not None:
        args.plugin = list(dict.fromkeys(os.path.abspath(p) if os.path.isfile(p) else p for p in args.plugin))
    for option, sources in (('plugin', args.plugin or []), ('loss-file', [args.loss_file] if args.loss_file else [])):
        for source in sources:
            try:
                import_plugin(source)
            except FileNotFoundError as error:
                raise OptionError(f'--{option}: {error}') from error
