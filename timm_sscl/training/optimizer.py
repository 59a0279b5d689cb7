"""Create timm's optimizer and schedule from the options, with errors that name the options."""
from argparse import Namespace
from typing import Any, List, Tuple

import torch
import torch.nn as nn
from timm.optim import create_optimizer_v2, list_optimizers, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

from timm_sscl.closest import closest
from timm_sscl.neurons import SpikingNeuron

from .errors import OptionError, blame_options

__all__ = ['create_optimizer_and_schedule']


def create_optimizer_and_schedule(
        args: Namespace,
        module: nn.Module,
        updates_per_epoch: int = 1,
) -> Tuple[torch.optim.Optimizer, Any, int]:
    """Create the optimizer, its schedule (None for `--sched none`), and return them with the number of epochs of the
    schedule.

    Args:
        args: The options, with the resolved learning rate as `lr`.
        module: Module to train.
        updates_per_epoch: Optimizer steps per epoch, for `--sched-on-updates`.

    Raises:
        OptionError: timm has no such optimizer, or it does not take these options.
    """
    _check_optimizer_name(args.opt)
    names: Tuple[str, ...] = (
        'opt', 'opt_kwargs', 'opt_eps', 'opt_betas', 'lr', 'momentum', 'weight_decay', 'layer_decay')
    with blame_options({name: getattr(args, name) for name in names}):
        optimizer = create_optimizer_v2(module, **{**optimizer_kwargs(cfg=args), **args.opt_kwargs})
    _scale_rates(optimizer, module, scheduled=args.sched != 'none')
    names = 'sched', 'sched_on_updates', 'epochs', 'warmup_epochs', 'decay_epochs', 'lr_noise', 'min_lr'
    with blame_options({name: getattr(args, name) for name in names}):
        schedule, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=updates_per_epoch)
    return optimizer, schedule, epochs


def _scale_rates(optimizer: torch.optim.Optimizer, module: nn.Module, scheduled: bool) -> None:
    """Move neurons' parameters with a learning rate of their own (`SpikingNeuron.lr_scales`) into groups of their own.

    Args:
        optimizer: A new optimizer.
        module: The module that it trains.
        scheduled: Whether timm's schedule will set the rates: it multiplies them by a group's 'lr_scale'.
    """
    scales = {neuron.get_parameter(name): scale for neuron in module.modules() if isinstance(neuron, SpikingNeuron)
              for name, scale in neuron.lr_scales.items() if neuron._parameters.get(name) is not None}
    for group in list(optimizer.param_groups):
        own = [p for p in group['params'] if p in scales]
        if own:
            group['params'] = [p for p in group['params'] if p not in scales]
        for scale in dict.fromkeys(scales[p] for p in own):
            key = 'lr_scale' if scheduled else 'lr'
            optimizer.add_param_group({
                **group, key: group.get(key, 1.) * scale, 'params': [p for p in own if scales[p] == scale]})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group['params']]


def _check_optimizer_name(name: str) -> None:
    known: List[Any] = list(list_optimizers())
    plain = name.lower().split('_')[-1]  # the part after a prefix such as lookahead_
    if plain not in known and name.lower() not in known:
        close = closest(plain, known, n=3)
        raise OptionError(f'--opt {name}: timm has no such optimizer.'
                          + (f' Did you mean {", ".join(close)}?' if close else f' There are {", ".join(known)}.'))
