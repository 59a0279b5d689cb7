#!/usr/bin/env python3
"""Train a spiking timm model with its real-valued twin as the teacher (SSCL).

    accelerate launch train.py                                    # bundled digits, no download
    accelerate launch train.py --data-dir DIR --model spiking_resnet34 --teacher resnet34

Shaped like timm's train.py and taking its options; Accelerate owns devices, precision and processes.
"""
import copy
import difflib
import hashlib
import importlib
import json
import logging
import math
import os
import pickle
import sys
import time
from argparse import Namespace
from collections import OrderedDict
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

import timm
import torch
import torch.nn as nn
import yaml
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs, broadcast
from timm.data import Mixup, create_loader, resolve_data_config
from timm.layers import convert_sync_batchnorm, set_fast_norm
from timm.models import load_checkpoint, resolve_model_input_args, safe_model_name
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import ClassificationTask
from timm.task._helpers import load_task_ema_checkpoint, resume_task_checkpoint
from timm.task.evaluator import ClassificationEvaluator
from timm.task.task import TrainingTask
from timm.utils import CheckpointSaver, distribute_bn, random_seed, setup_default_logging, unwrap_model, update_summary
from timm.utils.clip_grad import dispatch_clip_grad
from timm.utils.summary import trim_summary
from torchvision.utils import save_image

from timm_sscl import SSCLTask, calibrate, convert_ann, set_stem_pool, share_stem
from timm_sscl.data import CIFAR_POLICY, augment_cifar, create_dataset
from timm_sscl.neurons import packed_spikes
from timm_sscl.options import ARGS_FILE, OptionError, parse_args
from timm_sscl.registry import PREFIX
from timm_sscl.report import FiringRates, SpikingReport
from timm_sscl.spiking import SpikingModule
from timm_sscl.teacher_input import TeacherInput

_logger = logging.getLogger('train')

_THRESHOLD_IMAGES = 512  # images that --neuron-init ann measures activations on

TEACHER_FILE = 'teacher.json'  # in a teacher's folder, written when it is trained to its end
SUMMARY_FILE = 'summary.json'  # in a run's folder, written at its end

# what a teacher depends on, besides its architecture: two runs that agree in these share one
TEACHER_SETTINGS = (
    'dataset', 'train_split', 'train_num_samples', 'class_map', 'input_img_mode', 'input_key', 'target_key',
    'batch_size', 'grad_accum_steps', 'opt', 'opt_eps', 'opt_betas', 'momentum', 'weight_decay', 'clip_grad',
    'clip_mode', 'layer_decay', 'opt_kwargs', 'sched', 'lr', 'lr_base', 'lr_base_size', 'lr_base_scale',
    'lr_cycle_mul', 'lr_cycle_decay', 'lr_cycle_limit', 'lr_k_decay', 'warmup_lr', 'min_lr', 'decay_milestones',
    'decay_epochs', 'warmup_epochs', 'warmup_prefix', 'cooldown_epochs', 'decay_rate', 'epoch_repeats', 'no_aug',
    'train_crop_mode', 'scale', 'ratio',
    'hflip', 'vflip', 'color_jitter', 'color_jitter_prob', 'grayscale_prob', 'gaussian_blur_prob', 'aa', 'bce_loss',
    'bce_sum', 'bce_target_thresh', 'reprob', 'remode', 'recount', 'mixup', 'cutmix', 'cutmix_minmax', 'mixup_prob',
    'mixup_switch_prob', 'mixup_mode', 'mixup_off_epoch', 'smoothing', 'train_interpolation', 'drop', 'drop_path',
    'drop_block', 'bn_momentum', 'bn_eps', 'teacher_pretrained', 'teacher_size', 'teacher_mean', 'teacher_std',
)

