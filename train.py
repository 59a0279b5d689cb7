#!/usr/bin/env python3
"""Train a spiking timm model with its real-valued twin as the teacher (SSCL).

    accelerate launch train.py                                    # bundled digits, no download
    accelerate launch train.py --data-dir DIR --model spiking_resnet34 --teacher resnet34

Shaped like timm's train.py and taking its options; Accelerate owns devices, precision and processes.
"""
import copy
import difflib
import importlib
import json
import logging
import math
import os
import pickle
import signal
import sys
import threading
import time
import zipfile
from argparse import Namespace
from collections import OrderedDict
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

import timm
import torch
import torch.nn as nn
import yaml
from accelerate import Accelerator, skip_first_batches
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DataLoaderConfiguration, DistributedDataParallelKwargs, ProjectConfiguration, broadcast, broadcast_object_list,
    gather_object)
from timm.data import Mixup, create_loader, create_transform, resolve_data_config
from timm.data.loader import adapt_to_chs
from timm.layers import convert_sync_batchnorm, set_fast_norm
from timm.models import clean_state_dict, load_checkpoint, resolve_model_input_args, safe_model_name
from timm.task import ClassificationTask
from timm.task._helpers import load_task_ema_checkpoint, resume_task_checkpoint
from timm.task.evaluator import ClassificationEvaluator
from timm.task.task import TrainingTask
from timm.utils import distribute_bn, random_seed, setup_default_logging, unwrap_model
from timm.utils.checkpoint_saver import load_checkpoint_metadata
from timm.utils.clip_grad import dispatch_clip_grad
from torch.utils.data import IterableDataset
from torchvision.utils import save_image

from timm_sscl import SSCLTask, calibrate, convert_ann, set_stem_pool, share_stem
from timm_sscl.training.checkpoint import (
    LAST, Position, RunSaver, StorageError, find_newest, holds_a_run, lock_folder, put_aside_later, read_run_state,
    why_damaged, write_text)
from timm_sscl.training.compile_check import check_compile_options
from timm_sscl.data import CIFAR_POLICY, augment_cifar, create_dataset
from timm_sscl.data.checks import (
    check_apart, check_channels, check_classes, check_copies, check_labels, check_metadata, check_seen)
from timm_sscl.data.folders import class_to_idx_of
from timm_sscl.data.manifest import DATA_FILE, check_data, describe_data
from timm_sscl.data.events import EventAugment, FrameSettings, create_event_loader, is_event_dataset
from timm_sscl.data.posterize import allow_posterize_to_black
from timm_sscl.data.samples import FailedTransform, Samples, UnreadableSample, WrongLabel
from timm_sscl.training.errors import OptionError, blame_options
from timm_sscl.distillation.frames_ann import accept_frames
from timm_sscl.losses import loss_needs
from timm_sscl.neurons import packed_spikes
from timm_sscl.training.optimizer import create_optimizer_and_schedule
from timm_sscl.training.option_ranges import check_choices, check_ranges
from timm_sscl.training.options import ARGS_FILE, AUTO, parse_args
from timm_sscl.training.option_groups import create_parser
from timm_sscl.training.process_failures import ProcessDied, as_process_failure
from timm_sscl.training.progress import ProgressLine
from timm_sscl.random_state import get_random_state, set_random_state
from timm_sscl.models.spiking import PREFIX
from timm_sscl.report import FiringRates, estimate_energy, mean_per_step
from timm_sscl.conversion import SpikingReport
from timm_sscl.training.rows import append_row, keep_rows
from timm_sscl.training.run_checks import LabelCountingEvaluator, warn_long_warmup, warn_teacher_at_chance
from timm_sscl.training.run_summary import best_epoch_facts, best_epoch_text, last_epoch_text
from timm_sscl.training.silent_layers import SilentLayers
from timm_sscl.conversion.model import SpikingModule
from timm_sscl.training.stop import Interrupted, StopRequest
from timm_sscl.training.teacher_cache import TeacherCache
from timm_sscl.distillation.teacher_input import TeacherInput
from timm_sscl.training.teacher_key import differing_from_legacy, legacy_settings, settings_digest, teacher_settings
from timm_sscl.training.teacher_record import TeacherRecord, check_asked_teacher, check_same_teacher, weights_digest
from timm_sscl.training.weights_file import check_file_exists, check_weights_file, match_with_file

_logger = logging.getLogger('train')

_THRESHOLD_IMAGES = 512  # images that --neuron-init ann measures activations on

TEACHER_FILE = 'teacher.json'  # in a teacher's folder, written when it is trained to its end
SUMMARY_FILE = 'summary.json'  # in a run's folder, written at its end

# what event frames depend on
EVENT_SETTINGS = (
    'timesteps', 'event_frames', 'event_mode', 'event_size', 'event_roll', 'event_split', 'event_axes')


class NonFiniteLoss(RuntimeError):
    """The loss of a step, or a weight, is nan or infinite; nothing of it was kept."""


class OtherProcessFailed(RuntimeError):
    """Another process found what ends the run, and says it."""


# these end a run with one line; all others keep their traceback
INPUT_ERRORS = OptionError, FileNotFoundError, FileExistsError, NotImplementedError, ValueError
DATA_ERRORS = UnreadableSample, WrongLabel, FailedTransform
RUN_ERRORS = StorageError, NonFiniteLoss, OtherProcessFailed, ProcessDied, *DATA_ERRORS


def _exit(error: Exception, code: int) -> None:
    """End the script with one line that says what to do."""
    rank = int(os.environ.get('RANK', 0))
    lines = str(error).strip().split('\n') if isinstance(error, RUN_ERRORS) else [str(error)]
    # a loader's worker adds its traceback
    text = lines[-1].partition(f'{type(error).__name__}: ')[2] or ' '.join(lines)
    print(f'error{f" (process {rank})" if rank else ""}: {" ".join(text.split())}', file=sys.stderr, flush=True)
    sys.exit(code)


