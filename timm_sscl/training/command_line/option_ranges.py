"""Check the values of timm's options at the start: ranges of numbers, and names."""
import argparse
import math
from typing import Dict, Sequence, Tuple

from PIL import Image

from timm_sscl.closest import closest

from ..errors import OptionError, option_text

__all__ = ['check_counts', 'check_values']

_INF = math.inf
_SHARE = (0, 1)
_Ranges = Dict[str, Tuple[float, float]]
_COUNTS: _Ranges = {
    **dict.fromkeys((
        'batch_size', 'epochs', 'grad_accum_steps', 'timesteps', 'checkpoint_hist', 'log_interval', 'val_interval',
        'threads', 'num_classes', 'validation_batch_size', 'train_num_samples', 'val_num_samples'), (1, _INF)),
    **dict.fromkeys(('teacher_epochs', 'workers', 'max_unreadable', 'recovery_interval'), (0, _INF)),
}
_RANGES: _Ranges = {
    **dict.fromkeys(('img_size', 'in_chans', 'recount', 'lr_base_size', 'lr_cycle_limit', 'event_size'), (1, _INF)),
    **dict.fromkeys((
        'start_epoch', 'warmup_epochs', 'cooldown_epochs', 'patience_epochs', 'mixup_off_epoch', 'event_roll',
        'crop_padding', 'cutout'), (0, _INF)),
    'seed': (0, 2 ** 32 - 1),
    **dict.fromkeys((
        'lr', 'lr_base', 'warmup_lr', 'min_lr', 'weight_decay', 'mixup', 'cutmix', 'opt_eps', 'epoch_repeats',
        'color_jitter', 'clip_grad', 'lr_noise_pct', 'lr_noise_std', 'lr_cycle_decay', 'decay_rate', 'bce_pos_weight'),
        (0, _INF)),
    **dict.fromkeys((
        'hflip', 'vflip', 'color_jitter_prob', 'grayscale_prob', 'gaussian_blur_prob', 'reprob', 'mixup_prob',
        'mixup_switch_prob', 'smoothing', 'bce_target_thresh', 'drop', 'drop_path', 'drop_connect', 'drop_block',
        'model_ema_decay', 'momentum', 'bn_momentum', 'layer_decay', 'layer_decay_min_scale',
        'layer_decay_no_opt_scale'), _SHARE),
}
_POSITIVE = (
    'decay_epochs', 'lr_cycle_mul', 'bn_eps', 'crop_pct', 'std', 'teacher_std', 'scale', 'ratio', 'lr_k_decay',
    'input_size', 'teacher_size')
_FINITE = 'mean', 'teacher_mean', 'head_init_scale', 'head_init_bias', 'task_loss_weight', 'lr_noise'
_PAIRS = 'scale', 'ratio', 'cutmix_minmax'  # (low, high)
_INTERPOLATIONS = 'nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos', 'random'
_CHOICES: Dict[str, Sequence[str]] = {
    'sched': ('cosine', 'tanh', 'step', 'multistep', 'plateau', 'poly', 'wsd', 'rsqrt', 'constant', 'none'),
    'remode': ('const', 'rand', 'pixel'),
    'mixup_mode': ('batch', 'pair', 'elem'),
    'train_crop_mode': ('rrc', 'rkrc', 'rkrr'),
    'interpolation': _INTERPOLATIONS[:-1],
    'train_interpolation': _INTERPOLATIONS,
    'worker_seeding': ('all', 'part'),
    'input_img_mode': tuple(Image.MODES),
}


def check_counts(args: argparse.Namespace) -> None:
    """Check that counts (epochs, samples, ...) are large enough.

    Raises:
        OptionError: One is not. The message names the option, its value and its range.
    """
    _check(args, _COUNTS)


def check_values(args: argparse.Namespace) -> None:
    """Check that numbers are in the range of their option, and names among those that timm's options accept.

    Raises:
        OptionError: One is not. The message names the option, its value and what would be right.
    """
    _check_ranges(args)
    _check_choices(args)


def _check(args: argparse.Namespace, ranges: _Ranges) -> None:
    for name, (low, high) in ranges.items():
        value = getattr(args, name)
        if value is not None and not isinstance(value, (int, float)):  # from a YAML file
            raise OptionError(f'{option_text(name, value)}: must be a number.')
        if value is not None and not (low <= value <= high and math.isfinite(value)):
            bounds = f'{low} or more' if high == _INF else f'between {low} and {high}'
            raise OptionError(f'{option_text(name, value)}: must be {bounds}.')


def _check_ranges(args: argparse.Namespace) -> None:
    """Raise OptionError if a number is not in the range of its option."""
    _check(args, _RANGES)
    for name in (*_POSITIVE, *_FINITE):
        value = getattr(args, name)
        values = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
        if not all(isinstance(v, (int, float)) and math.isfinite(v) and (v > 0 or name in _FINITE) for v in values):
            raise OptionError(f'{option_text(name, value)}: must be '
                              f'{"a finite number" if name in _FINITE else "more than 0"}.')
    for name in _PAIRS:
        value = getattr(args, name)
        pair = isinstance(value, (list, tuple)) and len(value) == 2 and value[0] <= value[1]
        if value is not None and not pair:
            raise OptionError(f'{option_text(name, value)}: takes two numbers, the lower one first.')
    if args.opt_betas is not None and not all(0 <= beta < 1 for beta in args.opt_betas):
        raise OptionError(f'{option_text("opt_betas", args.opt_betas)}: must be 0 or more and less than 1.')


def _check_choices(args: argparse.Namespace) -> None:
    """Raise OptionError if a name is not among those that timm's options accept."""
    for name, choices in _CHOICES.items():
        value = getattr(args, name)
        if value and value not in choices:
            close = closest(value, choices)
            raise OptionError(f'{option_text(name, value)}: unknown; there are {", ".join(choices)}.'
                              + (f" Did you mean '{close[0]}'?" if close else ''))
