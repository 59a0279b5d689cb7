"""The parser: timm's options in timm's groups with its defaults, and our own. This does not import torch."""
import argparse

from .declared import constant, settings
from .option_types import HelpFormatter, KeyValues, OptionParser, home_path
from .refused_options import UNSUPPORTED
from .spiking_options import add_distillation_options, add_spiking_options

__all__ = ['create_parser']

_EXAMPLES = """three commands:
  accelerate launch train.py
      train on the bundled digits: the teacher, then the student
  accelerate launch train.py --data-dir DIR --model spiking_resnet34 --teacher resnet34 --teacher-pretrained
      train on a folder of images, with a pretrained teacher
  accelerate launch train.py --resume output/train/RUN --eval-only
      evaluate a run; without --eval-only, continue it"""


def create_parser(registered: str = '') -> argparse.ArgumentParser:
    """Create the parser of all options, in timm's groups.

    Args:
        registered: Text on what is registered, for the end of its help.
    """
    parser = OptionParser(
        description='Train a spiking timm model with its real-valued twin as the teacher (SSCL)', allow_abbrev=False,
        formatter_class=HelpFormatter, epilog='\n\n'.join(filter(None, [registered, _EXAMPLES])))
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
    group.add_argument('--train-split', metavar='NAME', default='train', help='name of the training split')
    group.add_argument('--val-split', metavar='NAME', default='validation', help='name of the validation split')
    group.add_argument('--train-num-samples', default=None, type=int, metavar='N',
                       help='training samples to use, evenly spread (default: all)')
    group.add_argument('--val-num-samples', default=None, type=int, metavar='N',
                       help='validation samples to use, evenly spread (default: all)')
    group.add_argument('--dataset-download', action='store_true',
                       help='allow the download of torch/, hfids/ and tfds/ data')
    group.add_argument('--class-map', default='', type=home_path, metavar='FILE',
                       help='file that maps class names to labels')
    group.add_argument('--input-img-mode', default=None, type=str,
                       help='PIL mode of the images (default: RGB, or L for one channel)')
    group.add_argument('--input-key', default=None, type=str, help='key of the image in a sample (default: timm\'s)')
    group.add_argument('--target-key', default=None, type=str, help='key of the label in a sample (default: timm\'s)')
    group.add_argument('--dataset-trust-remote-code', action='store_true', help='allow code from the hub in hfds/ data')