@contextmanager
def _name_dead_processes() -> Iterator[None]:
    try:
        yield
    except (Interrupted, *RUN_ERRORS, OptionError):
        raise
    except (RuntimeError, OSError) as error:
        died = as_process_failure(error, int(os.environ.get('WORLD_SIZE', 1)))
        if died is None:
            raise
        if threading.current_thread() is threading.main_thread() and hasattr(signal, 'SIGCHLD'):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise it again at the next child's end
        raise died from error


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Wrong input ends the script with one line that says what to do."""
    try:
        with _name_dead_processes():
            yield
    except (*INPUT_ERRORS, *RUN_ERRORS) as error:
        _exit(error, 2)


@contextmanager
def told_how_to_go_on(folder: Optional[Path] = None) -> Iterator[None]:
    """What ends a training before its end is said in one line, with the command that continues it."""
    try:
        with _name_dead_processes():
            yield
    except (Interrupted, *RUN_ERRORS) as error:
        if folder is not None:
            newest = find_newest(folder)
            print(f'Newest whole checkpoint: {newest or "none yet"}\nTo go on: {resume_command(folder)}',
                  file=sys.stderr, flush=True)
        _exit(error, 128 + error.signal_number if isinstance(error, Interrupted) else 1)


def resume_command(folder: Path) -> str:
    """Command that continues the run in this folder, started as this one was."""
    precision = os.environ.get('ACCELERATE_MIXED_PRECISION', 'no')
    if 'TORCHELASTIC_RUN_ID' in os.environ:
        processes = os.environ.get('LOCAL_WORLD_SIZE', os.environ.get('WORLD_SIZE', '1'))
        launcher = f'torchrun --nproc_per_node {processes}'
        launcher = launcher if precision == 'no' else f'ACCELERATE_MIXED_PRECISION={precision} {launcher}'
    else:
        launcher = 'accelerate launch' + ('' if precision == 'no' else f' --mixed_precision {precision}')
    return f'{launcher} {os.path.relpath(__file__)} --resume {folder}'


# ---- processes and threads

def create_accelerator(args: Namespace) -> Accelerator:
    """Accelerator for the devices there are; two copies that do not know of each other are an error."""
    has_device = torch.cuda.is_available() or (hasattr(torch, 'accelerator') and torch.accelerator.is_available())
    precision = {'float16': 'fp16', 'bfloat16': 'bf16'}[args.amp_dtype] if args.amp else None
    cpu = args.device == 'cpu' or not has_device
    if args.device not in (None, 'cpu') and not has_device:
        raise OptionError(f'--device {args.device}: PyTorch sees no accelerator here; leave it, or give cpu.')
    if args.amp and cpu and precision == 'fp16':
        raise OptionError('--amp on a CPU needs --amp-dtype bfloat16.')
    if args.sync_bn and cpu:
        raise OptionError('--sync-bn: PyTorch\'s SyncBatchNorm does not run on a CPU.')
    _check_tracker(args.report_to)
    check_launch_plugins()
    accelerator = Accelerator(
        cpu=cpu, mixed_precision=precision, gradient_accumulation_steps=args.grad_accum_steps, log_with=args.report_to,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
        project_config=ProjectConfiguration(logging_dir=args.output or '.') if args.report_to else None,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=not args.no_ddp_bb)])
    world = int(os.environ.get('WORLD_SIZE', 1))
    if world != accelerator.num_processes:
        raise OptionError(f'{world} processes were launched, but Accelerate runs {accelerator.num_processes}: they '
                          f'would train copies. On CPU launch with torchrun --nproc_per_node {world} train.py.')
    if accelerator.mixed_precision == 'fp16' and accelerator.device.type == 'cpu':
        raise OptionError('--mixed_precision fp16 does not train on a CPU; bf16 does.')
    return accelerator


# of Accelerate's; by the variable that accelerate launch sets
_SHARDING = {'ACCELERATE_USE_FSDP': 'FSDP', 'ACCELERATE_USE_DEEPSPEED': 'DeepSpeed',
             'ACCELERATE_USE_MEGATRON_LM': 'Megatron-LM', 'ACCELERATE_USE_PARALLELISM_CONFIG': 'a parallelism config'}


def check_launch_plugins() -> None:
    """Raise where Accelerate would shard the model: a checkpoint of this script holds a whole one."""
    for variable, name in _SHARDING.items():
        if os.environ.get(variable, 'false').lower() in ('true', '1', 'yes'):
            raise OptionError(f'Accelerate was launched with {name}, which shards the model; this script keeps a whole '
                              f'copy per process. Launch it without {name} (accelerate config, or --multi_gpu).')


def _check_tracker(name: Optional[str]) -> None:
    """Accelerate leaves out a tracker that is not installed, in silence."""
    if name is None:
        return
    installed = sorted(str(tracker) for tracker in get_available_trackers())
    if name not in installed:
        raise OptionError(f"--report-to {name}: no such tracker is installed (pip install {name}); installed: "
                          f"{', '.join(installed) or 'none'}.")


def set_threads(args: Namespace, accelerator: Accelerator) -> None:
    """accelerate launch leaves a CPU run with one thread; give each process its share of the cores."""
    if accelerator.device.type != 'cpu' and args.threads is None:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    threads = args.threads or max(1, cores // int(os.environ.get('LOCAL_WORLD_SIZE', 1)))
    if threads > cores and accelerator.is_main_process:
        _logger.warning(f'--threads {threads}: this process may run on {cores} cores; more threads are slower.')
    torch.set_num_threads(threads)
    _logger.info(f'Using {threads} CPU threads per process ({cores} cores); --threads sets another number.')


# ---- models and their weights

_WEIGHT_FILES = 'model.safetensors', 'pytorch_model.bin', LAST  # in a folder, as hubs and this script write them


def load_weights(model: nn.Module, file: str, option: str) -> None:
    """Load a weights file, or the one in a folder, strictly; nothing in it is unpickled."""
    if os.path.isdir(file):
        found = [name for name in _WEIGHT_FILES if os.path.isfile(os.path.join(file, name))]
        if not found:
            raise FileNotFoundError(f"{option}: folder '{file}' holds none of {', '.join(_WEIGHT_FILES)}.")
        file = os.path.join(file, found[0])
    check_file_exists(file, option)
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    if zipfile.is_zipfile(file) and why_damaged(Path(file)):
        raise ValueError(f"{option}: '{file}' is damaged ({why_damaged(Path(file))}).")
    try:
        load_checkpoint(model, file)
    except Exception as error:  # torch, pickle and safetensors each raise their own
        check_weights_file(file, option)
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
    neuron.update(include=args.neuron_include, exclude=args.neuron_exclude, norm=args.norm,
                  allow_analog=args.allow_analog)
    if is_event_dataset(args.dataset) and not args.model.startswith(PREFIX):
        neuron['timesteps'] = None  # the number of frames only
    neuron = {name: value for name, value in neuron.items() if value is not None}
    if args.neuron_init == 'ann' and (set(neuron) & {'tau', 'v_threshold', 'v_reset'} or not (
            args.initial_checkpoint or args.pretrained or args.pretrained_path)):
        raise OptionError("--neuron-init ann: takes the thresholds from the ANN's weights and sets the neuron itself; "
                          'give the weights (--pretrained-path FILE) and leave --tau, --v-threshold and --v-reset.')
    if neuron and not args.model.startswith(PREFIX):
        option = (next(iter(neuron)).replace('_', '-').replace('include', 'neuron-include')
                  .replace('exclude', 'neuron-exclude'))
        raise OptionError(f"--{option}: '{args.model}' does not spike; "
                          f"--model {PREFIX}{args.model} does.")
    if args.torchcompile:
        check_compile_options(args.torchcompile, args.torchcompile_mode)
    if args.norm is not None and args.sync_bn:
        raise OptionError(f'--norm {args.norm}: --sync-bn would replace its norms by plain ones; use one.')
    if args.stem_pool is not None and args.model.startswith(PREFIX):
        neuron['stem_pool'] = args.stem_pool
    overlay = {}
    if args.pretrained_path:
        check_file_exists(args.pretrained_path, '--pretrained-path')
        overlay = dict(pretrained_cfg_overlay=dict(file=args.pretrained_path, num_classes=-1))  # -1: adapt the head
    kwargs = model_kwargs(args, args.model, num_classes, {**args.model_kwargs, **overlay, **neuron})
    try:
        student = timm.create_model(pretrained=args.pretrained or bool(args.pretrained_path), **kwargs)
    except TypeError as error:  # --drop-block, --bn-momentum, --model-kwargs: not every architecture takes them
        raise OptionError(f'--model {args.model} cannot be built with these options: {error}') from error
    except OptionError:
        raise
    except Exception as error:  # timm, torch, safetensors and the hub's client each raise their own
        raise OptionError(_why_not_built(args, error)) from error
    if args.pretrained_path and not args.pretrained_path.lower().endswith(('.npz', '.npy')):
        _check_pretrained(student, args.pretrained_path)
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


def _check_pretrained(student: nn.Module, file: str) -> None:
    found, missing = match_with_file(student, file)
    if not found:
        raise OptionError(f"--pretrained-path: '{file}' holds the weights of another model: none of "
                          f'{", ".join(missing[:4])}, ... of {type(student).__name__} is in it.')
    if missing:
        _logger.warning(f"--pretrained-path: {len(missing)} of {len(found) + len(missing)} parameters are not in "
                        f"'{file}' as they are, such as {', '.join(missing[:4])}; they start at random, or adapted.")


def _why_not_built(args: Namespace, error: Exception) -> str:
    """What is wrong with the student's options, or with the weights that it starts from."""
    reason = ' '.join(str(error).split())[:300] or type(error).__name__
    if args.pretrained_path:
        check_weights_file(args.pretrained_path, '--pretrained-path')
    if args.pretrained_path and 'Error(s) in loading state_dict' in reason:
        return f"--pretrained-path: '{args.pretrained_path}' holds the weights of another model: {reason}"
    if args.pretrained and not args.pretrained_path and isinstance(error, (OSError, RuntimeError)):
        return f'--pretrained: the weights of {args.model} cannot be had: {reason}'
    kind = '' if isinstance(error, ValueError) else f' ({type(error).__name__})'
    return f'--model {args.model} cannot be built with these options{kind}: {reason}'


def _share_stem(student: nn.Module) -> None:
    try:
        share_stem(student)
    except ValueError as error:
        raise OptionError(f'--share-stem: {error}') from error


def _placed(args: Namespace, model: nn.Module) -> nn.Module:
    if is_event_dataset(args.dataset):
        accept_frames(model)
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
    if not own:  # what not every architecture takes is about the student's
        args = Namespace(**{**vars(args), 'gp': None, 'drop_block': None, 'bn_momentum': None, 'bn_eps': None})
    channels, *size = data_config['input_size']
    wanted = tuple(args.teacher_size or size)

    def create(input_size):
        return timm.create_model(
            pretrained=args.teacher_pretrained, **model_kwargs(args, name, num_classes, extra, input_size))

    try:
        teacher = create((channels, *wanted))
    except Exception as error:  # timm's models each raise their own
        if args.teacher_size:
            raise OptionError(
                f'--teacher-size {wanted[0]} {wanted[1]}: {name} cannot be built for it: {error}') from error
        cfg = timm.get_pretrained_cfg(name)
        wanted = tuple(cfg.input_size[1:]) if cfg is not None else wanted
        with blame_options(dict(teacher=name, teacher_pretrained=args.teacher_pretrained, teacher_kwargs=extra)):
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
    for input, *_ in loader:
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
    """Training and validation set; with --eval-only the validation set twice."""
    with blame_options(dict(dataset=args.dataset, data_dir=args.data_dir), passing=(ValueError, FileNotFoundError)):
        return _create_datasets(args)


def _create_datasets(args: Namespace) -> Tuple[Any, Any]:
    if is_event_dataset(args.dataset):
        return _create_event_datasets(args)
    common = dict(
        root=args.data_dir, class_map=args.class_map, download=args.dataset_download, seed=args.seed,
        input_img_mode=args.input_img_mode or ('L' if _given_channels(args) == 1 else 'RGB'), input_key=args.input_key,
        target_key=args.target_key, trust_remote_code=args.dataset_trust_remote_code)
    val = create_dataset(
        args.dataset, split=args.val_split, is_training=False, batch_size=args.validation_batch_size or args.batch_size,
        num_samples=args.val_num_samples, **common)
    if args.eval_only:
        return val, val
    train = create_dataset(
        args.dataset, split=args.train_split, is_training=True, batch_size=args.batch_size, repeats=args.epoch_repeats,
        num_samples=args.train_num_samples, **common)
    check_apart(train, val, args.train_split == args.val_split)
    if not args.class_map:
        check_classes(train, val)
    check_seen(train, val, cut=args.train_num_samples is not None)
    check_copies(train, val)
    return train, val


