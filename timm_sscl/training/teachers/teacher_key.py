"""Determine which settings two runs must have in common to share a trained teacher.

These are all options except those that a teacher's training does not depend on.
"""
import hashlib
import json
from argparse import Namespace
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional

from timm.models import is_model, model_entrypoint
from timm.models._registry import split_model_name_tag
from timm.optim._optim_factory import default_registry

from timm_sscl.data.registry import dataset_entry, registered_name

from ..command_line.option_groups import create_parser
from ..command_line.plugins import source_digest
from .teacher import teacher_name

__all__ = ['IRRELEVANT', 'plain', 'teacher_settings', 'settings_digest', 'legacy_settings', 'differing_from_legacy']

# options that a teacher's training does not depend on, or that the key contains in another form
IRRELEVANT = frozenset((
    # the student and its neurons (--stem-pool and --timesteps are added if they apply to the teacher)
    'model', 'timesteps', 'neuron', 'neuron_kwargs', 'surrogate', 'surrogate_kwargs', 'tau', 'v_threshold', 'v_reset',
    'detach_reset', 'neuron_init', 'ann_percentile', 'norm', 'norm_kwargs', 'residual', 'residual_kwargs',
    'stem_pool', 'share_stem', 'pack_spikes', 'neuron_include', 'neuron_exclude', 'pretrained', 'pretrained_path',
    'initial_checkpoint', 'model_kwargs', 'head_init_scale', 'head_init_bias', 'torchcompile', 'torchcompile_mode',
    'grad_checkpointing', 'model_ema', 'model_ema_force_cpu', 'model_ema_decay', 'model_ema_warmup',
    # what is compared with the teacher, and how
    'teacher_checkpoint', 'teacher_cache', 'distill', 'loss', 'loss_kwargs', 'loss_file', 'sscl_weight',
    'sscl_temperature', 'sscl_dim', 'sscl_critic', 'sscl_weighting', 'sscl_projection', 'sscl_queue', 'sscl_taps',
    'sscl_teacher_taps', 'sscl_cka_floor', 'sscl_cka_momentum', 'sscl_cka_scope', 'kd_weight', 'kd_temperature',
    'kd_step_temperature', 'tet_lambda', 'firing_rate_target', 'task_loss_weight', 'kd_distill_type', 'kd_loss_type',
    # contained in the key as the teacher's name, keyword arguments, epochs, classes, data (folder, files, labels) and
    # data configuration
    'teacher', 'kd_model_name', 'teacher_kwargs', 'gp', 'epochs', 'teacher_epochs', 'num_classes', 'data', 'data_dir',
    'img_size', 'in_chans', 'input_size', 'crop_pct', 'mean', 'std', 'interpolation', 'drop_connect',
    # validation (added if the schedule depends on it)
    'val_split', 'val_num_samples', 'validation_batch_size', 'val_interval', 'eval_metric', 'eval_only',
    'eval_timesteps', 'deploy', 'weight_bits',
    # where and how fast the run executes, and what it writes
    'device', 'device_modules', 'threads', 'local_rank', 'synchronize_step', 'deterministic', 'channels_last',
    'workers', 'pin_mem', 'no_prefetcher', 'output', 'experiment', 'log_interval', 'save_images', 'report_to',
    'checkpoint_hist', 'recovery_interval', 'resume', 'no_resume_opt', 'start_epoch', 'config', 'dataset_download',
    'dataset_trust_remote_code', 'max_unreadable', 'report',
    'plugin',  # contained in the key as digests of the files that define the teacher, the data set or the optimizer
    'seed', 'seeds',  # runs with different seeds share one teacher
))
_VALIDATION = 'val_split', 'val_num_samples', 'val_interval', 'eval_metric'  # part of the key with --sched plateau
# derived by the script, not options
_DERIVED = frozenset(('losses', 'loss_options', 'data_config', 'training_data', 'plugin_digests', 'fit_workers'))