_NEWER_TEACHER_SETTINGS = ('crop_padding', 'cutout')  # counted where given, so that older teachers are found


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Wrong input ends the script with one line that says what to do; errors while training keep their traceback."""
    try:
        yield
    except (OptionError, FileNotFoundError, FileExistsError, NotImplementedError, ValueError) as error:
        rank = int(os.environ.get('RANK', 0))
        print(f'error{f" (process {rank})" if rank else ""}: {" ".join(str(error).split())}', file=sys.stderr, flush=True)
        sys.exit(2)


# ---- processes and threads

def create_accelerator(args: Namespace) -> Accelerator:
    """Accelerator for the devices there are; two copies that do not know of each other are an error."""
    has_device = torch.cuda.is_available() or (hasattr(torch, 'accelerator') and torch.accelerator.is_available())
    precision = {'float16': 'fp16', 'bfloat16': 'bf16'}[args.amp_dtype] if args.amp else None
    cpu = args.device == 'cpu' or not has_device
    if args.amp and cpu and precision == 'fp16':
        raise OptionError('--amp on a CPU needs --amp-dtype bfloat16.')
    if args.sync_bn and cpu:
        raise OptionError('--sync-bn: PyTorch\'s SyncBatchNorm does not run on a CPU.')
    accelerator = Accelerator(
        cpu=cpu, mixed_precision=precision, gradient_accumulation_steps=args.grad_accum_steps, log_with=args.report_to,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=not args.no_ddp_bb)])
    world = int(os.environ.get('WORLD_SIZE', 1))
    if world != accelerator.num_processes:
        raise OptionError(f'{world} processes were launched, but Accelerate runs {accelerator.num_processes}: they '
                          f'would train copies. On CPU launch with torchrun --nproc_per_node {world} train.py.')
    return accelerator


def set_threads(args: Namespace, accelerator: Accelerator) -> None:
    """accelerate launch leaves a CPU run with one thread; give each process its share of the cores."""
    if accelerator.device.type != 'cpu' and args.threads is None:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    threads = args.threads or max(1, cores // int(os.environ.get('LOCAL_WORLD_SIZE', 1)))
    torch.set_num_threads(threads)
    _logger.info(f'Using {threads} CPU threads per process ({cores} cores); --threads sets another number.')


# ---- models and their weights

def load_weights(model: nn.Module, file: str, option: str) -> None:
    """Load a weights file strictly; nothing in it is unpickled."""
    if not os.path.isfile(file):
        raise FileNotFoundError(f"{option}: file '{file}' does not exist.")
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    try:
        load_checkpoint(model, file)
    except (pickle.UnpicklingError, EOFError, KeyError, AttributeError, TypeError, OSError) as error:
        raise ValueError(f"{option}: '{file}' is no weights file that can be read safely ({error}).") from error
    except Exception as error:  # safetensors raises its own types
        text = ' '.join(str(error).split())
        if 'state_dict' in text:
            raise ValueError(f"{option}: '{file}' holds the weights of another model than {type(model).__name__} with "
                             f'{len(expected)} tensors and {getattr(model, "num_classes", "?")} classes: {text[:300]}'
                             ) from error
        raise ValueError(f"{option}: '{file}' is no weights file that can be read safely ({text[:200]}).") from error


def check_model_name(name: str, option: str) -> None:
    """Raise for a name that timm does not know, with the closest ones."""
    if ':' in name or timm.is_model(name):
        return
    close = difflib.get_close_matches(name, timm.list_models(), n=3)
    raise OptionError(f"{option}: unknown model '{name}'." + (f" Did you mean {', '.join(close)}?" if close else ''))


def model_kwargs(
        args: Namespace,
        name: str,
        num_classes: int,
        extra: Dict[str, Any],
        input_size: Optional[Tuple[int, ...]] = None,
) -> Dict[str, Any]:
    """Arguments for timm.create_model that student and teacher share, as timm's script passes them."""
    requested = vars(args) if input_size is None else {**vars(args), 'input_size': input_size, 'img_size': None}
    return resolve_model_input_args(
        name, requested, num_classes=num_classes, drop_rate=args.drop, drop_path_rate=args.drop_path,
        drop_block_rate=args.drop_block, global_pool=args.gp, bn_momentum=args.bn_momentum, bn_eps=args.bn_eps, **extra)


def create_student(args: Namespace, num_classes: int) -> nn.Module:
    """The student, spiking where its name says so, with the weights that were asked for."""
    check_model_name(args.model, '--model')
    neuron = {name: getattr(args, name) for name in ('timesteps', 'tau', 'v_threshold', 'v_reset', 'detach_reset')}
    neuron.update(include=args.neuron_include, exclude=args.neuron_exclude, norm=args.norm)
    neuron = {name: value for name, value in neuron.items() if value is not None}
    if args.neuron_init == 'ann' and (set(neuron) & {'tau', 'v_threshold', 'v_reset'} or not (
            args.initial_checkpoint or args.pretrained or args.pretrained_path)):
        raise OptionError("--neuron-init ann: takes the thresholds from the ANN's weights and sets the neuron itself; "
                          'give the weights (--pretrained-path FILE) and leave --tau, --v-threshold and --v-reset.')
    if neuron and not args.model.startswith(PREFIX):
        option = next(iter(neuron)).replace('_', '-').replace('include', 'neuron-include').replace('exclude', 'neuron-exclude')
        raise OptionError(f"--{option}: '{args.model}' does not spike; "
                          f"--model {PREFIX}{args.model} does.")
    if args.norm is not None and args.sync_bn:
        raise OptionError(f'--norm {args.norm}: --sync-bn would replace its norms by plain ones; use one.')
    if args.stem_pool is not None and args.model.startswith(PREFIX):
        neuron['stem_pool'] = args.stem_pool
    overlay = {}
    if args.pretrained_path:
        if not os.path.isfile(args.pretrained_path):
            raise FileNotFoundError(f"--pretrained-path: file '{args.pretrained_path}' does not exist.")
        overlay = dict(pretrained_cfg_overlay=dict(file=args.pretrained_path, num_classes=-1))  # -1: adapt the head
    kwargs = model_kwargs(args, args.model, num_classes, {**args.model_kwargs, **overlay, **neuron})
    student = timm.create_model(pretrained=args.pretrained or bool(args.pretrained_path), **kwargs)
    if args.stem_pool is not None:
        set_stem_pool(student, args.stem_pool)
    if args.initial_checkpoint:
        load_weights(student, args.initial_checkpoint, '--initial-checkpoint')
    if args.share_stem:
        _share_stem(student)
    with torch.no_grad():
        if args.head_init_scale is not None:
            student.get_classifier().weight.mul_(args.head_init_scale)
            student.get_classifier().bias.mul_(args.head_init_scale)
        if args.head_init_bias is not None:
            nn.init.constant_(student.get_classifier().bias, args.head_init_bias)
    if args.grad_checkpointing:
        student.set_grad_checkpointing(enable=True)
    if args.sync_bn:
        student = convert_sync_batchnorm(student)
    return _placed(args, student)


def _share_stem(student: nn.Module) -> None:
    try:
        share_stem(student)
    except ValueError as error:
        raise OptionError(f'--share-stem: {error}') from error


def _placed(args: Namespace, model: nn.Module) -> nn.Module:
    if args.model_dtype:
        model = model.to(getattr(torch, args.model_dtype))
    return model.to(memory_format=torch.channels_last) if args.channels_last else model


def teacher_name(args: Namespace) -> str:
    """--teacher, or the student's own ANN."""
    return args.teacher or args.model.removeprefix(PREFIX)