def _create_event_datasets(args: Namespace) -> Tuple[Any, Any]:
    """Event data; its frames, two polarities as they are, are what the models take."""
    settings = FrameSettings(args.timesteps, args.event_frames, args.event_mode, args.event_size, args.event_axes)
    common = dict(root=args.data_dir, settings=settings, event_split=args.event_split, download=args.dataset_download)
    val = create_dataset(args.dataset, split=args.val_split, num_samples=args.val_num_samples, **common)
    size = [2, *val.frame_size]
    if args.input_size and list(args.input_size) != size:
        raise OptionError(f'--input-size {" ".join(map(str, args.input_size))}: event frames are '
                          f'{" x ".join(map(str, size))}; --event-size sets their size.')
    args.in_chans, args.input_size, args.mean, args.std = 2, size, [0., 0.], [1., 1.]
    if args.eval_only:
        return val, val
    train = create_dataset(args.dataset, split=args.train_split, num_samples=args.train_num_samples, **common)
    check_classes(train, val)
    check_seen(train, val, cut=args.train_num_samples is not None)
    check_copies(train, val)
    return train, val


def guard_samples(args: Namespace, datasets: Tuple[Any, Any], data_config: Dict[str, Any], num_classes: int) -> Tuple:
    """The data sets with seeded samples and checked labels; streamed ones, which have no numbered samples, as is."""
    guarded = []
    for dataset, training in zip(datasets, (not args.eval_only, False)):
        split = 'training' if training else 'validation'
        if isinstance(dataset, IterableDataset):
            if training:
                _logger.warning(
                    'The training data is a stream: a resumed run does not repeat its augmentation exactly.')
            guarded.append(dataset)
            continue
        check_labels(dataset, num_classes, split)
        check_metadata(dataset, split)
        dataset = Samples(
            dataset, num_classes, training, args.seed, args.max_unreadable, with_index=training and args.teacher_cache)
        check_channels(dataset, data_config['input_size'][0], split)
        guarded.append(dataset)
    return tuple(guarded)


def _given_channels(args: Namespace) -> Optional[int]:
    return args.input_size[0] if args.input_size else args.in_chans


def resolve_input(args: Namespace, student: nn.Module) -> Dict[str, Any]:
    """timm's data configuration for the channels that the student takes; the model's own mean and std follow them."""
    channels = _given_channels(args)
    for name in ('mean', 'std'):
        values = getattr(args, name)
        if values and len(values) not in (1, channels or 3):
            raise OptionError(f'--{name}: {len(values)} values for {channels or 3} channels; give one per channel.')
    config = resolve_data_config(vars(args), model=student)
    if channels is not None:
        config['input_size'] = (channels, *config['input_size'][1:])
    for name in ('mean', 'std'):
        config[name] = tuple(adapt_to_chs(config[name], config['input_size'][0]))
    return config


def resolve_num_classes(args: Namespace, dataset: Any) -> int:
    """--num-classes, or as many as the data set has."""
    classes = class_to_idx_of(dataset) or getattr(dataset, 'classes', None)
    if args.num_classes is None and classes and len(classes) == 1:
        raise OptionError(f"the data has one class, '{next(iter(classes))}', in which nothing can be told apart; "
                          f'--data-dir takes the folder above the splits, which hold a folder per class '
                          f'(--num-classes 1 where one is meant).')
    if args.num_classes is None and not classes:
        raise OptionError('--num-classes: the data set does not tell its number of classes; give it.')
    if args.num_classes is not None and classes and len(classes) > args.num_classes:
        raise OptionError(f'--num-classes {args.num_classes}: the data set has {len(classes)} classes.')
    if args.num_classes is not None and classes and len(classes) < args.num_classes:
        _logger.warning(f'--num-classes {args.num_classes}: the data set has {len(classes)} classes, labelled 0 to '
                        f'{len(classes) - 1} in its own order; --class-map gives them other labels.')
    return args.num_classes if args.num_classes is not None else len(classes)


_LOSS_OPTIONS = (
    'distill', 'loss', 'loss_file', 'sscl_taps', 'sscl_teacher_taps', 'teacher', 'bce_loss', 'bce_pos_weight')
# what timm's transforms and loaders may refuse, where it is given
_LOADER_OPTIONS = (
    'color_jitter', 'crop_padding', 'cutout', 'crop_pct', 'scale', 'ratio', 'reprob', 'img_size', 'mean', 'std',
    'batch_size', 'workers')


def create_loaders(
        args: Namespace,
        datasets: Tuple[Any, Any],
        data_config: Dict[str, Any],
        num_classes: int,
) -> Loaders:
    """Loaders that are not sharded and do not move batches: Accelerate does both."""
    make = _create_event_loaders if is_event_dataset(args.dataset) else _create_image_loaders
    with blame_options({name: getattr(args, name) for name in _LOADER_OPTIONS}):
        train, val = make(args, datasets, data_config)
    if hasattr(datasets[0], '__len__') and len(train) == 0:
        raise OptionError(f'--batch-size {args.batch_size} is larger than the training set '
                          f'({len(datasets[0])} images).')
    for loader in (train, val):  # else the start of an epoch would draw from the generator that dropout draws from
        loader.generator = torch.Generator().manual_seed(args.seed)
    return Loaders(train, val, _create_mixup(args, num_classes))


def _create_image_loaders(args: Namespace, datasets: Tuple[Any, Any], data_config: Dict[str, Any]) -> Tuple[Any, Any]:
    """timm's loaders, without its prefetcher."""
    common = dict(
        input_size=data_config['input_size'], mean=data_config['mean'], std=data_config['std'], use_prefetcher=False,
        distributed=False, num_workers=args.workers, persistent_workers=args.workers > 0, pin_memory=args.pin_mem,
        worker_seeding=args.worker_seeding)
    interpolation = args.train_interpolation
    if args.no_aug or not interpolation:
        interpolation = data_config['interpolation']
    policy = args.aa == CIFAR_POLICY  # not timm's; color jitter is off beside it, as beside timm's
    with blame_options(dict(aa=args.aa)):
        create_transform(data_config['input_size'], is_training=True, auto_augment=None if policy else args.aa)
    train = create_loader(
        datasets[0], batch_size=args.batch_size, is_training=True, no_aug=args.no_aug, re_prob=args.reprob,
        re_mode=args.remode, re_count=args.recount, train_crop_mode=args.train_crop_mode,
        scale=args.scale, ratio=args.ratio, hflip=args.hflip, vflip=args.vflip,
        color_jitter=None if policy else args.color_jitter, color_jitter_prob=args.color_jitter_prob,
        grayscale_prob=args.grayscale_prob or 0., gaussian_blur_prob=args.gaussian_blur_prob or 0.,
        auto_augment=None if policy else args.aa,
        interpolation=interpolation, **common)
    allow_posterize_to_black(datasets[0].transform)
    if not args.no_aug and (policy or args.crop_padding is not None or args.cutout is not None):
        datasets[0].transform = augment_cifar(
            datasets[0].transform, data_config['input_size'][1:], args.crop_padding, policy, args.cutout)
    val = create_loader(
        datasets[1], batch_size=args.validation_batch_size or args.batch_size, is_training=False,
        interpolation=data_config['interpolation'], crop_pct=data_config['crop_pct'], **common)
    return train, val


def _create_event_loaders(args: Namespace, datasets: Tuple[Any, Any], data_config: Dict[str, Any]) -> Tuple[Any, Any]:
    common = dict(num_workers=args.workers, pin_memory=args.pin_mem)
    augment = None if args.no_aug else EventAugment(args.hflip, args.event_roll)
    return (create_event_loader(datasets[0], args.batch_size, is_training=True, transform=augment, **common),
            create_event_loader(datasets[1], args.validation_batch_size or args.batch_size, **common))


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
    stop: StopRequest

    @property
    def launch(self) -> Dict[str, Any]:
        """What the launcher decides of a training."""
        return dict(processes=self.accelerator.num_processes, mixed_precision=self.accelerator.mixed_precision)

    def stop_if_asked(self, failed: bool = False) -> Tuple[bool, bool]:
        """(Did anything go wrong on any process, was any told to stop): all processes get the same answer."""
        flags = failed, self.stop.signal_number is not None
        if self.accelerator.num_processes > 1:
            flags = self.accelerator.reduce(torch.tensor(flags, device=self.accelerator.device).float(), 'sum').tolist()
        return bool(flags[0]), bool(flags[1])

    def interrupt(self) -> None:
        raise Interrupted(self.stop.signal_number or signal.SIGTERM)


class FitResult(NamedTuple):
    last: Dict[str, float]  # metrics of the last epoch
    best: Optional[float]
    best_epoch: Optional[int]
    firing_rates: Dict[str, float]  # of the last epoch, on the validation set; empty for an ANN
    step_rates: Dict[str, List[float]]  # the same at every time step


_TERMS = {'task_loss': 'the cross-entropy (task_loss)'}