# settings that version 0.1.0 included, whatever their value
_LEGACY = (
    'dataset', 'train_split', 'train_num_samples', 'class_map', 'input_img_mode', 'input_key', 'target_key',
    'batch_size', 'grad_accum_steps', 'opt', 'opt_eps', 'opt_betas', 'momentum', 'weight_decay', 'clip_grad',
    'clip_mode', 'layer_decay', 'layer_decay_min_scale', 'layer_decay_no_opt_scale', 'opt_kwargs', 'sched',
    'sched_on_updates', 'lr', 'lr_base', 'lr_base_size', 'lr_base_scale', 'lr_noise', 'lr_noise_pct', 'lr_noise_std',
    'lr_cycle_mul', 'lr_cycle_decay', 'lr_cycle_limit', 'lr_k_decay', 'warmup_lr', 'min_lr', 'decay_milestones',
    'decay_epochs', 'warmup_epochs', 'warmup_prefix', 'cooldown_epochs', 'patience_epochs', 'decay_rate',
    'epoch_repeats', 'no_aug', 'train_crop_mode', 'scale', 'ratio',
    'hflip', 'vflip', 'color_jitter', 'color_jitter_prob', 'grayscale_prob', 'gaussian_blur_prob', 'aa', 'bce_loss',
    'bce_sum', 'bce_target_thresh', 'bce_pos_weight', 'reprob', 'remode', 'recount', 'mixup', 'cutmix', 'cutmix_minmax',
    'mixup_prob', 'mixup_switch_prob', 'mixup_mode', 'mixup_off_epoch', 'smoothing', 'train_interpolation', 'drop',
    'drop_path', 'drop_block', 'bn_momentum', 'bn_eps', 'teacher_pretrained', 'teacher_size', 'teacher_mean',
    'teacher_std',
)
_LEGACY_WHERE_GIVEN = 'crop_padding', 'cutout'


def teacher_settings(args: Namespace, launch: Optional[Mapping[str, Any]] = None) -> Dict[str, Any]:
    """Return the options that a teacher depends on, as far as they differ from their defaults.

    Args:
        args: The options. Unknown options are included. For a plug-in, the files that define the teacher's network, the
            data set or the optimizer are included.
        launch: Settings of the launcher; {'processes': 1, 'mixed_precision': 'no'} are defaults.
    """
    parser = create_parser()
    counted = {name: value for name, value in vars(args).items() if name not in IRRELEVANT | _DERIVED}
    if args.sched == 'plateau':
        counted.update({name: getattr(args, name) for name in _VALIDATION})
    settings = {name: plain(value) for name, value in counted.items()
                if plain(value) != plain(parser.get_default(name))}
    if args.class_map and Path(args.class_map).is_file():
        settings['class_map'] = hashlib.sha256(Path(args.class_map).read_bytes()).hexdigest()
    sources = {f'{kind}_source': source_digest(value) for kind, value in _definitions(args).items()}
    settings.update({kind: digest for kind, digest in sources.items() if digest})
    launch = {'processes': 1, 'mixed_precision': 'no', **(launch or {})}
    settings.update({name: launch[name] for name, usual in (('processes', 1), ('mixed_precision', 'no'))
                     if launch[name] not in (usual, None)})
    return settings


def _definitions(args: Namespace) -> Dict[str, Any]:
    """Return the network, data set and optimizer of the teacher, which a plug-in may have registered."""
    name, _ = split_model_name_tag(teacher_name(args))
    optimizer = args.opt.lower().rpartition('_')[2]  # without a prefix such as lookahead_, as timm does
    return dict(
        model=model_entrypoint(name) if is_model(name) else None,
        dataset=dataset_entry(args.dataset) if registered_name(args.dataset) else None,
        optimizer=default_registry.get_optimizer_class(optimizer, bind_defaults=False)
        if optimizer in default_registry.list_optimizers() else None)


def plain(value: Any) -> Any:
    """Convert numbers to floats, since a file may say 0 for 0., and tuples to lists."""
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return float(value) if type(value) is int else value


def legacy_settings(args: Namespace) -> Dict[str, Any]:
    """Return the settings as in version 0.1.0, which named its teachers' folders by them."""
    settings = {name: getattr(args, name) for name in _LEGACY}
    settings = {name: float(v) if type(v) is int else v for name, v in settings.items()}
    settings.update({name: getattr(args, name) for name in _LEGACY_WHERE_GIVEN if getattr(args, name) is not None})
    return settings


def differing_from_legacy(
        args: Namespace,
        launch: Mapping[str, Any],
        stored: Mapping[str, Any],
        stored_launch: Mapping[str, Any],
) -> List[str]:
    """Return the settings in which a teacher of version 0.1.0 differs and which that version did not include.

    Args:
        args: The options now.
        launch: Settings of the launcher now, as in `teacher_settings`.
        stored: The options in the teacher's checkpoint.
        stored_launch: Settings of the launcher then.
    """
    parser = create_parser()
    then = Namespace(**{name: stored.get(name, parser.get_default(name)) for name in vars(args)})
    ours, theirs = teacher_settings(args, launch), teacher_settings(then, stored_launch)
    names = (ours.keys() | theirs.keys()) - set(_LEGACY) - set(_LEGACY_WHERE_GIVEN)
    return sorted(name for name in names if ours.get(name) != theirs.get(name))


def settings_digest(settings: Mapping[str, Any]) -> str:
    """Return ten hexadecimal digits of a digest of the settings, for a folder name."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:10]