def create_teacher(args: Namespace, num_classes: int, data_config: Dict[str, Any]) -> Tuple[nn.Module, TeacherInput]:
    """The teacher's architecture, pretrained weights only where asked for, and what makes its images of the student's.

    It is built for --teacher-size, or for the student's images; one that cannot be built for these has its own size,
    and the images are resized.
    """
    name = teacher_name(args)
    check_model_name(name, '--teacher')
    own = name == args.model.removeprefix(PREFIX)
    extra = {**(args.model_kwargs if own else {}), **args.teacher_kwargs}
    channels, *size = data_config['input_size']
    wanted = tuple(args.teacher_size or size)

    def create(input_size):
        return timm.create_model(
            pretrained=args.teacher_pretrained, **model_kwargs(args, name, num_classes, extra, input_size))

    try:
        teacher = create((channels, *wanted))
    except (AssertionError, TypeError, RuntimeError, ValueError) as error:
        if args.teacher_size:
            raise OptionError(f'--teacher-size {wanted[0]} {wanted[1]}: {name} cannot be built for it: {error}') from error
        wanted = tuple(timm.get_pretrained_cfg(name).input_size[1:])
        teacher = create((channels, *wanted))
        _logger.info(f'Teacher {name} cannot be built for images of {size[0]} x {size[1]} ({error}): it sees them '
                     f'resized to {wanted[0]} x {wanted[1]}.')
    if _pools_as_student(args):
        set_stem_pool(teacher, args.stem_pool)
    return _placed(args, teacher), TeacherInput(
        wanted if wanted != tuple(size) else None, _renormalization(args, teacher, data_config))


def _pools_as_student(args: Namespace) -> bool:
    """Whether --stem-pool applies to the teacher: the student's own ANN, unless timm's weights, trained with max
    pooling, are taken as they are."""
    as_they_are = args.teacher_pretrained and not args.teacher_epochs
    return args.stem_pool is not None and teacher_name(args) == args.model.removeprefix(PREFIX) and not as_they_are


def _renormalization(args: Namespace, teacher: nn.Module, data_config: Dict[str, Any]) -> Optional[Tuple]:
    """(student mean, student std, teacher mean, teacher std) where the teacher's differ."""
    cfg = teacher.pretrained_cfg if args.teacher_pretrained and not args.teacher_epochs else data_config
    mean, std = args.teacher_mean or cfg['mean'], args.teacher_std or cfg['std']
    channels = data_config['input_size'][0]
    for option, values in (('--teacher-mean', mean), ('--teacher-std', std)):
        if len(values) not in (1, channels):
            raise OptionError(f'{option}: {len(values)} values for {channels} channels.')
    mean, std = (tuple(v) * channels if len(v) == 1 else tuple(v) for v in (mean, std))
    if (mean, std) == (tuple(data_config['mean']), tuple(data_config['std'])):
        return None
    return data_config['mean'], data_config['std'], mean, std


def prepare_neurons(
        args: Namespace,
        accelerator: Accelerator,
        student: nn.Module,
        loader: Any,
        resumed: bool,
) -> Optional[SpikingReport]:
    """--neuron-init: gains or thresholds of a spiking student from real images, and the report of its conversion."""
    if not isinstance(student, SpikingModule):
        return None
    images = _first_images(loader, _THRESHOLD_IMAGES if args.neuron_init == 'ann' else args.batch_size)
    images = broadcast(images.to(next(student.parameters())))  # all processes set the same
    has_gains = any(lif.gain is not None for lif in student.neurons().values())
    if resumed or has_gains:
        _logger.info('Neurons keep the gains of the checkpoint.')
    elif args.neuron_init == 'calibrated':
        calibrate(student, images)
    elif args.neuron_init == 'ann':
        convert_ann(student, images, student.timesteps, percentile=args.ann_percentile)
    report = student.spiking_report()
    if accelerator.is_main_process:
        report.macs(images[:4])
        _logger.info(str(report))
    return report


def _first_images(loader: Any, n: int) -> torch.Tensor:
    """n training images, or as many as there are; timm's random state is set again before the training."""
    batches, count = [], 0
    for input, _ in loader:
        batches.append(input)
        count += len(input)
        if count >= n:
            break
    return torch.cat(batches)[:n]


# ---- data

class Loaders(NamedTuple):
    train: Any
    eval: Any
    mixup: Optional[Mixup]


def create_datasets(args: Namespace) -> Tuple[Any, Any]:
    """Training and validation set."""
    common = dict(
        root=args.data_dir, class_map=args.class_map, download=args.dataset_download, seed=args.seed,
        input_img_mode=args.input_img_mode or ('L' if args.in_chans == 1 else 'RGB'), input_key=args.input_key,
        target_key=args.target_key, trust_remote_code=args.dataset_trust_remote_code)
    train = create_dataset(
        args.dataset, split=args.train_split, is_training=True, batch_size=args.batch_size, repeats=args.epoch_repeats,
        num_samples=args.train_num_samples, **common)
    val = create_dataset(
        args.dataset, split=args.val_split, is_training=False, batch_size=args.validation_batch_size or args.batch_size,
        num_samples=args.val_num_samples, **common)
    return train, val


def resolve_num_classes(args: Namespace, dataset: Any) -> int:
    """--num-classes, or as many as the data set has."""
    classes = getattr(getattr(dataset, 'reader', dataset), 'class_to_idx', None) or getattr(dataset, 'classes', None)
    if args.num_classes is None and not classes:
        raise OptionError('--num-classes: the data set does not tell its number of classes; give it.')
    if args.num_classes is not None and classes and len(classes) > args.num_classes:
        raise OptionError(f'--num-classes {args.num_classes}: the data set has {len(classes)} classes.')
    return args.num_classes if args.num_classes is not None else len(classes)