def _terms(result: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    return {k: v for k, v in result.items() if isinstance(v, torch.Tensor) and v.ndim == 0}


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

    def state_dict(self) -> Dict[str, Any]:
        return dict(sums={name: float(total) for name, total in self.sums.items()}, counts=dict(self.counts))

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self.sums, self.counts = OrderedDict(state['sums']), dict(state['counts'])


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
        teacher_cache: What the task's teacher said of every sample.
        teacher_record: The task's teacher, for the checkpoints.
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
            teacher_cache: Optional[TeacherCache] = None,
            teacher_record: Optional[TeacherRecord] = None,
    ):
        self.teacher_cache = teacher_cache
        self.teacher_record = teacher_record
        self.prepare_input = prepare_input
        self.session = session
        self.accelerator = accelerator = session.accelerator
        self.args = args = copy.copy(session.args)
        args.epochs = epochs
        if name == 'teacher':  # where the student's run starts
            args.start_epoch, args.no_resume_opt = None, False
        args.lr = resolve_lr(args, accelerator.num_processes)
        self.task, self.folder, self.name = task, folder, name
        self.loaders = loaders = session.make_loaders()
        random_seed(args.seed, accelerator.process_index)
        updates = math.ceil(len(loaders.train) / accelerator.num_processes / args.grad_accum_steps)
        optimizer, self.scheduler, self.epochs = create_optimizer_and_schedule(
            args, task.get_trainable_module(), updates)
        if ema:
            task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup,
                           device=torch.device('cpu') if args.model_ema_force_cpu else None)
        self.position, self.run_state = self._resume(resume, optimizer)
        if args.torchcompile and name == 'student':
            task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
        eval_model = task.__dict__.get('eval_model')
        self.module, self.optimizer, self.train_loader, self.eval_loader = accelerator.prepare(
            task.trainable_module, optimizer, loaders.train, loaders.eval)
        task.trainable_module = self.module
        self.eval_model = eval_model if eval_model is not None else unwrap_model(task.get_eval_model())
        self.saver = self._create_saver(optimizer, resume)
        self.meters = Meters()
        self.num_updates = self.position.epoch * updates
        self.step_rates: Dict[str, List[float]] = {}  # of the last validation, by layer and time step
        self.odd_layers: Dict[str, str] = {}  # on the validation set
        self.silent_layers: List[str] = []  # in training
        self.failure: Optional[Exception] = None  # met by this process while it read data
        self._restore_run_state()

    def _resume(self, resume: str, optimizer: torch.optim.Optimizer) -> Tuple[Position, Dict[str, Any]]:
        """Weights and optimizer of the checkpoint; where to go on, and what is restored after the rest is built."""
        args = self.args
        if not resume:
            return Position(args.start_epoch or 0, 0), {}
        epoch = restore(self.task, resume, None if args.no_resume_opt else optimizer)
        if args.start_epoch is not None:
            return Position(args.start_epoch, 0), {}
        state = read_run_state(Path(resume))
        if state is None:
            return Position(epoch or 0, 0), {}
        now = self._settings()
        then = {key: state.get(key, value) for key, value in now.items()}
        if now == then:
            return state['position'], state
        changed = ', '.join(f'{key} {then[key]} -> {now[key]}' for key in now if now[key] != then[key])
        _logger.warning(f'The checkpoint was written with other settings ({changed}): the run goes on at the same '
                        f'place of the epoch, but not exactly as it would have.')
        samples = state['position'].step * then['processes'] * then['batch_size']
        step = samples // (now['processes'] * now['batch_size'])
        step -= step % args.grad_accum_steps
        return Position(state['position'].epoch, step), {**state, 'random': None, 'meters': None}

    def _settings(self) -> Dict[str, Any]:
        """What a run must not change to go on exactly, beside its files and options."""
        args, accelerator = self.args, self.accelerator
        return dict(
            processes=accelerator.num_processes, batch_size=args.batch_size, grad_accum_steps=args.grad_accum_steps,
            seed=args.seed, mixed_precision=accelerator.mixed_precision)

    def _restore_run_state(self) -> None:
        state, scheduler = self.run_state, self.scheduler
        self.num_updates = state.get('num_updates', self.num_updates)
        if state.get('meters'):
            self.meters.load_state_dict(state['meters'])
        if state.get('scaler') and self.accelerator.scaler is not None and not self.args.no_resume_opt:
            self.accelerator.scaler.load_state_dict(state['scaler'])
        if state.get('unreadable') and isinstance(self.loaders.train.dataset, Samples):
            self.loaders.train.dataset.mark_unreadable(state['unreadable'])
        if state.get('scheduler'):
            scheduler.restore_lr = state['scheduler']['restore_lr']
            scheduler.lr_scheduler.load_state_dict(state['scheduler']['plateau'])
        elif scheduler is not None and self.position != (0, 0):  # timm's others are functions of epoch and update
            if self.args.sched_on_updates:
                scheduler.step_update(self.num_updates)
            elif self.position.epoch:
                scheduler.step(self.position.epoch)

    def _collect_run_state(self) -> Dict[str, Any]:
        """What a checkpoint of this script holds beyond timm's; called by all processes."""
        plateau = getattr(self.scheduler, 'lr_scheduler', None)
        scaler = self.accelerator.scaler
        dataset = self.loaders.train.dataset
        return dict(
            num_updates=self.num_updates, **self._settings(),
            teacher=self.teacher_record._asdict() if self.teacher_record else None,
            random=gather_object([get_random_state()]), meters=self.meters.state_dict(),
            scaler=scaler.state_dict() if scaler is not None else None,
            scheduler=dict(restore_lr=self.scheduler.restore_lr, plateau=plateau.state_dict()) if plateau else None,
            unreadable=dataset.unreadable if isinstance(dataset, Samples) else [])

    def _create_saver(self, optimizer: torch.optim.Optimizer, resume: str) -> Optional[RunSaver]:
        if not self.accelerator.is_main_process:
            return None
        keep_rows(self.folder / 'summary.csv', lambda row: int(row['epoch']) < self.position.epoch)
        saver = RunSaver(
            self.folder, self.task, optimizer, self.args, self.args.checkpoint_hist, self.args.eval_metric == 'loss')
        if resume and Path(resume).parent.resolve() == self.folder.resolve():
            put_aside_later(self.folder, self.position, Path(resume))
            saver.load_state_dict_from_checkpoint(resume)
            if self.position.step == 0:
                saver.drop_recoveries_before(self.position)
        return saver

    def run(self) -> FitResult:
        """Train to the end."""
        if self.position.epoch >= self.epochs:
            _logger.info(f'{self.name}: all {self.epochs} epochs are done already.')
        self.started, self.steps_done = time.time(), 0
        metrics, rates = OrderedDict(), {}
        if self.run_state.get('random'):
            set_random_state(self.run_state['random'][self.accelerator.process_index])
        for epoch in range(self.position.epoch, self.epochs):
            with self._watch_layers() as layers:
                self._train_epoch(epoch, layers)
            self._distribute_bn()
            train_metrics = self.meters.means()
            metrics, rates = OrderedDict(), {}  # an epoch without validation has none
            last = epoch + 1 == self.epochs
            if last or (epoch + 1) % self.args.val_interval == 0:
                self._save_recovery()  # a fault in the validation loses nothing
                metrics, rates = self._validate(epoch)
                shown = '  '.join(f'{k} {v:.4g}' for k, v in metrics.items())
                _logger.info(f'{self.name} epoch {epoch + 1}/{self.epochs} validation: {shown}')
            self._finish_epoch(epoch, train_metrics, metrics, rates)
        if not metrics:
            metrics, rates = self._validate(self.epochs - 1)
        self.accelerator.wait_for_everyone()
        best, best_epoch = (self.saver.best_metric, self.saver.best_epoch) if self.saver else (None, None)
        return FitResult(dict(metrics), best, best_epoch, rates, self.step_rates if rates else {})

    def _watch_layers(self) -> Any:
        """What notes the layers that do not fire; nothing for an ANN, or where hooks would be compiled."""
        model = self.eval_model
        spiking = isinstance(model, nn.Module) and hasattr(unwrap_model(model), 'set_timesteps')
        return SilentLayers(unwrap_model(model)) if spiking and not self.args.torchcompile else nullcontext()

    def _warn_silent_layers(self, layers: Optional[SilentLayers], step: int) -> None:
        """Name the layers that have not fired since the last log, when they begin not to; called by all processes."""
        silent = layers.names() if layers is not None else []
        new = [name for name in silent if name not in self.silent_layers]
        if new and self.accelerator.is_main_process:
            _logger.warning(f'Not one spike in training since the last log, at epoch {self.position.epoch + 1}, step '
                            f'{step}: {", ".join(new)}.')
        self.silent_layers = silent

    def _train_epoch(self, epoch: int, layers: Optional[SilentLayers] = None) -> None:
        """The steps of an epoch that are not done yet."""
        args, accelerator, loader = self.args, self.accelerator, self.train_loader
        done = self.position.step if epoch == self.position.epoch else 0
        if not done:
            self.meters = Meters()
        if hasattr(loader, 'set_epoch'):
            loader.set_epoch(epoch)
        if isinstance(self.loaders.train.dataset, Samples):
            self.loaders.train.dataset.set_epoch(epoch)
        if args.mixup_off_epoch and epoch >= args.mixup_off_epoch and self.loaders.mixup is not None:
            self.loaders.mixup.mixup_enabled = False
        self.task.train()
        steps, began, images, due = len(loader), time.time(), 0, False
        self.position = Position(epoch, done)
        progress = ProgressLine(accelerator.is_main_process)
        for step, (input, target, *index) in enumerate(self._batches(loader, done), start=done):
            n, stop = self._train_step(step, input, target, *index)
            images += n * accelerator.num_processes
            self.steps_done += 1
            logs = (step + 1) % args.log_interval == 0 or step + 1 == steps
            rate = images / (time.time() - began)
            progress.update(partial(self._progress, step + 1, steps, rate), logs, last=step + 1 == steps)
            if logs:
                self._warn_silent_layers(layers, step + 1)
            if logs and args.save_images and accelerator.is_main_process:
                save_image(input, self.folder / f'train-batch-{step}.jpg', padding=0, normalize=True)
            due = due or bool(args.recovery_interval and (step + 1) % args.recovery_interval == 0)
            if accelerator.sync_gradients:  # between accumulated steps there are gradients that no file keeps
                self.position = Position(epoch, step + 1)
                if stop or due:
                    self._save_recovery()
                    due = False
                if stop:
                    self.session.interrupt()
        self._share_unreadable()

    def _batches(self, loader: Any, done: int) -> Iterator[Any]:
        """The batches from the first that is not done; where one cannot be read, what was done is kept first."""
        batch = None
        try:
            for batch in skip_first_batches(loader, done) if done else loader:
                yield batch
        except DATA_ERRORS as error:
            if self.accelerator.num_processes == 1:
                self._save_recovery()
            if self.accelerator.num_processes == 1 or batch is None:
                raise
            self.failure = error
            yield batch  # the others are in this step: it tells them, and ends before it reaches the weights

    def _share_unreadable(self) -> None:
        """All processes count the samples that any of them could not read."""
        dataset = self.loaders.train.dataset
        if self.accelerator.num_processes > 1 and isinstance(dataset, Samples):
            dataset.mark_unreadable(sorted(set(gather_object(dataset.unreadable))))
            dataset.check_limit()

    def _save_recovery(self) -> None:
        """Keep this moment, called by all processes."""
        self._check_weights()
        state = self._collect_run_state()
        if self.saver is not None:
            self.saver.save_recovery(self.position, state)

    def _check_weights(self) -> None:
        for name, value in unwrap_model(self.module).state_dict().items():
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise NonFiniteLoss(
                    f"'{name}' is not finite at epoch {self.position.epoch + 1}, step {self.position.step}, so "
                    f'this checkpoint was not written; those in {self.folder} are from before. A smaller '
                    f'--lr or --clip-grad may help.')

    def _train_step(
            self,
            step: int,
            input: torch.Tensor,
            target: torch.Tensor,
            index: Optional[torch.Tensor] = None,
    ) -> Tuple[int, bool]:
        """One batch: number of its images, and whether a process was told to stop."""
        args, accelerator, task = self.args, self.accelerator, self.task
        with accelerator.accumulate(self.module):
            if self.loaders.mixup is not None:
                input, target = self.loaders.mixup(input, target)
            with accelerator.autocast(), packed_spikes() if args.pack_spikes else nullcontext():
                input = self._cast(input)
                taught = () if self.teacher_cache is None else (self._ask_teacher(input, index),)
                result = task(input, target, *taught)
            accelerator.backward(result['loss'] * self._share_of_update(step))
            nonfinite = not math.isfinite(result['loss'].item())
            failed, stop = self.session.stop_if_asked(nonfinite or self.failure is not None)
            if failed:
                self._raise_failure(step, result)
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
        self.meters.update({**_terms(result), **self._layer_stats()}, len(input))
        return len(input), stop

    def _share_of_update(self, step: int) -> float:
        """Accelerate divides every loss by --grad-accum-steps; the last update of an epoch may have fewer."""
        accumulated, steps = self.args.grad_accum_steps, len(self.train_loader)
        rest = steps % accumulated
        return accumulated / rest if rest and step >= steps - rest else 1.

    def _ask_teacher(self, input: torch.Tensor, index: torch.Tensor) -> Any:
        cache, accelerator = self.teacher_cache, self.accelerator
        if not cache.is_open:
            taught = self.task.teach(input)
            with accelerator.local_main_process_first():
                cache.open(taught)
        return cache(index, partial(self.task.teach, input))

    def _raise_failure(self, step: int, result: Dict[str, torch.Tensor]) -> None:
        """Say what went wrong in this step; the terms of this process that are not finite, by name."""
        if self.failure is not None:
            raise self.failure
        values = {**{k: v.item() for k, v in _terms(result).items() if k != 'loss'}, **self._layer_stats()}
        bad = [f'{_TERMS.get(k, k)} is {v}' for k, v in values.items() if not math.isfinite(v)]
        if math.isfinite(result['loss'].item()):
            raise OtherProcessFailed('another process stopped the run; its own message says why.')
        self._check_weights()  # where the step before has spoilt them, that is what there is to say
        raise NonFiniteLoss(
            f'{self.name}: the loss is not finite at epoch {self.position.epoch + 1}, step {step + 1}: '
            f'{", ".join(bad)}. The weights were left as they were before this step; the last checkpoint in '
            f'{self.folder} is from before. A smaller --lr or --clip-grad may help.')

    def _cast(self, input: torch.Tensor) -> torch.Tensor:
        return _cast_input(self.args, input, self.prepare_input)

    def _layer_stats(self) -> Dict[str, float]:
        stats = getattr(self.task, 'stats', {})
        return {f'{key}_{layer}': value for layer, values in stats.items() for key, value in values.items()}

    def _progress(self, step: int, steps: int, rate: float) -> str:
        """Losses so far in this epoch, rate and time left."""
        means = self.meters.means()
        epoch = self.position.epoch
        per_step = (time.time() - self.started) / self.steps_done
        left = steps * (self.epochs - epoch) - step
        terms = '  '.join(f'{k} {v:.4g}' for k, v in means.items() if k == 'loss' or k.endswith('_loss'))
        lr = max(group['lr'] for group in self.optimizer.param_groups)
        return (f'{self.name} epoch {epoch + 1}/{self.epochs} [{step:>4}/{steps}]  {terms}  lr {lr:.3g}  '
                f'{rate:.0f} img/s  ETA {timedelta(seconds=round(per_step * left))}')

    def _distribute_bn(self) -> None:
        """--dist-bn: the same running statistics on every process, the average's too where it is validated."""
        processes = self.accelerator.num_processes
        if processes == 1 or not self.args.dist_bn:
            return
        distribute_bn(self.module, processes, self.args.dist_bn == 'reduce')
        if self.task.has_ema() and not self.args.model_ema_force_cpu:
            distribute_bn(self.task.get_trainable_module(ema=True), processes, self.args.dist_bn == 'reduce')

    def _validate(self, epoch: int) -> Tuple['OrderedDict[str, float]', Dict[str, float]]:
        """Metrics on the validation set, and every neuron layer's firing rate there."""
        model, spiking = self.eval_model, hasattr(unwrap_model(self.eval_model), 'set_timesteps')
        if spiking and self.args.torchcompile:  # hooks would have it compiled anew at every validation
            spiking = epoch + 1 >= self.epochs
            model = unwrap_model(model) if spiking else model
        with FiringRates(model) if spiking else nullcontext() as rates:
            metrics = evaluate(self.session, model, self.eval_loader, self._cast)
        if spiking:
            rates.sum_over_processes()
        self.step_rates = rates.per_step() if spiking else {}
        rates = rates.per_layer() if spiking else {}
        self._warn_odd_layers(epoch, rates)
        if self.task.has_ema() and not self.args.model_ema_force_cpu:
            ema = self.task.get_eval_model(ema=True)
            ema_metrics = evaluate(self.session, ema, self.eval_loader, self._cast)
            metrics = OrderedDict({**metrics, **{f'{k}_ema': v for k, v in ema_metrics.items()}})
        return metrics, rates

    def _warn_odd_layers(self, epoch: int, rates: Dict[str, float]) -> None:
        """Name the layers that never or always fire, when they begin to."""
        odd = {name: 'never' if rate == 0. else 'always' for name, rate in rates.items() if rate in (0., 1.)}
        for name, what in odd.items() if self.accelerator.is_main_process else ():
            if self.odd_layers.get(name) != what:
                _logger.warning(f'Layer {name} {what} fires on the validation set (epoch {epoch + 1}).')
        self.odd_layers = odd

    def _finish_epoch(
            self,
            epoch: int,
            train_metrics: Dict[str, float],
            metrics: Dict[str, float],
            rates: Dict[str, float],
    ) -> None:
        name = self.args.eval_metric
        metric = metrics.get(f'{name}_ema', metrics.get(name))  # the average's ranks, as in timm
        lr = sum(group['lr'] for group in self.optimizer.param_groups) / len(self.optimizer.param_groups)
        columns = {
            **{f'train_{k}': v for k, v in train_metrics.items()}, **{f'eval_{k}': v for k, v in metrics.items()},
            **{f'firing_rate_{k}': v for k, v in rates.items()},
            **{f'firing_rate_step{t + 1}': v for t, v in enumerate(mean_per_step(self.step_rates) if rates else ())},
            'lr': lr}
        self.accelerator.log({f'{self.name}/{k}': v for k, v in columns.items()}, step=epoch)
        if self.scheduler is not None:
            self.scheduler.step(epoch + 1, metric)
        self.position = Position(epoch + 1, 0)
        self._check_weights()
        state = self._collect_run_state()
        if self.saver is not None:
            append_row(self.folder / 'summary.csv', {'epoch': epoch, **columns})
            self.saver.save_epoch(self.position, state, metric=metric)