def _add_events(parser: argparse.ArgumentParser) -> None:
    frames = settings('data.events.frames', 'FrameSettings')
    by, modes = constant('data.events.frames', 'BY'), constant('data.events.frames', 'MODES')
    group = parser.add_argument_group(
        'Event data parameters', 'for --dataset events/digits, events/cifar10dvs and tonic/NAME; --timesteps is the '
                                 f'number of frames ({frames["timesteps"].default}), --hflip mirrors a sequence')
    group.add_argument('--event-frames', default=frames['by'].default, choices=by,
                       help='frames of equally many events, or of equal time')
    group.add_argument('--event-mode', default=frames['mode'].default, choices=modes,
                       help='a pixel is 1 where any event fell, or the number of events')
    group.add_argument('--event-size', type=int, default=frames['size'].default, metavar='N',
                       help='height and width of the frames; binary takes the nearest pixel, count adds up (default: '
                            'the sensor\'s)')
    group.add_argument('--event-roll', type=int, default=5, metavar='N',
                       help='training sequences are shifted by up to so many pixels, around the edge')
    group.add_argument('--event-split', default='last100', metavar='NAME',
                       help='validation part of data without a split: last100 or first100 (or another number) of every '
                            'class, or random, a tenth; random1, random2, ... are other draws')
    group.add_argument('--event-axes', default=frames['axes'].default, choices=constant('data.events.aedat', 'AXES'),
                       help='whose axes and polarity AEDAT 2.0 files are read with')


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Model parameters')
    group.add_argument('--model', default='spiking_resnet18', type=home_path, metavar='MODEL',
                       help='student, by timm\'s name')
    group.add_argument('--pretrained', action='store_true', help='start the student from the ANN\'s pretrained weights')
    group.add_argument('--pretrained-path', default=None, type=home_path, help='pretrained weights from this file')
    group.add_argument('--initial-checkpoint', default='', type=home_path, metavar='PATH',
                       help='weights that the student starts from, from this file')
    group.add_argument('--resume', default='', type=home_path, metavar='auto|PATH',
                       help='folder of a run, or a checkpoint file, to go on from; auto: the run of --experiment, or '
                            'the newest with these options, where there is one')
    group.add_argument('--no-resume-opt', action='store_true', help='do not resume the optimizer')
    group.add_argument('--num-classes', type=int, default=None, metavar='N',
                       help='number of classes (default: the data set\'s)')
    group.add_argument('--gp', default=None, type=str, metavar='POOL', help='global pool type (default: the model\'s)')
    group.add_argument('--img-size', type=int, default=None, metavar='N',
                       help='height and width of the images (default: the model\'s)')
    group.add_argument('--in-chans', type=int, default=None, metavar='N',
                       help='channels of the images (default: the model\'s)')
    group.add_argument('--input-size', default=None, nargs=3, type=int, metavar='N',
                       help='channels, height and width of the images (default: the model\'s)')
    group.add_argument('--crop-pct', default=None, type=float, metavar='N',
                       help='share of a validation image that its centre crop keeps (default: the model\'s)')
    group.add_argument('--mean', type=float, nargs='+', default=None,
                       help='mean that images are normalised by, per channel (default: the model\'s)')
    group.add_argument('--std', type=float, nargs='+', default=None,
                       help='standard deviation that images are normalised by, per channel (default: the model\'s)')
    group.add_argument('--interpolation', default='', type=str,
                       help='interpolation of validation images (default: the model\'s)')
    group.add_argument('-b', '--batch-size', type=int, default=128, metavar='N', help='images per batch and process')
    group.add_argument('-vb', '--validation-batch-size', type=int, default=None, metavar='N',
                       help='batch size of the validation, per process (default: --batch-size)')
    group.add_argument('--channels-last', action='store_true', help='use the memory format channels_last')
    group.add_argument('--grad-accum-steps', type=int, default=1, metavar='N',
                       help='batches per update; the contrastive batch is one of them')
    group.add_argument('--grad-checkpointing', action='store_true',
                       help='recompute activations in the backward: less memory, more time')
    group.add_argument('--fast-norm', action='store_true', help='timm\'s norms in reduced precision under --amp')
    group.add_argument('--model-kwargs', nargs='*', default={}, action=KeyValues,
                       help='arguments of the student\'s architecture')
    group.add_argument('--head-init-scale', default=None, type=float,
                       help='factor on the classifier\'s initial weights')
    group.add_argument('--head-init-bias', default=None, type=float, help='initial bias of the classifier')
    group.add_argument('--torchcompile-mode', type=str, default=None, help='mode of --torchcompile: max-autotune, ...')
    group.add_argument('--torchcompile', nargs='?', type=str, default=None, const='inductor',
                       help='compile the training step, with this backend (inductor where none is named)')