def create_loaders(
        args: Namespace,
        datasets: Tuple[Any, Any],
        data_config: Dict[str, Any],
        num_classes: int,
) -> Loaders:
    """timm's loaders, not sharded and without its prefetcher: Accelerate does both."""
    common = dict(
        input_size=data_config['input_size'], mean=data_config['mean'], std=data_config['std'], use_prefetcher=False,
        distributed=False, num_workers=args.workers, persistent_workers=args.workers > 0, pin_memory=args.pin_mem,
        worker_seeding=args.worker_seeding)
    interpolation = args.train_interpolation
    if args.no_aug or not interpolation:
        interpolation = data_config['interpolation']
    policy = args.aa == CIFAR_POLICY  # not timm's; color jitter is off beside it, as beside timm's
    train = create_loader(
        datasets[0], batch_size=args.batch_size, is_training=True, no_aug=args.no_aug, re_prob=args.reprob,
        re_mode=args.remode, re_count=args.recount, re_split=args.resplit, train_crop_mode=args.train_crop_mode,
        scale=args.scale, ratio=args.ratio, hflip=args.hflip, vflip=args.vflip,
        color_jitter=None if policy else args.color_jitter, color_jitter_prob=args.color_jitter_prob,
        grayscale_prob=args.grayscale_prob or 0., gaussian_blur_prob=args.gaussian_blur_prob or 0.,
        auto_augment=None if policy else args.aa,
        interpolation=interpolation, **common)
    if not args.no_aug and (policy or args.crop_padding is not None or args.cutout is not None):
        datasets[0].transform = augment_cifar(
            datasets[0].transform, data_config['input_size'][1:], args.crop_padding, policy, args.cutout)
    val = create_loader(
        datasets[1], batch_size=args.validation_batch_size or args.batch_size, is_training=False,
        interpolation=data_config['interpolation'], crop_pct=data_config['crop_pct'], **common)
    if hasattr(datasets[0], '__len__') and len(train) == 0:
        raise OptionError(f'--batch-size {args.batch_size} is larger than the training set '
                          f'({len(datasets[0])} images).')
    return Loaders(train, val, _create_mixup(args, num_classes))


def _create_mixup(args: Namespace, num_classes: int) -> Optional[Mixup]:
    if not (args.mixup > 0 or args.cutmix > 0. or args.cutmix_minmax is not None):
        return None
    if args.batch_size % 2:
        raise OptionError(f'--batch-size {args.batch_size}: mixup and cutmix need an even batch.')
    return Mixup(
        mixup_alpha=args.mixup, cutmix_alpha=args.cutmix, cutmix_minmax=args.cutmix_minmax, prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob, mode=args.mixup_mode, label_smoothing=args.smoothing,
        num_classes=num_classes)


def criterion_kwargs(args: Namespace, loaders_mix: bool) -> Dict[str, Any]:
    """Options of timm's classification loss."""
    kwargs = dict(loss_type='bce' if args.bce_loss else 'ce', smoothing=args.smoothing, soft_targets=loaders_mix)
    if args.bce_loss:
        kwargs.update(bce_target_thresh=args.bce_target_thresh, bce_sum=args.bce_sum, pos_weight=args.bce_pos_weight)
    return kwargs


# ---- one training, of a teacher or of a student

@dataclass
class Session:
    """What all trainings of a run share."""
    args: Namespace
    accelerator: Accelerator
    make_loaders: Callable[[], Loaders]


class FitResult(NamedTuple):
    last: Dict[str, float]  # metrics of the last epoch
    best: Optional[float]
    best_epoch: Optional[int]
    firing_rates: Dict[str, float]  # of the last epoch, on the validation set; empty for an ANN


class Meters:
    """Sums of a training epoch's values, kept on the device."""

    def __init__(self):
        self.sums: Dict[str, Any] = OrderedDict()
        self.counts: Dict[str, float] = {}

    def update(self, values: Dict[str, Any], n: int) -> None:
        for name, value in values.items():
            value = value.detach().float() if isinstance(value, torch.Tensor) else value
            if isinstance(value, float) and math.isnan(value):
                continue  # an undefined CKA
            self.sums[name] = self.sums.get(name, 0.) + value * n
            self.counts[name] = self.counts.get(name, 0) + n

    def means(self) -> 'OrderedDict[str, float]':
        return OrderedDict((name, float(total) / self.counts[name]) for name, total in self.sums.items())


def resolve_lr(args: Namespace, num_processes: int) -> float:
    """--lr, or --lr-base scaled by the global batch as timm does."""
    if args.lr is not None:
        return args.lr
    ratio = args.batch_size * num_processes * args.grad_accum_steps / args.lr_base_size
    scale = args.lr_base_scale or ('sqrt' if any(o in args.opt.lower() for o in ('ada', 'lamb')) else 'linear')
    return args.lr_base * (ratio ** 0.5 if scale == 'sqrt' else ratio)


def restore(task: TrainingTask, file: str, optimizer: Optional[torch.optim.Optimizer] = None) -> Optional[int]:
    """Load a checkpoint of this task; the epoch to go on with, where the file tells."""
    try:
        epoch = resume_task_checkpoint(task, file, optimizer=optimizer)
        if task.has_ema():
            load_task_ema_checkpoint(task, file)
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"--resume: '{file}' is no checkpoint of this model and run: "
                         f'{" ".join(str(error).split())[:300]}') from error
    return epoch