def _cast_input(args: Namespace, input: torch.Tensor, prepare_input: Optional[Callable] = None) -> torch.Tensor:
    if args.model_dtype:
        input = input.to(getattr(torch, args.model_dtype))
    input = input if prepare_input is None else prepare_input(input)
    return input.contiguous(memory_format=torch.channels_last) if args.channels_last and input.ndim == 4 else input


def _told_to_others(session: Session, loader: Any) -> Iterator[Any]:
    """The loader's batches; a sample that cannot be read here stops the other processes too."""
    try:
        yield from loader
    except DATA_ERRORS:
        session.stop_if_asked(True)
        raise


@torch.no_grad()
def evaluate(
        session: Session,
        model: nn.Module,
        loader: Any,
        cast: Callable,
        evaluator: Optional[ClassificationEvaluator] = None,
) -> 'OrderedDict[str, float]':
    """Loss, top-1 and top-5 on a prepared validation loader, every image counted once."""
    model.eval()
    accelerator = session.accelerator
    evaluator = ClassificationEvaluator(accelerator.device) if evaluator is None else evaluator
    for input, target in _told_to_others(session, loader):
        failed, stop = session.stop_if_asked()
        if failed:
            raise OtherProcessFailed('another process stopped the run; its own message says why.')
        if stop:
            session.interrupt()
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
    record: TeacherRecord