def _add_device(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Device parameters')
    group.add_argument('--device', default=None, type=str, help='cpu, or cuda (default: the accelerator that there is)')
    group.add_argument('--threads', default=None, type=int, metavar='N',
                       help='CPU threads per process (default: its share of the cores)')
    group.add_argument('--amp', action='store_true', help='mixed precision in --amp-dtype')
    group.add_argument('--amp-dtype', default='float16', choices=['float16', 'bfloat16'], help='precision of --amp')
    group.add_argument('--model-dtype', default=None, choices=['float32', 'float16', 'bfloat16', 'float64'],
                       help='dtype of the model\'s weights (default: float32)')
    group.add_argument('--no-ddp-bb', action='store_true', help='no broadcast of buffers')
    group.add_argument('--synchronize-step', action='store_true', help='wait for the GPU after every step')
    group.add_argument('--deterministic', action='store_true',
                       help='on a GPU: kernels that sum in a fixed order; slower')
    group.add_argument('--local_rank', default=0, type=int, help=argparse.SUPPRESS)
    group.add_argument('--device-modules', default=None, type=str, nargs='+', help='modules to import first')


def _add_optimizer(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Optimizer parameters')
    group.add_argument('--opt', default='sgd', type=str, help='optimizer, by timm\'s name')
    group.add_argument('--opt-eps', default=None, type=float,
                       help='epsilon of the optimizer (default: the optimizer\'s)')
    group.add_argument('--opt-betas', default=None, type=float, nargs='+',
                       help='betas of the optimizer (default: the optimizer\'s)')
    group.add_argument('--momentum', type=float, default=0.9, help='momentum of the optimizer')
    group.add_argument('--weight-decay', type=float, default=2e-5, help='weight decay')
    group.add_argument('--clip-grad', type=float, default=None, help='threshold of --clip-mode (default: no clipping)')
    group.add_argument('--clip-mode', type=str, default='norm', choices=['norm', 'value', 'agc'],
                       help='what --clip-grad limits: the norm of all gradients, each value, or each norm relative '
                            'to its weights')
    group.add_argument('--layer-decay', type=float, default=None,
                       help='factor on the learning rate from layer to layer, from the output to the input')
    group.add_argument('--layer-decay-min-scale', type=float, default=0.,
                       help='lower bound of the factors of --layer-decay')
    group.add_argument('--layer-decay-no-opt-scale', type=float, default=None,
                       help='layers whose factor is below this are not trained')
    group.add_argument('--opt-kwargs', nargs='*', default={}, action=KeyValues,
                       help='further arguments of the optimizer')


def _add_schedule(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Learning rate schedule parameters')
    group.add_argument('--sched', type=str, default='cosine',
                       help='schedule of the learning rate: cosine, tanh, step, multistep, plateau, poly, wsd, '
                            'rsqrt, constant, none')
    group.add_argument('--sched-on-updates', action='store_true',
                       help='set the learning rate at every update instead of every epoch')
    group.add_argument('--lr', type=float, default=None,
                       help='learning rate; overrides --lr-base (default: by --lr-base)')
    group.add_argument('--lr-base', type=float, default=0.1, help='lr = lr_base * global batch / lr_base_size')
    group.add_argument('--lr-base-size', type=int, default=256, help='global batch size that --lr-base is meant for')
    group.add_argument('--lr-base-scale', type=str, default='', choices=['', 'linear', 'sqrt'],
                       help='how the learning rate grows with the batch size (default: sqrt for adaptive optimizers, '
                            'else linear)')
    group.add_argument('--lr-noise', type=float, nargs='+', default=None,
                       help='share of the epochs, or a range of it, in which the learning rate is noisy')
    group.add_argument('--lr-noise-pct', type=float, default=0.67, help='largest relative noise of the learning rate')
    group.add_argument('--lr-noise-std', type=float, default=1.0, help='standard deviation of the noise')
    group.add_argument('--lr-cycle-mul', type=float, default=1.0, help='factor on the length of the next cycle')
    group.add_argument('--lr-cycle-decay', type=float, default=0.5,
                       help='factor on the learning rate of the next cycle')
    group.add_argument('--lr-cycle-limit', type=int, default=1, help='number of cycles')
    group.add_argument('--lr-k-decay', type=float, default=1.0,
                       help='exponent of the training\'s progress in the schedules cosine and poly')
    group.add_argument('--warmup-lr', type=float, default=1e-5, help='learning rate at which the warm-up starts')
    group.add_argument('--min-lr', type=float, default=0., help='learning rate at which the schedule ends')
    group.add_argument('--epochs', type=int, default=300, help='epochs of the student')
    group.add_argument('--epoch-repeats', type=float, default=0., help='times that an epoch repeats the data')
    group.add_argument('--start-epoch', default=None, type=int,
                       help='number of the first epoch, counted from 0 (default: the checkpoint\'s)')
    group.add_argument('--decay-milestones', default=[90, 180, 270], type=int, nargs='+',
                       help='epochs at which the schedule multistep decays')
    group.add_argument('--decay-epochs', type=float, default=90.,
                       help='epochs between two decays of the schedule step; of wsd, the length of the decay')
    group.add_argument('--warmup-epochs', type=int, default=5, help='epochs of the warm-up')
    group.add_argument('--warmup-prefix', action='store_true',
                       help='the warm-up precedes the epochs of the schedule instead of being part of them')
    group.add_argument('--cooldown-epochs', type=int, default=0, help='epochs at --min-lr after the schedule')
    group.add_argument('--patience-epochs', type=int, default=10,
                       help='epochs without progress before the schedule plateau decays')
    group.add_argument('--decay-rate', '--dr', type=float, default=0.1, help='factor of a decay')


def _add_augmentation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Augmentation and regularization parameters')
    group.add_argument('--no-aug', action='store_true', help='no augmentation of the training images')
    group.add_argument('--train-crop-mode', type=str, default=None,
                       help='crop of training images: rrc, rkrc or rkrr (default: rrc)')
    group.add_argument('--scale', type=float, nargs='+', default=[0.08, 1.0],
                       help='range of the area of a random resized crop, as a share of the image')
    group.add_argument('--ratio', type=float, nargs='+', default=[3. / 4., 4. / 3.],
                       help='range of the aspect ratio of a random resized crop')
    group.add_argument('--crop-padding', type=int, default=None, metavar='N',
                       help='CIFAR\'s random crop, of the image padded by N, instead of a random resized crop')
    group.add_argument('--cutout', type=int, default=None, metavar='N',
                       help='black out a square of N x N pixels at a random place')
    group.add_argument('--hflip', type=float, default=0.5, help='probability of mirroring left and right')
    group.add_argument('--vflip', type=float, default=0., help='probability of mirroring top and bottom')
    group.add_argument('--color-jitter', type=float, default=0.4,
                       help='strength of the random change of brightness, contrast and saturation')
    group.add_argument('--color-jitter-prob', type=float, default=None,
                       help='probability of the colour jitter (default: 1)')
    group.add_argument('--grayscale-prob', type=float, default=None,
                       help='probability of turning an image grey (default: 0)')
    group.add_argument('--gaussian-blur-prob', type=float, default=None,
                       help='probability of blurring an image (default: 0)')
    group.add_argument('--aa', type=str, default=None, help='timm\'s policies, or cifar10: AutoAugment\'s for CIFAR-10')
    group.add_argument('--bce-loss', action='store_true', help='binary cross-entropy instead of cross-entropy')
    group.add_argument('--bce-sum', action='store_true',
                       help='sum the binary cross-entropy over the classes instead of taking its mean')
    group.add_argument('--bce-target-thresh', type=float, default=None,
                       help='soft targets above this become 1 in the binary cross-entropy, the others 0')
    group.add_argument('--bce-pos-weight', type=float, default=None,
                       help='weight of the positive class in the binary cross-entropy')
    group.add_argument('--reprob', type=float, default=0., help='probability of erasing a random rectangle')
    group.add_argument('--remode', type=str, default='pixel',
                       help='content of an erased rectangle: const, rand or pixel')
    group.add_argument('--recount', type=int, default=1, help='number of erased rectangles')
    group.add_argument('--mixup', type=float, default=0.0, help='alpha of mixup; 0 is off')
    group.add_argument('--cutmix', type=float, default=0.0, help='alpha of cutmix; 0 is off')
    group.add_argument('--cutmix-minmax', type=float, nargs='+', default=None,
                       help='range of the side of a cutmix rectangle, as a share of the image; replaces --cutmix')
    group.add_argument('--mixup-prob', type=float, default=1.0, help='probability of mixup or cutmix in a batch')
    group.add_argument('--mixup-switch-prob', type=float, default=0.5, help='probability of cutmix where both are on')
    group.add_argument('--mixup-mode', type=str, default='batch', help='what is mixed alike: batch, pair or elem')
    group.add_argument('--mixup-off-epoch', default=0, type=int,
                       help='epoch from which mixup and cutmix are off; 0 is never')
    group.add_argument('--smoothing', type=float, default=0.1, help='label smoothing')
    group.add_argument('--train-interpolation', type=str, default='random', help='interpolation of training images')
    group.add_argument('--drop', type=float, default=0.0, help='probability of dropout before the classifier')
    group.add_argument('--drop-connect', type=float, default=None, help='deprecated by timm, use --drop-path')
    group.add_argument('--drop-path', type=float, default=None, help='probability of leaving out a residual branch')
    group.add_argument('--drop-block', type=float, default=None, help='probability of DropBlock')


def _add_batch_norm(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Batch norm parameters')
    group.add_argument('--bn-momentum', type=float, default=None,
                       help='momentum of the batch norms (default: the model\'s)')
    group.add_argument('--bn-eps', type=float, default=None, help='epsilon of the batch norms (default: the model\'s)')
    group.add_argument('--sync-bn', action='store_true',
                       help='batch norms over the batches of all processes; not on a CPU')
    group.add_argument('--dist-bn', type=str, default='reduce', choices=['', 'broadcast', 'reduce'],
                       help='statistics of the batch norms after an epoch: the processes\' mean, the first one\'s, '
                            'or each its own (\'\')')


def _add_ema(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Model exponential moving average parameters')
    group.add_argument('--model-ema', action='store_true', help='keep an average of the weights, and validate it too')
    group.add_argument('--model-ema-force-cpu', action='store_true', help='keep the averaged weights on the CPU')
    group.add_argument('--model-ema-decay', type=float, default=0.9998, help='decay of the averaged weights')
    group.add_argument('--model-ema-warmup', action='store_true', help='raise the decay slowly from the start')


def _add_misc(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Miscellaneous parameters')
    group.add_argument('--seed', type=int, default=42, help='seed of weights, order and augmentation')
    group.add_argument('--seeds', type=int, nargs='+', default=None, metavar='N',
                       help='one run per seed, with one teacher, and their mean and interval')
    group.add_argument('--worker-seeding', type=str, default='all',
                       help='seeds of the processes that read data: all, or part, which leaves NumPy\'s out')
    group.add_argument('--log-interval', type=int, default=50, help='batches between two lines of the log')
    group.add_argument('--val-interval', type=int, default=1, help='epochs between two validations')
    group.add_argument('--recovery-interval', type=int, default=0, help='batches between checkpoints inside an epoch')
    group.add_argument('--max-unreadable', type=int, default=10, metavar='N',
                       help='training samples that may be replaced since they cannot be read; 0 stops at the first')
    group.add_argument('--eval-only', action='store_true', help='evaluate the weights of --resume, train nothing')
    group.add_argument('--eval-timesteps', type=int, nargs='+', default=None, metavar='T',
                       help='with --eval-only: these numbers of timesteps (default: the model\'s own)')
    group.add_argument('--deploy', action='store_true',
                       help='with --eval-only: evaluate the model as deployed, in int8 on the CPU, and its speed')
    group.add_argument('--weight-bits', type=int, nargs='+', default=[24], metavar='BITS',
                       choices=constant('export.deployment', 'WEIGHT_BITS'),
                       help='with --deploy: bits of the weights, 24, 16 or 8; several give a row each')
    group.add_argument('--checkpoint-hist', type=int, default=10,
                       help='number of checkpoints of the best epochs that are kept')
    group.add_argument('-j', '--workers', type=int, default=4,
                       help='processes that read data; where it is not given, at most the cores of this process')
    group.add_argument('--save-images', action='store_true',
                       help='write the input of a batch as an image at every line of the log')
    group.add_argument('--pin-mem', action='store_true', help='batches in pinned memory; always on CUDA')
    group.add_argument('--no-prefetcher', action='store_true',
                       help='accepted; Accelerate moves the batches in any case')
    group.add_argument('--output', default='', type=home_path, metavar='DIR',
                       help='root of all runs and teachers (default: ./output)')
    group.add_argument('--experiment', default='', type=home_path, metavar='NAME',
                       help='name of the run\'s folder (default: date, time, model and image size)')
    group.add_argument('--eval-metric', default='top1', type=str, metavar='METRIC', choices=['top1', 'top5', 'loss'],
                       help='metric that says which epoch is best')
    group.add_argument('--report', action=argparse.BooleanOptionalAction, default=None,
                       help='write report.html at the end of the run (default: where the extra `report` is installed)')
    group.add_argument('--report-to', default=None, type=str, metavar='TRACKER',
                       help='tensorboard, wandb, ... (Accelerate)')


def _add_refused(parser: argparse.ArgumentParser) -> None:
    """Add timm's unsupported options, so that an error can say why."""
    for name in UNSUPPORTED:
        parser.add_argument('--' + name.replace('_', '-'), nargs='*', default=None, help=argparse.SUPPRESS)