class Fit:
    """One training from start to end: epochs, validation, checkpoints, summary.

    Args:
        session: What all trainings of the run share.
        task: timm TrainingTask to train.
        folder: Where checkpoints and the summary go.
        epochs: Number of epochs of the schedule.
        name: For the log.
        resume: Checkpoint file to continue from.
        ema: Whether --model-ema applies.
        prepare_input: What is done to a batch of images first.
    """

    def __init__(
            self,
            session: Session,
            task: TrainingTask,
            folder: Path,
            epochs: int,
            name: str,
            resume: str = '',
            ema: bool = False,
            prepare_input: Optional[Callable[[torch.Tensor], torch.Tensor]] = None,
    ):
        self.prepare_input = prepare_input
        self.accelerator = accelerator = session.accelerator
        self.args = args = copy.copy(session.args)
        args.epochs = epochs
        args.lr = resolve_lr(args, accelerator.num_processes)
        self.task, self.folder, self.name = task, folder, name
        self.loaders = loaders = session.make_loaders()
        random_seed(args.seed, accelerator.process_index)
        optimizer = create_optimizer_v2(
            task.get_trainable_module(), **{**optimizer_kwargs(cfg=args), **args.opt_kwargs})
        updates = math.ceil(len(loaders.train) / accelerator.num_processes / args.grad_accum_steps)
        self.scheduler, self.epochs = create_scheduler_v2(
            optimizer, **scheduler_kwargs(args), updates_per_epoch=updates)
        if ema:
            task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup,
                           device=torch.device('cpu') if args.model_ema_force_cpu else None)
        self.start_epoch = self._resume(resume, optimizer)
        if args.torchcompile and name == 'student':
            task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
        eval_model = task.__dict__.get('eval_model')
        self.module, self.optimizer, self.train_loader, self.eval_loader = accelerator.prepare(
            task.trainable_module, optimizer, loaders.train, loaders.eval)
        task.trainable_module = self.module
        self.eval_model = eval_model if eval_model is not None else unwrap_model(task.get_eval_model())
        self.saver = self._create_saver(optimizer, resume)
        self.num_updates = self.start_epoch * updates
        if self.start_epoch and self.scheduler is not None:
            if args.sched_on_updates:
                self.scheduler.step_update(self.num_updates)
            else:
                self.scheduler.step(self.start_epoch)

    def _resume(self, resume: str, optimizer: torch.optim.Optimizer) -> int:
        args = self.args
        if not resume:
            return args.start_epoch or 0
        epoch = restore(self.task, resume, None if args.no_resume_opt else optimizer)
        return args.start_epoch if args.start_epoch is not None else epoch or 0

    def _create_saver(self, optimizer: torch.optim.Optimizer, resume: str) -> Optional[CheckpointSaver]:
        if not self.accelerator.is_main_process:
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        trim_summary(str(self.folder / 'summary.csv'), self.start_epoch)
        saver = CheckpointSaver(
            model=unwrap_model(self.task.get_eval_model()), optimizer=optimizer, args=self.args, task=self.task,
            checkpoint_dir=str(self.folder), recovery_dir=str(self.folder), decreasing=self.args.eval_metric == 'loss',
            max_history=self.args.checkpoint_hist)
        if resume and Path(resume).parent.resolve() == self.folder.resolve():
            saver.load_state_dict_from_checkpoint(resume)
        return saver

    def run(self) -> FitResult:
        """Train to the end."""
        if self.start_epoch >= self.epochs:
            _logger.info(f'{self.name}: all {self.epochs} epochs are done already.')
        self.started, self.steps_done = time.time(), 0
        metrics, rates = OrderedDict(), {}
        for epoch in range(self.start_epoch, self.epochs):
            train_metrics = self._train_epoch(epoch)
            last = epoch + 1 == self.epochs
            if last or (epoch + 1) % self.args.val_interval == 0:
                metrics, rates = self._validate(last)
                shown = '  '.join(f'{k} {v:.4g}' for k, v in metrics.items())
                _logger.info(f'{self.name} epoch {epoch + 1}/{self.epochs} validation: {shown}')
            self._finish_epoch(epoch, train_metrics, metrics)
        if not metrics:
            metrics, rates = self._validate(True)
        self.accelerator.wait_for_everyone()
        best, best_epoch = (self.saver.best_metric, self.saver.best_epoch) if self.saver else (None, None)
        return FitResult(dict(metrics), best, best_epoch, rates)

    def _train_epoch(self, epoch: int) -> 'OrderedDict[str, float]':
        args, accelerator = self.args, self.accelerator
        if hasattr(self.train_loader, 'set_epoch'):
            self.train_loader.set_epoch(epoch)
        if args.mixup_off_epoch and epoch >= args.mixup_off_epoch and self.loaders.mixup is not None:
            self.loaders.mixup.mixup_enabled = False
        self.task.train()
        meters, steps = Meters(), len(self.train_loader)
        began, images = time.time(), 0
        for step, (input, target) in enumerate(self.train_loader):
            result, n = self._train_step(epoch, input, target)
            images += n * accelerator.num_processes
            self.steps_done += 1
            terms = {k: v for k, v in result.items() if isinstance(v, torch.Tensor) and v.ndim == 0}
            meters.update({**terms, **self._layer_stats()}, n)
            if (step + 1) % args.log_interval == 0 or step + 1 == steps:
                self._log(epoch, step + 1, steps, meters, images / (time.time() - began))
                if args.save_images and accelerator.is_main_process:
                    save_image(input, self.folder / f'train-batch-{step}.jpg', padding=0, normalize=True)
            if self.saver and args.recovery_interval and (step + 1) % args.recovery_interval == 0:
                self.saver.save_recovery(epoch, batch_idx=step)
        return meters.means()

    def _train_step(self, epoch: int, input: torch.Tensor, target: torch.Tensor) -> Tuple[Dict[str, torch.Tensor], int]:
        args, accelerator, task = self.args, self.accelerator, self.task
        with accelerator.accumulate(self.module):
            if self.loaders.mixup is not None:
                input, target = self.loaders.mixup(input, target)
            with accelerator.autocast(), packed_spikes() if args.pack_spikes else nullcontext():
                result = task(self._cast(input), target)
            accelerator.backward(result['loss'])
            if args.clip_grad is not None and accelerator.sync_gradients:
                accelerator.unscale_gradients()
                dispatch_clip_grad(task.get_clip_parameters(exclude_head='agc' in args.clip_mode),
                                   value=args.clip_grad, mode=args.clip_mode)
            self.optimizer.step()
            self.optimizer.zero_grad()
        if accelerator.sync_gradients:
            self.num_updates += 1
            task.update_ema(step=self.num_updates)
            if self.scheduler is not None:
                self.scheduler.step_update(num_updates=self.num_updates, metric=None)
        if args.synchronize_step and accelerator.device.type == 'cuda':
            torch.cuda.synchronize()
        return result, input.shape[0]

    def _cast(self, input: torch.Tensor) -> torch.Tensor:
        if self.args.model_dtype:
            input = input.to(getattr(torch, self.args.model_dtype))
        input = input if self.prepare_input is None else self.prepare_input(input)
        return input.contiguous(memory_format=torch.channels_last) if self.args.channels_last else input

    def _layer_stats(self) -> Dict[str, float]:
        stats = getattr(self.task, 'stats', {})
        return {f'{key}_{layer}': value for layer, values in stats.items() for key, value in values.items()}

    def _log(self, epoch: int, step: int, steps: int, meters: Meters, rate: float) -> None:
        means = meters.means()
        if not math.isfinite(means['loss']):
            bad = [k for k, v in means.items() if not math.isfinite(v)]
            raise RuntimeError(f'the loss is not finite at epoch {epoch + 1}, step {step} ({", ".join(bad)}); the last '
                               f'checkpoint in {self.folder} is from before. A smaller --lr or --clip-grad may help.')
        per_step = (time.time() - self.started) / self.steps_done
        left = steps * (self.epochs - epoch) - step
        terms = '  '.join(f'{k} {v:.4g}' for k, v in means.items() if k == 'loss' or k.endswith('_loss'))
        lr = max(group['lr'] for group in self.optimizer.param_groups)
        _logger.info(f'{self.name} epoch {epoch + 1}/{self.epochs} [{step:>4}/{steps}]  {terms}  lr {lr:.3g}  '
                     f'{rate:.0f} img/s  ETA {timedelta(seconds=round(per_step * left))}')

    def _validate(self, last: bool) -> Tuple['OrderedDict[str, float]', Dict[str, float]]:
        if self.accelerator.num_processes > 1 and self.args.dist_bn:
            distribute_bn(self.module, self.accelerator.num_processes, self.args.dist_bn == 'reduce')
        model = self.eval_model
        spiking = last and hasattr(model, 'set_timesteps')
        with FiringRates(model) if spiking else nullcontext() as rates:
            metrics = evaluate(self.accelerator, model, self.eval_loader, self._cast)
        if self.task.has_ema() and not self.args.model_ema_force_cpu:
            ema = self.task.get_eval_model(ema=True)
            ema_metrics = evaluate(self.accelerator, ema, self.eval_loader, self._cast)
            metrics = OrderedDict({**metrics, **{f'{k}_ema': v for k, v in ema_metrics.items()}})
        return metrics, rates.per_layer() if spiking else {}

    def _finish_epoch(self, epoch: int, train_metrics: Dict[str, float], metrics: Dict[str, float]) -> None:
        metric = metrics.get(self.args.eval_metric)
        lr = sum(group['lr'] for group in self.optimizer.param_groups) / len(self.optimizer.param_groups)
        if self.saver is not None:
            file = str(self.folder / 'summary.csv')
            update_summary(epoch, train_metrics, metrics, filename=file, lr=lr)
            self.saver.save_checkpoint(epoch, metric=metric)
        self.accelerator.log({**{f'{self.name}/{k}': v for k, v in {**train_metrics, **metrics}.items()}}, step=epoch)
        if self.scheduler is not None:
            self.scheduler.step(epoch + 1, metric)


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: nn.Module, loader: Any, cast: Callable) -> 'OrderedDict[str, float]':
    """Loss, top-1 and top-5 on a prepared validation loader, every image counted once."""
    model.eval()
    evaluator = ClassificationEvaluator(accelerator.device)
    for input, target in loader:
        with accelerator.autocast():
            output = model(cast(input))
        output = output[0] if isinstance(output, (tuple, list)) else output
        output, target = accelerator.gather_for_metrics((output.float().contiguous(), target))
        evaluator.update(output, target)
    return evaluator.compute()