def obtain_teacher(
        session: Session,
        teacher: nn.Module,
        teacher_input: TeacherInput,
        num_classes: int,
        root: Path,
        record: Optional[TeacherRecord] = None,
) -> TeacherResult:
    """Give the teacher its weights: from a file, from timm, from this output root, or by training it first."""
    args, accelerator = session.args, session.accelerator
    name = teacher_name(args)
    if args.teacher_checkpoint:
        load_weights(teacher, args.teacher_checkpoint, '--teacher-checkpoint')
        source = file = args.teacher_checkpoint
    elif args.teacher_pretrained and not args.teacher_epochs:
        source, file = f"timm's pretrained weights ({teacher.pretrained_cfg.get('tag') or 'default'})", None
    elif record is not None:
        file = str(recorded_file(args, teacher, num_classes, root, session.launch, record))
        _logger.info(f'Teacher {name}: goes on with {file}, which this run was taught by.')
        load_weights(teacher, file, '--resume')
        source = f'{Path(file).parent}, {record.epochs} epochs' if record.epochs else file
    else:
        folder, = broadcast_object_list(
            [find_teacher(args, teacher, num_classes, root, session.launch) if accelerator.is_main_process else None])
        if broadcast_object_list([_is_trained(folder) if accelerator.is_main_process else None])[0]:
            _logger.info(f'Teacher {name}: found {folder}, trained on the same data with the same settings.')
        else:
            train_teacher(session, name, teacher, teacher_input, folder)
        file = str(folder / LAST)
        load_weights(teacher, file, 'teacher')
        source = f'{folder}, {json.loads((folder / TEACHER_FILE).read_text())["epochs"]} epochs'
    taught_by = _record(args, teacher, file)
    teacher.to(accelerator.device)
    loader = accelerator.prepare(session.make_loaders().eval)
    dtype = next(teacher.parameters()).dtype
    evaluator = LabelCountingEvaluator(accelerator.device)
    metrics = evaluate(session, teacher, loader, lambda x: teacher_input(x.to(dtype)), evaluator)
    _logger.info(f'Teacher {name}: {metrics["top1"]:.2f} top-1 on the validation set ({source}).')
    if accelerator.is_main_process:
        counts = evaluator.label_counts.tolist()
        warn_teacher_at_chance(name, metrics['top1'], sum(counts), max(counts))
    accelerator.free_memory()
    return TeacherResult(name, metrics['top1'], source, taught_by)


def _is_trained(folder: Path) -> bool:
    """Whether a teacher's folder holds a training to its end, whole."""
    if not (folder / TEACHER_FILE).is_file():
        return False
    reason = why_damaged(folder / LAST)
    if reason:
        _logger.warning(f"The teacher's '{folder / LAST}' is damaged ({reason}): trained again from what is whole.")
    return not reason


def check_teacher(
        args: Namespace,
        teacher: nn.Module,
        num_classes: int,
        root: Path,
        launch: Optional[Dict[str, Any]] = None,
        record: Optional[TeacherRecord] = None,
) -> None:
    """Find what is wrong with the teacher before anything is trained; of a resumed run it must be the recorded one."""
    pretrained, file = args.teacher_pretrained and not args.teacher_epochs, args.teacher_checkpoint
    if record is not None:
        check_asked_teacher(record, teacher_name(args), None if args.teacher_checkpoint else args.teacher_epochs)
    if args.teacher_checkpoint:
        load_weights(teacher, args.teacher_checkpoint, '--teacher-checkpoint')
    elif pretrained:
        classes = teacher.pretrained_cfg.get('num_classes')
        if classes != num_classes:
            raise OptionError(f'--teacher-pretrained: the pretrained {teacher_name(args)} knows {classes} classes, the '
                              f'data has {num_classes}; --teacher-epochs N fine-tunes it first.')
    elif record is not None:
        file = str(recorded_file(args, teacher, num_classes, root, launch or {}, record))
        load_weights(teacher, file, '--resume')
    elif args.teacher_epochs == 0 and not _is_trained(find_teacher(args, teacher, num_classes, root, launch or {})):
        raise OptionError('--teacher-epochs 0: there are no weights for the teacher, and an untrained one teaches '
                          'nothing; give --teacher-checkpoint FILE or --teacher-pretrained, or let it train.')
    if record is not None:
        check_same_teacher(record, _record(args, teacher, file))


def recorded_file(
        args: Namespace,
        teacher: nn.Module,
        num_classes: int,
        root: Path,
        launch: Dict[str, Any],
        record: TeacherRecord,
) -> Path:
    """File of the teacher that a resumed run was taught by; where it was moved, that of the same settings."""
    file = Path(record.file or '')
    if file.is_file() and not why_damaged(file):
        return file
    folder = find_teacher(args, teacher, num_classes, root, launch)
    if _is_trained(folder):
        return folder / LAST
    raise OptionError(f'--resume: the run was taught by {record}, and that file is gone or damaged; --teacher-checkpoint '
                      f'FILE says where it is.')


def _record(args: Namespace, teacher: nn.Module, file: Optional[str]) -> TeacherRecord:
    """The teacher as a checkpoint records it."""
    facts = Path(file or '').parent / TEACHER_FILE
    epochs = json.loads(facts.read_text())['epochs'] if file and facts.is_file() else None
    dtype = str(next(teacher.parameters()).dtype)
    return TeacherRecord(teacher_name(args), file, epochs, weights_digest(teacher), dtype)


def read_teacher_record(
        file: str,
        teacher: nn.Module,
        num_classes: int,
        root: Path,
) -> Optional[TeacherRecord]:
    """The teacher that a checkpoint names; of one that version 0.1.0 wrote, what its options led to."""
    state = load_checkpoint_metadata(file)
    run_state = state.get('run_state') or {}
    if 'teacher' in run_state:
        return TeacherRecord(**run_state['teacher']) if run_state['teacher'] else None
    options = _stored_options(state)
    if not options.get('data_config') or options.get('teacher_checkpoint'):
        return None
    parser = create_parser()
    then = Namespace(**{**{action.dest: action.default for action in parser._actions}, **options})
    folder = _teacher_folder(then, teacher, num_classes, root, legacy_settings(then))
    if not (folder / TEACHER_FILE).is_file():
        return None
    epochs = json.loads((folder / TEACHER_FILE).read_text())['epochs']
    return TeacherRecord(teacher_name(then), str(folder / LAST), epochs, '', '')


def teacher_folder(
        args: Namespace,
        teacher: nn.Module,
        num_classes: int,
        root: Path,
        launch: Optional[Dict[str, Any]] = None,
) -> Path:
    """Folder of the teacher for this data and these settings, named by a digest of them."""
    settings = {'options': teacher_settings(args, launch), 'training_data': getattr(args, 'training_data', None)}
    return _teacher_folder(args, teacher, num_classes, root, settings)


def _teacher_folder(
        args: Namespace,
        teacher: nn.Module,
        num_classes: int,
        root: Path,
        settings: Dict[str, Any],
) -> Path:
    settings = dict(
        settings, model=teacher_name(args), num_classes=num_classes,
        kwargs=sorted(map(str, teacher._model_args.items())),
        data_dir=str(Path(args.data_dir).resolve()) if args.data_dir else None,
        epochs=args.teacher_epochs or args.epochs,
        data_config={k: str(v) for k, v in sorted(args.data_config.items())})
    if _pools_as_student(args):
        settings['stem_pool'] = args.stem_pool
    return root / 'teachers' / f'{safe_model_name(teacher_name(args))}-{settings_digest(settings)}'


def find_teacher(
        args: Namespace,
        teacher: nn.Module,
        num_classes: int,
        root: Path,
        launch: Dict[str, Any],
) -> Path:
    """Folder of the teacher for these settings: a new one's, or one of version 0.1.0, where it had the same."""
    folder = teacher_folder(args, teacher, num_classes, root, launch)
    legacy = _teacher_folder(args, teacher, num_classes, root, legacy_settings(args))
    if (folder / TEACHER_FILE).is_file() or not (legacy / TEACHER_FILE).is_file() or why_damaged(legacy / LAST):
        return folder
    state = load_checkpoint_metadata(str(legacy / LAST))
    differ = differing_from_legacy(args, launch, _stored_options(state), state.get('run_state') or {})
    if not differ:
        return legacy
    _logger.info(f'Teacher {teacher_name(args)}: {legacy}, which an earlier version trained, had other settings '
                 f'({", ".join(differ)}) and is not taken.')
    return folder


