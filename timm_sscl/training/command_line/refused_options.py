"""Options of timm's script that are refused, and options that do not apply to event data."""
from typing import Dict

__all__ = ['UNSUPPORTED', 'IMAGE_ONLY', 'EVENTS_ONLY']

# refused option -> reason; README lists them under "Differences"
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

# options that control how images are read or changed, or that do not work with event frames
IMAGE_ONLY = (
    'class_map', 'input_img_mode', 'input_key', 'target_key', 'img_size', 'crop_pct', 'interpolation', 'epoch_repeats',
    'train_crop_mode', 'scale', 'ratio', 'vflip', 'color_jitter', 'color_jitter_prob', 'grayscale_prob',
    'gaussian_blur_prob', 'aa', 'reprob', 'remode', 'recount', 'cutmix', 'cutmix_minmax',
    'train_interpolation', 'share_stem', 'save_images', 'eval_timesteps')
# options of event data
EVENTS_ONLY = 'event_frames', 'event_mode', 'event_size', 'event_roll', 'event_split', 'event_axes'
