"""The parser: timm's options in timm's groups with its defaults, and our own."""
import argparse

from timm_sscl.data.events.aedat import AXES
from timm_sscl.data.events.frames import BY, MODES, FrameSettings

from .option_types import HelpFormatter, KeyValues, OptionParser, home_path
from .refused_options import UNSUPPORTED
from .registered_help import describe_registered
from .spiking_options import add_distillation_options, add_spiking_options

__all__ = ['create_parser']


def create_parser() -> argparse.ArgumentParser:
    """Create the parser of all options, in timm's groups."""
    parser = OptionParser(
        description='Train a spiking timm model with its real-valued twin as the teacher (SSCL)', allow_abbrev=False,
        formatter_class=HelpFormatter, epilog=describe_registered())
    parser.add_argument('--config', '-c', type=home_path, default=None, metavar='NAME|FILE',
                        help='recipe by name, or a YAML file')
    for add in (add_spiking_options, add_distillation_options, _add_dataset, _add_events, _add_model, _add_device,
                _add_optimizer, _add_schedule, _add_augmentation, _add_batch_norm, _add_ema, _add_misc, _add_refused):
        add(parser)
    return parser


def _add_dataset(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Dataset parameters')
    group.add_argument('data', nargs='?', type=home_path, metavar='DIR', default=None, help=argparse.SUPPRESS)
    group.add_argument('--data-dir', type=home_path, metavar='DIR', default=None, help='root of the data set')
    group.add_argument('--dataset', metavar='NAME', default='',
                       help='data set type and name; digits is bundled, a plug-in may register others')
    group.add_argument('--dataset-kwargs', nargs='*', default={}, action=KeyValues, metavar='KEY=VALUE',
                       help='options of a data set of your own')
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
    group.add_argument('--model-kwargs', nargs='*', default={}, action=KeyValues)
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
    group.add_argument('--deterministic', action='store_true',
                       help='on a GPU: kernels that sum in a fixed order; slower')
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
    group.add_argument('--opt-kwargs', nargs='*', default={}, action=KeyValues)


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
    group.add_argument('--seeds', type=int, nargs='+', default=None, metavar='N',
                       help='one run per seed, with one teacher, and their mean and interval')
    group.add_argument('--worker-seeding', type=str, default='all')
    group.add_argument('--log-interval', type=int, default=50)
    group.add_argument('--val-interval', type=int, default=1)
    group.add_argument('--recovery-interval', type=int, default=0, help='batches between checkpoints inside an epoch')
    group.add_argument('--max-unreadable', type=int, default=10, metavar='N',
                       help='training samples that may be replaced since they cannot be read; 0 stops at the first')
    group.add_argument('--eval-only', action='store_true', help='evaluate the weights of --resume, train nothing')
    group.add_argument('--eval-timesteps', type=int, nargs='+', default=None, metavar='T',
                       help='with --eval-only: these numbers of time steps (the model\'s own)')
    group.add_argument('--deploy', action='store_true',
                       help='with --eval-only: evaluate the model as deployed, in int8 on the CPU, and its speed')
    group.add_argument('--checkpoint-hist', type=int, default=10)
    group.add_argument('-j', '--workers', type=int, default=4,
                       help='processes that read data; where it is not given, at most the cores of this process')
    group.add_argument('--save-images', action='store_true')
    group.add_argument('--pin-mem', action='store_true', help='batches in pinned memory; always on CUDA')
    group.add_argument('--no-prefetcher', action='store_true',
                       help='accepted; Accelerate moves the batches in any case')
    group.add_argument('--output', default='', type=home_path, metavar='DIR',
                       help='root of all runs and teachers (./output)')
    group.add_argument('--experiment', default='', type=home_path, metavar='NAME', help='name of the run\'s folder')
    group.add_argument('--eval-metric', default='top1', type=str, metavar='METRIC', choices=['top1', 'top5', 'loss'])
    group.add_argument('--report', action=argparse.BooleanOptionalAction, default=None,
                       help='write report.html at the end of the run (where the extra `report` is installed)')
    group.add_argument('--report-to', default=None, type=str, metavar='TRACKER',
                       help='tensorboard, wandb, ... (Accelerate)')


def _add_refused(parser: argparse.ArgumentParser) -> None:
    """Add timm's unsupported options, so that an error can say why."""
    for name in UNSUPPORTED:
        parser.add_argument('--' + name.replace('_', '-'), nargs='*', default=None, help=argparse.SUPPRESS)