def _stored_options(state: Dict[str, Any]) -> Dict[str, Any]:
    """The options in a checkpoint; version 0.1.0 kept a Namespace."""
    options = state.get('args') or {}
    return dict(options if isinstance(options, dict) else vars(options))


def _warn_warmup(args: Namespace, name: str, epochs: int) -> None:
    warn_long_warmup(name, args.sched, args.warmup_epochs, epochs, args.warmup_prefix)


def train_teacher(session: Session, name: str, teacher: nn.Module, teacher_input: TeacherInput, folder: Path) -> None:
    """Train a copy of the teacher and keep it; a training that was cut off goes on from its newest whole checkpoint."""
    args, accelerator = session.args, session.accelerator
    epochs = args.teacher_epochs or args.epochs
    with lock_folder(folder, accelerator.is_main_process):
        resume, = broadcast_object_list([find_newest(folder) if accelerator.is_main_process else None])
        _logger.info(
            f'Teacher {name}: no weights for it, so it is trained first, for {epochs} epochs, and kept in {folder}'
            + (f' (goes on from {resume.name})' if resume else '') + '.')
        if accelerator.is_main_process:
            _warn_warmup(args, f'teacher {name}', epochs)
        model = copy.deepcopy(teacher).requires_grad_(True)
        mixes = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
        task = ClassificationTask(
            model, criterion_kwargs=criterion_kwargs(args, mixes), device=accelerator.device, verbose=False)
        task.to(accelerator.device)
        result = Fit(
            session, task, folder, epochs, 'teacher', resume=str(resume or ''), prepare_input=teacher_input).run()
        if accelerator.is_main_process:
            facts = dict(model=name, epochs=epochs, seed=args.seed, metrics=result.last, file=LAST,
                         options=teacher_settings(args, session.launch))
            write_text(folder / TEACHER_FILE, json.dumps(facts, indent=2) + '\n')
        accelerator.wait_for_everyone()
    accelerator.free_memory()


# ---- the run

def find_run(args: Namespace, root: Path, data_config: Dict[str, Any]) -> Tuple[Path, str]:
    """Folder of this run, and the checkpoint that it goes on from ('' where it starts).

    --resume FOLDER continues that one; auto the --experiment, or the newest run under --output with these very options,
    where there is one. A folder that holds a run is left alone otherwise.
    """
    size = data_config['input_size'][-1]
    name = args.experiment or '-'.join(
        [datetime.now().strftime('%Y%m%d-%H%M%S'), safe_model_name(args.model), str(size)])
    folder = root / name
    if args.resume == AUTO:
        folder = folder if args.experiment else _newest_run(args, root) or folder
        return folder, _newest_file(folder)
    if args.resume and os.path.isdir(args.resume):
        folder = Path(args.resume)
        checkpoint = _newest_file(folder)
        if not checkpoint and not (folder / ARGS_FILE).is_file():
            raise FileNotFoundError(f"--resume: '{folder}' holds no checkpoint that is whole, and no run.")
        return folder, checkpoint
    if args.resume:
        file = Path(args.resume)
        if not file.is_file():
            raise FileNotFoundError(f"--resume: there is no checkpoint '{file}'.")
        if why_damaged(file):
            raise ValueError(f"--resume: '{file}' is damaged or no checkpoint ({why_damaged(file)}); --resume "
                             f'{file.parent} takes the newest one that is whole.')
        if file.parent.resolve() == folder.resolve():
            return folder, str(file)
    if holds_a_run(folder):
        raise FileExistsError(f"--experiment: '{folder}' holds a run already; choose another name, "
                              f'or --resume {folder}.')
    return folder, args.resume


def _newest_file(folder: Path) -> str:
    """Newest whole checkpoint in a folder; one that timm's script wrote where this one wrote none."""
    file = find_newest(folder) or folder / LAST
    return str(file) if file.is_file() and not why_damaged(file) else ''


def _newest_run(args: Namespace, root: Path) -> Optional[Path]:
    """Newest run under root that was started with these options and did not end."""
    options = yaml.safe_load(_arguments(args))
    for file in sorted(root.glob(f'*/{ARGS_FILE}'), key=lambda f: f.stat().st_mtime, reverse=True):
        if not (file.parent / SUMMARY_FILE).exists() and _read_options(file) == options:
            return file.parent
    return None


def _read_options(file: Path) -> Any:
    try:
        return yaml.safe_load(file.read_text())
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        _logger.warning(f"--resume auto: '{file}' cannot be read and is left out: {' '.join(str(error).split())}")


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


def _arguments(args: Namespace) -> str:
    """The options as YAML; `--config` and `--resume` read them."""
    skip = ('losses', 'loss_options', 'data_config', 'training_data', 'resume', 'config')
    options = {name: value for name, value in sorted(vars(args).items()) if name not in skip}
    return yaml.safe_dump(options, default_flow_style=False)


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
    best = best_epoch_facts(args.eval_metric, result.last, result.best, result.best_epoch)
    lines = ['', f'Teacher   {f"{teacher.name}: {teacher.top1:.2f} top-1 ({teacher.source})" if teacher else "none"}',
             f'Student   {args.model}{f", T={timesteps}" if timesteps else ""}: {last_epoch_text(result.last)}'
             f'{best_epoch_text(best, args.eval_metric)}; cross-entropy + {losses}']
    if result.firing_rates:
        rates = result.firing_rates
        lines.append(f'Firing    {sum(rates.values()) / len(rates):.3f} spikes per neuron and step, '
                     f'the mean of {len(rates)} layers:')
        width = max(map(len, rates))
        lines += [f'          {name:<{width}}  {rate:.3f}' for name, rate in rates.items()]
        lines.append(f'          at every time step: {" ".join(f"{r:.3f}" for r in mean_per_step(result.step_rates))}')
    lines += [f'Files     {folder}: last.pth.tar, model_best.pth.tar, summary.csv, {ARGS_FILE}, {SUMMARY_FILE}',
              f'Time      {timedelta(seconds=round(seconds))}']
    _logger.info('\n'.join(lines))
    facts = dict(
        model=args.model, timesteps=timesteps, losses=args.losses, seed=args.seed, student=result.last,
        best=best,
        teacher=dict(name=teacher.name, top1=teacher.top1, source=teacher.source, file=teacher.record.file,
                     digest=teacher.record.digest) if teacher else None,
        firing_rates=result.firing_rates, firing_rates_per_step=result.step_rates,
        conversion=report.as_dict() if report is not None else None,
        seconds=round(seconds, 1))
    write_text(folder / SUMMARY_FILE, json.dumps(facts, indent=2) + '\n')


@dataclass
class Job:
    """A run that is ready: all that could be found wrong before it has been looked at."""
    session: Session
    task: SSCLTask
    student: nn.Module
    teacher: Optional[nn.Module]
    teacher_input: TeacherInput
    num_classes: int
    root: Path  # of all runs and teachers
    folder: Path
    resume: str
    teacher_record: Optional[TeacherRecord]  # that the checkpoint names
    report: Optional[SpikingReport] = None


def prepare(args: Namespace, accelerator: Accelerator, stop: StopRequest, held: ExitStack) -> Job:
    """Build data, student, teacher and task, and check them together; `held` keeps the folder locked."""
    random_seed(args.seed, 0)  # the same initial weights on every process
    datasets = create_datasets(args)
    num_classes = resolve_num_classes(args, datasets[0])
    student = create_student(args, num_classes)
    data_config = args.data_config = resolve_input(args, student)
    if is_event_dataset(args.dataset):  # a teacher depends on these as well
        data_config['events'] = {name: getattr(args, name) for name in EVENT_SETTINGS}
    described = {split: describe_data(dataset) for split, dataset in zip(('training', 'validation'), datasets)}
    args.training_data = settings_digest(described['training'])  # a teacher knows these classes, from these files
    datasets = guard_samples(args, datasets, data_config, num_classes)
    teacher, teacher_input = None, TeacherInput()
    if _needs_teacher(args):
        teacher, teacher_input = create_teacher(args, num_classes, data_config)
    session = Session(
        args, accelerator, partial(create_loaders, args, datasets, data_config, num_classes), stop)
    loaders = session.make_loaders()
    with blame_options({name: getattr(args, name) for name in _LOSS_OPTIONS}, passing=(ValueError,)):
        task = create_task(
            args, student, teacher, teacher_input, data_config, accelerator.device, loaders.mixup is not None)
    root = Path(args.output or './output/train')
    # one process looks: what it finds may change when it begins to write
    found = [find_run(args, root, data_config) if accelerator.is_main_process else None]
    folder, resume = broadcast_object_list(found)[0]
    record = None
    if teacher is not None:
        record = read_teacher_record(resume, teacher, num_classes, root) if resume else None
        check_teacher(args, teacher, num_classes, root, session.launch, record)
    if resume:
        _logger.info(f'Goes on from {resume}.')
        check_data(Path(resume).parent / DATA_FILE, **described)
        restore(task, resume)
    if accelerator.is_main_process:
        _warn_warmup(args, 'student', args.epochs)
    lr = resolve_lr(args, accelerator.num_processes)
    create_optimizer_and_schedule(Namespace(**{**vars(args), 'lr': lr}), task.get_trainable_module())
    held.enter_context(lock_folder(folder, accelerator.is_main_process))
    job = Job(session, task, student, teacher, teacher_input, num_classes, root, folder, resume, record)
    job.report = prepare_neurons(args, accelerator, student, loaders.train, bool(resume))
    if accelerator.is_main_process:
        write_text(folder / ARGS_FILE, _arguments(args))
        write_text(folder / DATA_FILE, json.dumps(described, indent=2) + '\n')
    if args.report_to:
        accelerator.project_configuration.logging_dir = str(folder)
        accelerator.init_trackers('timm_sscl', {k: v if isinstance(v, (int, float, str)) else str(v)
                                                for k, v in yaml.safe_load(_arguments(args)).items()})
    return job


