"""Create the student: a timm model with the requested weights."""
import logging
from argparse import Namespace
from typing import Any, Dict, Optional, Tuple

import timm
import torch
import torch.nn as nn
from timm.layers import convert_sync_batchnorm
from timm.models import resolve_model_input_args

from timm_sscl.closest import closest
from timm_sscl.conversion import convert_to_qcfs, set_stem_pool, share_stem
from timm_sscl.data.events import is_event_dataset
from timm_sscl.distillation.frames_ann import accept_frames
from timm_sscl.models.finite import check_finite
from timm_sscl.models.spiking import PREFIX

from .compile_check import check_compile_options
from .errors import OptionError
from .command_line.neuron_options import neuron_arguments
from .saving.weights import load_weights
from .saving.weights_file import check_file_exists, check_weights_file, match_with_file

__all__ = ['check_model_name', 'model_kwargs', 'create_student', 'place_model', 'without_initial_weights']

_logger = logging.getLogger('train')


def check_model_name(name: str, option: str) -> None:
    """Raise OptionError for a model name that timm does not know. The message names the closest ones."""
    if ':' in name or timm.is_model(name):
        return
    prefix = PREFIX if name.startswith(PREFIX) else ''  # it makes no two names similar
    known = [known.removeprefix(PREFIX) for known in timm.list_models() if known.startswith(PREFIX) == bool(prefix)]
    close = [prefix + match for match in closest(name.removeprefix(prefix), known, n=3)]
    raise OptionError(f"{option}: unknown model '{name}'." + (f" Did you mean {', '.join(close)}?" if close else ''))


def model_kwargs(
        args: Namespace,
        name: str,
        num_classes: int,
        extra: Dict[str, Any],
        input_size: Optional[Tuple[int, ...]] = None,
) -> Dict[str, Any]:
    """Return the arguments of timm.create_model that student and teacher share, as timm's script passes them."""
    requested = vars(args) if input_size is None else {**vars(args), 'input_size': input_size, 'img_size': None}
    return resolve_model_input_args(
        name, requested, num_classes=num_classes, drop_rate=args.drop, drop_path_rate=args.drop_path,
        drop_block_rate=args.drop_block, global_pool=args.gp, bn_momentum=args.bn_momentum, bn_eps=args.bn_eps, **extra)


def without_initial_weights(args: Namespace) -> Namespace:
    """Return the options of a student whose weights will come from a checkpoint of its run."""
    none = dict(pretrained=False, pretrained_path=None, initial_checkpoint='', neuron_init='none')
    return Namespace(**{**vars(args), **none})


def create_student(args: Namespace, num_classes: int) -> nn.Module:
    """Create the student, spiking if its name says so, with the requested weights.

    Raises:
        OptionError: The options do not fit the model, or it cannot be built with them.
    """
    check_model_name(args.model, '--model')
    neuron = neuron_arguments(args)
    neuron.update(include=args.neuron_include, exclude=args.neuron_exclude, allow_analog=args.allow_analog)
    if is_event_dataset(args.dataset) and not args.model.startswith(PREFIX):
        neuron['timesteps'] = None  # it only sets the number of event frames
    neuron = {name: value for name, value in neuron.items() if value is not None}
    asked = set(neuron) & {'tau', 'v_threshold', 'v_reset', 'neuron', 'neuron_kwargs'}
    if args.neuron_init == 'ann' and (asked or not (
            args.initial_checkpoint or args.pretrained or args.pretrained_path)):
        raise OptionError("--neuron-init ann: takes the thresholds from the ANN's weights and sets the neuron itself; "
                          'give the weights (--pretrained-path FILE) and leave --neuron, --neuron-kwargs, '
                          '--tau, --v-threshold and --v-reset.')
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
        overlay = dict(pretrained_cfg_overlay=dict(file=args.pretrained_path, num_classes=-1))  # -1: replace the head
    kwargs = model_kwargs(args, args.model, num_classes, {**args.model_kwargs, **overlay, **neuron})
    try:
        student = timm.create_model(pretrained=args.pretrained or bool(args.pretrained_path), **kwargs)
    except TypeError as error:  # not every architecture takes --drop-block, --bn-momentum, --model-kwargs
        raise OptionError(f'--model {args.model} cannot be built with these options: {error}') from error
    except OptionError:
        raise
    except Exception as error:  # timm, torch, safetensors and the hub's client raise many types
        raise OptionError(_why_not_built(args, error)) from error
    if args.pretrained_path and not args.pretrained_path.lower().endswith(('.npz', '.npy')):
        _check_pretrained(student, args.pretrained_path)
    if args.pretrained_path:
        check_finite(student.state_dict(), f"--pretrained-path: '{args.pretrained_path}'")
    if args.stem_pool is not None:
        set_stem_pool(student, args.stem_pool)
    if args.qcfs is not None:
        _convert_to_qcfs(student, args)
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
    return place_model(args, student)


def _check_pretrained(student: nn.Module, file: str) -> None:
    """Check which parameters were loaded from the --pretrained-path file; raise if none, warn if some are missing."""
    found, missing = match_with_file(student, file)
    if not found:
        raise OptionError(f"--pretrained-path: '{file}' holds the weights of another model: none of "
                          f'{", ".join(missing[:4])}, ... of {type(student).__name__} is in it.')
    if missing:
        _logger.warning(f"--pretrained-path: {len(missing)} of {len(found) + len(missing)} parameters are not in "
                        f"'{file}' as they are, such as {', '.join(missing[:4])}; they start at random, or adapted.")


def _why_not_built(args: Namespace, error: Exception) -> str:
    """Return what is wrong with the student's options or with its initial weights."""
    reason = ' '.join(str(error).split())[:300] or type(error).__name__
    if args.pretrained_path:
        check_weights_file(args.pretrained_path, '--pretrained-path')
    if args.pretrained_path and 'Error(s) in loading state_dict' in reason:
        return f"--pretrained-path: '{args.pretrained_path}' holds the weights of another model: {reason}"
    if args.pretrained and not args.pretrained_path and isinstance(error, (OSError, RuntimeError)):
        return f'--pretrained: the weights of {args.model} cannot be had: {reason}'
    kind = '' if isinstance(error, ValueError) else f' ({type(error).__name__})'
    return f'--model {args.model} cannot be built with these options{kind}: {reason}'


def _convert_to_qcfs(student: nn.Module, args: Namespace) -> None:
    if args.model.startswith(PREFIX):
        raise OptionError(f'--qcfs {args.qcfs}: {args.model} spikes; train the ANN with it (--model '
                          f'{args.model.removeprefix(PREFIX)}), then convert_ann makes it spike.')
    try:
        convert_to_qcfs(student, args.qcfs, args.qcfs_threshold)
    except ValueError as error:
        raise OptionError(f'--qcfs {args.qcfs}: {error}') from error


def _share_stem(student: Any) -> None:
    try:
        share_stem(student)
    except ValueError as error:
        raise OptionError(f'--share-stem: {error}') from error


def place_model(args: Namespace, model: nn.Module, frames: str = 'each') -> nn.Module:
    """Adapt a model to event frames (see `accept_frames`), --model-dtype and --channels-last."""
    if is_event_dataset(args.dataset):
        accept_frames(model, frames)
    if args.model_dtype:
        model = model.to(getattr(torch, args.model_dtype))
    return model.to(memory_format=torch.channels_last) if args.channels_last else model