# ---- the teacher

class TeacherResult(NamedTuple):
    name: str
    top1: float
    source: str  # where its weights come from


def obtain_teacher(
        session: Session,
        teacher: nn.Module,
        teacher_input: TeacherInput,
        num_classes: int,
        root: Path,
) -> TeacherResult:
    """Give the teacher its weights: from a file, from timm, from this output root, or by training it first."""
    args, accelerator = session.args, session.accelerator
    name = teacher_name(args)
    if args.teacher_checkpoint:
        load_weights(teacher, args.teacher_checkpoint, '--teacher-checkpoint')
        source = args.teacher_checkpoint
    elif args.teacher_pretrained and not args.teacher_epochs:
        source = f"timm's pretrained weights ({teacher.pretrained_cfg.get('tag') or 'default'})"
    else:
        folder = teacher_folder(args, teacher, num_classes, root)
        if (folder / TEACHER_FILE).is_file():
            _logger.info(f'Teacher {name}: found {folder}, trained on the same data with the same settings.')
        else:
            train_teacher(session, name, teacher, teacher_input, folder)
        load_weights(teacher, str(folder / 'last.pth.tar'), 'teacher')
        source = f'{folder}, {json.loads((folder / TEACHER_FILE).read_text())["epochs"]} epochs'
    teacher.to(accelerator.device)
    loader = accelerator.prepare(session.make_loaders().eval)
    dtype = next(teacher.parameters()).dtype
    metrics = evaluate(accelerator, teacher, loader, lambda x: teacher_input(x.to(dtype)))
    _logger.info(f'Teacher {name}: {metrics["top1"]:.2f} top-1 on the validation set ({source}).')
    accelerator.free_memory()
    return TeacherResult(name, metrics['top1'], source)