def train(job: Job, started: float) -> None:
    """Train the teacher, where it has no weights yet, and the student."""
    args, accelerator = job.session.args, job.session.accelerator
    taught_by = None
    if job.teacher is not None:
        taught_by = obtain_teacher(
            job.session, job.teacher, job.teacher_input, job.num_classes, job.root, job.teacher_record)
    cache = None
    if args.teacher_cache:
        samples = len(job.session.make_loaders().train.dataset)
        cache = TeacherCache(job.folder, samples, create=accelerator.is_local_main_process)
    result = Fit(job.session, job.task, job.folder, args.epochs, 'student', resume=job.resume, ema=args.model_ema,
                 teacher_cache=cache, teacher_record=taught_by.record if taught_by else None).run()
    if accelerator.is_main_process:
        summarize(args, job.folder, job.student, taught_by, result, job.report, time.time() - started)


# ---- evaluation alone

class Evaluation(NamedTuple):
    """What one number of time steps gives on the validation set."""
    weights: str  # 'model', or 'ema'
    timesteps: Optional[int]
    top1: float
    top5: float
    loss: float
    firing_rate: Optional[float] = None  # spikes per neuron and step, the mean of the layers
    entropy: Optional[float] = None  # of a spike, bits per neuron and step
    energy_uj: Optional[float] = None  # of the arithmetic of one image
    ann_energy_uj: Optional[float] = None


_ENERGY_IMAGES = 32  # firing rates for the energy are those of so many images


def evaluate_only(args: Namespace, accelerator: Accelerator, stop: StopRequest) -> None:
    """--eval-only: accuracy, firing rates, entropy and energy of a checkpoint, at its own T or at others."""
    with one_line_errors():
        datasets = create_datasets(args)
        described = describe_data(datasets[1])
        num_classes = resolve_num_classes(args, datasets[1])
        student = create_student(args, num_classes)
        data_config = resolve_input(args, student)
        datasets = guard_samples(args, datasets, data_config, num_classes)
        session = Session(args, accelerator, partial(create_loaders, args, datasets, data_config, num_classes), stop)
        folder, weights = _weights_to_evaluate(args)
        if args.resume:
            check_data(folder / DATA_FILE, validation=described)
        if args.eval_timesteps and not isinstance(student, SpikingModule):
            raise OptionError(f"--eval-timesteps: '{args.model}' does not spike and has no time steps.")
    student.to(accelerator.device)
    loader = accelerator.prepare(session.make_loaders().eval)
    results, rates = [], {}
    for name, state in weights.items():
        with one_line_errors():
            _load_student(student, state, args.resume)
        for timesteps in args.eval_timesteps or [getattr(student, 'timesteps', None)]:
            if timesteps is not None:
                student.set_timesteps(timesteps)
            result, rates[f'{name} T={timesteps}'] = _evaluate_one(session, student, loader, name, timesteps)
            results.append(result)
    if accelerator.is_main_process:
        _report_evaluation(args, folder, results, rates)


def _weights_to_evaluate(args: Namespace) -> Tuple[Path, Dict[str, Optional[Dict[str, torch.Tensor]]]]:
    """Where the results go, and the weights by name: a checkpoint's and its EMA, or what the model was built with."""
    if not args.resume:
        if not (args.initial_checkpoint or args.pretrained or args.pretrained_path):
            raise OptionError(
                '--eval-only: no weights; give --resume FOLDER|FILE, --initial-checkpoint or --pretrained.')
        return Path(args.output or './output/eval'), {'model': None}
    file = args.resume if os.path.isfile(args.resume) else _newest_file(Path(args.resume))
    if not file:
        raise FileNotFoundError(
            f"--resume: '{args.resume}' is no checkpoint, and no folder that holds one that is whole.")
    if why_damaged(Path(file)):
        raise ValueError(f"--resume: '{file}' is damaged or no checkpoint ({why_damaged(Path(file))}).")
    try:
        checkpoint = load_checkpoint_metadata(file)
        states = {'model': checkpoint['state_dict'], 'ema': checkpoint.get('state_dict_ema')}
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError) as error:
        raise ValueError(f"--resume: '{file}' is no checkpoint of a run: {error}") from error
    return Path(file).parent, {name: state for name, state in states.items() if state}


def _load_student(student: nn.Module, state: Optional[Dict[str, torch.Tensor]], source: str) -> None:
    if state is None:
        return
    try:
        student.load_state_dict(clean_state_dict(state))
    except RuntimeError as error:
        raise ValueError(f"--resume: '{source}' holds the weights of another model: "
                         f'{" ".join(str(error).split())[:300]}') from error


def _evaluate_one(
        session: Session,
        student: nn.Module,
        loader: Any,
        weights: str,
        timesteps: Optional[int],
) -> Tuple[Evaluation, Dict[str, Dict[str, float]]]:
    cast = partial(_cast_input, session.args)
    if timesteps is None:
        return Evaluation(weights, None, **evaluate(session, student, loader, cast)), {}
    with FiringRates(student, per_neuron=True) as firing:
        metrics = evaluate(session, student, loader, cast)
    firing.sum_over_processes()
    rates, entropy = firing.per_layer(), firing.entropy()
    images = broadcast(cast(next(iter(loader))[0][:_ENERGY_IMAGES]))
    energy = estimate_energy(student, images)
    per_step = firing.per_step()
    layers = {name: dict(firing_rate=rates[name], firing_rate_per_step=per_step[name], entropy=entropy[name])
              for name in rates}
    mean = [sum(values.values()) / len(values) for values in (rates, entropy)]
    return Evaluation(weights, timesteps, **metrics, firing_rate=mean[0], entropy=mean[1], energy_uj=energy.spiking,
                      ann_energy_uj=energy.ann), layers


def _report_evaluation(args: Namespace, folder: Path, results: List[Evaluation], rates: Dict[str, Any]) -> None:
    """The table on the terminal; a row per result in evaluation.csv; all of it, with the layers, in a new JSON file."""
    columns = [name for name in Evaluation._fields if any(getattr(r, name) is not None for r in results)]
    rows = [[f'{v:.4g}' if isinstance(v, float) else str(v) for v in (getattr(r, c) for c in columns)] for r in results]
    widths = [max(map(len, column)) for column in zip(columns, *rows)]
    lines = ['', *('  '.join(f'{cell:>{w}}' for cell, w in zip(row, widths)) for row in (columns, *rows))]
    if len(results) == 1:  # of several the JSON file has the layers
        lines += [f'  {name:<30} {v["firing_rate"]:.3f} spikes ({" ".join(f"{r:.3f}" for r in v["firing_rate_per_step"])}'
                  f' step by step), {v["entropy"]:.3f} bits per neuron and step'
                  for layers in rates.values() for name, v in layers.items()]
    if any(r.energy_uj is not None for r in results):
        lines.append(f'Energy: microjoules of one image\'s arithmetic at 45 nm (4.6 pJ a MAC, 0.9 pJ an addition), '
                     f'with the firing rates of {_ENERGY_IMAGES} images or one batch; layers without binary or whole '
                     f'input are MACs; the stem counts {"once" if args.share_stem else "at every step"}.')
    now = datetime.now()
    file = folder / f'evaluation-{now.strftime("%Y%m%d-%H%M%S-%f")}.json'
    _logger.info('\n'.join([*lines, f'Files: {file}, {folder / "evaluation.csv"}']))
    with lock_folder(folder / 'evaluation'):  # the run itself may be going on
        write_text(file, json.dumps(dict(model=args.model, weights=args.resume or args.initial_checkpoint,
                                         results=[r._asdict() for r in results], layers=rates), indent=2) + '\n')
        for result in results:
            append_row(folder / 'evaluation.csv', {'time': now.isoformat(timespec='seconds'), 'model': args.model,
                                                   **result._asdict()})


def main(argv: Optional[List[str]] = None) -> None:
    started = time.time()
    with ExitStack() as held:
        with one_line_errors():
            args, recipe = parse_args(argv)
            check_ranges(args)
            check_choices(args)
            with blame_options(dict(device_modules=args.device_modules)):
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
            stop = held.enter_context(StopRequest())
            job = None if args.eval_only else prepare(args, accelerator, stop, held)
        if args.eval_only:
            with told_how_to_go_on():
                evaluate_only(args, accelerator, stop)
            return
        with told_how_to_go_on(job.folder):
            train(job, started)
    accelerator.end_training()


def _needs_teacher(args: Namespace) -> bool:
    return any(loss_needs(name)['teacher'] for name in args.losses)


def setup_logging(accelerator: Accelerator) -> None:
    """timm's logging on the main process; warnings only on the others."""
    setup_default_logging(logging.INFO if accelerator.is_main_process else logging.WARNING)
    logging.getLogger('timm.utils.checkpoint_saver').setLevel(logging.WARNING)  # a list of all files, every epoch
    logging.getLogger('timm.data.dataset').setLevel(logging.ERROR)  # names a sample by number; Samples by its path


if __name__ == '__main__':
    main()
