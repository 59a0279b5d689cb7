"""Set up the processes of a run: Accelerate, threads, logging."""
import importlib
import logging
import os
from argparse import Namespace
from pathlib import Path
from typing import Optional, Tuple

import torch
import yaml
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs, ProjectConfiguration
from timm.layers import set_fast_norm
from timm.utils import setup_default_logging

from timm_sscl.cpu_features import has_fast_bfloat16

from .errors import OptionError, blame_options
from .saving.resume import options_as_yaml

__all__ = ['create_accelerator', 'check_launch_plugins', 'count_cores', 'finish_trackers', 'set_threads',
           'setup_logging', 'start_trackers', 'warn_slow_precision']

_logger = logging.getLogger('train')


def create_accelerator(args: Namespace) -> Accelerator:
    """Create the Accelerator for the available devices, after --device-modules and --fast-norm took effect.

    Raises:
        OptionError: The options do not fit the devices, or the processes were launched without knowing of each other.
    """
    with blame_options(dict(device_modules=args.device_modules)):
        for module in args.device_modules or []:
            importlib.import_module(module)
    if args.fast_norm:
        set_fast_norm()
    if args.deterministic:
        _use_deterministic_kernels()
    has_device = torch.cuda.is_available() or torch.accelerator.is_available()
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
        dataloader_config=DataLoaderConfiguration(
            use_seedable_sampler=True, data_seed=args.seed, non_blocking=True),
        project_config=ProjectConfiguration(logging_dir=args.output or '.') if args.report_to else None,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=not args.no_ddp_bb)])
    world = int(os.environ.get('WORLD_SIZE', 1))
    if world != accelerator.num_processes:
        raise OptionError(f'{world} processes were launched, but Accelerate runs {accelerator.num_processes}: they '
                          f'would train copies. On CPU launch with torchrun --nproc_per_node {world} train.py.')
    if accelerator.mixed_precision == 'fp16' and accelerator.device.type == 'cpu':
        raise OptionError('--mixed_precision fp16 does not train on a CPU; bf16 does.')
    return accelerator


def _use_deterministic_kernels() -> None:
    """Make PyTorch use deterministic kernels. It warns about operations that have none."""
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # read when CUDA starts
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.use_deterministic_algorithms(True, warn_only=True)


# environment variable set by accelerate launch -> name of the sharding
_SHARDING = {'ACCELERATE_USE_FSDP': 'FSDP', 'ACCELERATE_USE_DEEPSPEED': 'DeepSpeed',
             'ACCELERATE_USE_MEGATRON_LM': 'Megatron-LM', 'ACCELERATE_USE_PARALLELISM_CONFIG': 'a parallelism config'}


def check_launch_plugins() -> None:
    """Raise OptionError if Accelerate would shard the model, since our checkpoints hold a whole model."""
    for variable, name in _SHARDING.items():
        if os.environ.get(variable, 'false').lower() in ('true', '1', 'yes'):
            raise OptionError(f'Accelerate was launched with {name}, which shards the model; this script keeps a whole '
                              f'copy per process. Launch it without {name} (accelerate config, or --multi_gpu).')


def _check_tracker(name: Optional[str]) -> None:
    """Raise OptionError if a tracker is not installed; Accelerate would silently ignore it."""
    if name is None:
        return
    installed = sorted(str(tracker) for tracker in get_available_trackers())
    if name not in installed:
        raise OptionError(f"--report-to {name}: no such tracker is installed (pip install {name}); installed: "
                          f"{', '.join(installed) or 'none'}.")


def count_cores() -> Tuple[int, int]:
    """Return the number of cores that this run may use on this machine, and this process's share of them, 1 or more."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return cores, max(1, cores // int(os.environ.get('LOCAL_WORLD_SIZE', 1)))


def set_threads(args: Namespace, accelerator: Accelerator) -> None:
    """Give each CPU process its share of the cores, since accelerate launch sets one thread."""
    if accelerator.device.type != 'cpu' and args.threads is None:
        return
    cores, own = count_cores()
    threads = args.threads or own
    if threads > cores and accelerator.is_main_process:
        _logger.warning(f'--threads {threads}: this process may run on {cores} cores; more threads are slower.')
    torch.set_num_threads(threads)
    _logger.info(f'Using {threads} CPU threads per process ({cores} cores); --threads sets another number.')


def warn_slow_precision(args: Namespace, accelerator: Accelerator) -> None:
    """Warn before the run if the options ask for bfloat16 on a CPU without instructions for it."""
    if accelerator.device.type != 'cpu' or has_fast_bfloat16() is not False:
        return
    option = f'--model-dtype {args.model_dtype}' if args.model_dtype == 'bfloat16' else '--amp-dtype bfloat16'
    if args.model_dtype == 'bfloat16' or accelerator.mixed_precision == 'bf16':
        _logger.warning(f'{option}: this CPU has neither AVX512-BF16 nor AMX, so that convolutions take several times '
                        f'as long as in float32; leave the option out.')


def setup_logging(accelerator: Accelerator) -> None:
    """Set up timm's logging on the main process, and warnings only on the others."""
    setup_default_logging(logging.INFO if accelerator.is_main_process else logging.WARNING)
    logging.getLogger('timm.utils.checkpoint_saver').setLevel(logging.WARNING)  # it lists all files every epoch
    # it names a sample by number; Samples names the path
    logging.getLogger('timm.data.dataset').setLevel(logging.ERROR)
    # the compiler looks for CUDA on machines without a GPU, too
    logging.getLogger('torch.utils.cpp_extension').addFilter(_concerns_the_user)


def _concerns_the_user(record: logging.LogRecord) -> bool:
    return 'No CUDA runtime is found' not in str(record.msg)


def start_trackers(args: Namespace, accelerator: Accelerator, folder: Path) -> None:
    """Open the trackers of a run (--report-to) with its options."""
    if args.report_to:
        accelerator.project_configuration.logging_dir = str(folder)
        accelerator.init_trackers('timm_sscl', {
            name: value if isinstance(value, (int, float, str)) else str(value)
            for name, value in yaml.safe_load(options_as_yaml(args)).items()})


def finish_trackers(accelerator: Accelerator) -> None:
    """Close the trackers of a run (--report-to). Accelerate closes them only together with the process group."""
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.trackers = []