def check_teacher(args: Namespace, teacher: nn.Module, num_classes: int, root: Path) -> None:
    """Find what is wrong with the teacher before anything is trained."""
    if args.teacher_checkpoint:
        load_weights(teacher, args.teacher_checkpoint, '--teacher-checkpoint')
    elif args.teacher_pretrained and not args.teacher_epochs:
        classes = teacher.pretrained_cfg.get('num_classes')
        if classes != num_classes:
            raise OptionError(f'--teacher-pretrained: the pretrained {teacher_name(args)} knows {classes} classes, the '
                              f'data has {num_classes}; --teacher-epochs N fine-tunes it first.')
    elif args.teacher_epochs == 0 and not (teacher_folder(args, teacher, num_classes, root) / TEACHER_FILE).is_file():
        raise OptionError('--teacher-epochs 0: there are no weights for the teacher, and an untrained one teaches '
                          'nothing; give --teacher-checkpoint FILE or --teacher-pretrained, or let it train.')


def teacher_folder(args: Namespace, teacher: nn.Module, num_classes: int, root: Path) -> Path:
    """Folder of the teacher for this data and these settings, named by a digest of them."""
    settings = {name: getattr(args, name) for name in TEACHER_SETTINGS}
    settings.update(
        model=teacher_name(args), num_classes=num_classes, kwargs=sorted(map(str, teacher._model_args.items())),
        data_dir=str(Path(args.data_dir).resolve()) if args.data_dir else None,
        epochs=args.teacher_epochs or args.epochs,
        data_config={k: str(v) for k, v in sorted(args.data_config.items())})
    settings.update({name: getattr(args, name) for name in _NEWER_TEACHER_SETTINGS if getattr(args, name) is not None})
    if _pools_as_student(args):
        settings['stem_pool'] = args.stem_pool
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:10]
    return root / 'teachers' / f'{safe_model_name(teacher_name(args))}-{digest}'


def train_teacher(session: Session, name: str, teacher: nn.Module, teacher_input: TeacherInput, folder: Path) -> None:
    """Train a copy of the teacher and keep it; a training that was cut off goes on where its last epoch ended."""
    args, accelerator = session.args, session.accelerator
    epochs = args.teacher_epochs or args.epochs
    resume = folder / 'last.pth.tar'
    _logger.info(f'Teacher {name}: no weights for it, so it is trained first, for {epochs} epochs, and kept in {folder}'
                 + (' (goes on from its last checkpoint)' if resume.is_file() else '') + '.')
    model = copy.deepcopy(teacher).requires_grad_(True)
    mixes = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    task = ClassificationTask(
        model, criterion_kwargs=criterion_kwargs(args, mixes), device=accelerator.device, verbose=False)
    task.to(accelerator.device)
    fit = Fit(session, task, folder, epochs, 'teacher', resume=str(resume) if resume.is_file() else '',
              prepare_input=teacher_input)
    result = fit.run()
    if accelerator.is_main_process:
        facts = dict(model=name, epochs=epochs, seed=args.seed, metrics=result.last, file='last.pth.tar')
        (folder / TEACHER_FILE).write_text(json.dumps(facts, indent=2) + '\n')
    accelerator.wait_for_everyone()
    accelerator.free_memory()


# ---- the run

def run_folder(args: Namespace, root: Path, data_config: Dict[str, Any], is_main_process: bool) -> Path:
    """Folder of this run, which the main process writes; an existing one is continued by --resume or left alone."""
    if args.resume and os.path.isdir(args.resume):
        return Path(args.resume)
    size = data_config['input_size'][-1]
    name = args.experiment or '-'.join(
        [datetime.now().strftime('%Y%m%d-%H%M%S'), safe_model_name(args.model), str(size)])
    folder = root / name
    if args.resume and Path(args.resume).parent.resolve() == folder.resolve():
        return folder
    if is_main_process and folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"--experiment: '{folder}' holds a run already; choose another name, "
                              f'or --resume {folder}.')
    return folder


def resume_file(args: Namespace) -> str:
    """Checkpoint file that --resume names."""
    if not args.resume:
        return ''
    file = os.path.join(args.resume, 'last.pth.tar') if os.path.isdir(args.resume) else args.resume
    if not os.path.isfile(file):
        raise FileNotFoundError(f"--resume: there is no checkpoint '{file}'.")
    return file


def parse_taps(text: Optional[str]) -> Any:
    """A number of stages, or a list of names."""
    if text is None:
        return None
    return int(text) if str(text).strip().isdigit() else [name.strip() for name in str(text).split(',')]


def create_task(
        args: Namespace,
        student: nn.Module,
        teacher: Optional[nn.Module],
        teacher_input: TeacherInput,
        data_config: Dict[str, Any],
        device: torch.device,
        mixes: bool,
) -> SSCLTask:
    """The student's training task."""
    return SSCLTask(
        student, teacher, losses=args.losses, loss_options=args.loss_options,
        criterion_kwargs=criterion_kwargs(args, mixes),
        task_loss_weight=1. if args.task_loss_weight is None else args.task_loss_weight,
        taps=parse_taps(args.sscl_taps), teacher_taps=parse_taps(args.sscl_teacher_taps),
        input_size=data_config['input_size'], renormalize=teacher_input.renormalize, teacher_size=teacher_input.size,
        device=device, dtype=getattr(torch, args.model_dtype or 'float32'))


def write_arguments(args: Namespace, folder: Path) -> None:
    """The options as YAML; `--config` and `--resume` read them."""
    skip = ('losses', 'loss_options', 'data_config', 'resume', 'config')
    folder.mkdir(parents=True, exist_ok=True)
    options = {name: value for name, value in sorted(vars(args).items()) if name not in skip}
    (folder / ARGS_FILE).write_text(yaml.safe_dump(options, default_flow_style=False))


def summarize(
        args: Namespace,
        folder: Path,
        student: nn.Module,
        teacher: Optional[TeacherResult],
        result: FitResult,
        report: Optional[SpikingReport],
        seconds: float,
) -> None:
    """Closing summary, on the terminal and as JSON."""
    timesteps = getattr(student, 'timesteps', None)
    losses = ' + '.join(f'{w:g} {name}' for name, w in args.losses.items()) or 'none'
    lines = ['', f'Teacher   {f"{teacher.name}: {teacher.top1:.2f} top-1 ({teacher.source})" if teacher else "none"}',
             f'Student   {args.model}{f", T={timesteps}" if timesteps else ""}: {result.last["top1"]:.2f} top-1 '
             f'after the last epoch' + (f', best {args.eval_metric} {result.best:.2f} (epoch {result.best_epoch + 1})'
                         if result.best is not None else '') + f'; cross-entropy + {losses}']
    if result.firing_rates:
        rates = result.firing_rates
        lines.append(f'Firing    {sum(rates.values()) / len(rates):.3f} spikes per neuron and step, '
                     f'the mean of {len(rates)} layers:')
        width = max(map(len, rates))
        lines += [f'          {name:<{width}}  {rate:.3f}' for name, rate in rates.items()]
        for name, rate in rates.items():
            if rate in (0., 1.):
                _logger.warning(f'Layer {name} {"never" if rate == 0. else "always"} fires on the validation set.')
    lines += [f'Files     {folder}: last.pth.tar, model_best.pth.tar, summary.csv, {ARGS_FILE}, {SUMMARY_FILE}',
              f'Time      {timedelta(seconds=round(seconds))}']
    _logger.info('\n'.join(lines))
    facts = dict(
        model=args.model, timesteps=timesteps, losses=args.losses, seed=args.seed, student=result.last,
        best={args.eval_metric: result.best, 'epoch': result.best_epoch},
        teacher=teacher._asdict() if teacher else None,
        firing_rates=result.firing_rates, conversion=report.as_dict() if report is not None else None, seconds=round(seconds, 1))
    (folder / SUMMARY_FILE).write_text(json.dumps(facts, indent=2) + '\n')


def main(argv: Optional[List[str]] = None) -> None:
    started = time.time()
    with one_line_errors():
        args, recipe = parse_args(argv)
        for module in args.device_modules or []:
            importlib.import_module(module)
        accelerator = create_accelerator(args)
        setup_logging(accelerator)
        set_threads(args, accelerator)
        if recipe:
            _logger.info('No data named: using the bundled handwritten digits and the recipe digits: '
                         + ', '.join(f'{k}={v}' for k, v in recipe.items()))
        if args.fast_norm:
            set_fast_norm()
        resume = resume_file(args)
        random_seed(args.seed, 0)  # the same initial weights on every process
        datasets = create_datasets(args)
        num_classes = resolve_num_classes(args, datasets[0])
        student = create_student(args, num_classes)
        data_config = args.data_config = resolve_data_config(vars(args), model=student)
        teacher, teacher_input = None, TeacherInput()
        if _needs_teacher(args):
            teacher, teacher_input = create_teacher(args, num_classes, data_config)
        session = Session(args, accelerator, partial(create_loaders, args, datasets, data_config, num_classes))
        loaders = session.make_loaders()
        task = create_task(
            args, student, teacher, teacher_input, data_config, accelerator.device, loaders.mixup is not None)
        root = Path(args.output or './output/train')
        folder = run_folder(args, root, data_config, accelerator.is_main_process)
        if teacher is not None:
            check_teacher(args, teacher, num_classes, root)
        if resume:
            restore(task, resume)
        report = prepare_neurons(args, accelerator, student, loaders.train, bool(resume))
        if accelerator.is_main_process:
            write_arguments(args, folder)
        if args.report_to:
            accelerator.project_configuration.set_directories(str(folder))
            accelerator.init_trackers('timm_sscl')
    taught_by = obtain_teacher(session, teacher, teacher_input, num_classes, root) if teacher is not None else None
    result = Fit(session, task, folder, args.epochs, 'student', resume=resume, ema=args.model_ema).run()
    if accelerator.is_main_process:
        summarize(args, folder, student, taught_by, result, report, time.time() - started)
    accelerator.end_training()


def _needs_teacher(args: Namespace) -> bool:
    from timm_sscl.losses import loss_needs
    return any(loss_needs(name)['teacher'] for name in args.losses)


def setup_logging(accelerator: Accelerator) -> None:
    """timm's logging on the main process; warnings only on the others."""
    setup_default_logging(logging.INFO if accelerator.is_main_process else logging.WARNING)
    logging.getLogger('timm.utils.checkpoint_saver').setLevel(logging.WARNING)  # a list of all files, every epoch


if __name__ == '__main__':
    main()
