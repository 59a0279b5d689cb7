"""Create timm's optimizer and schedule from the options, with errors that name the options."""
import difflib
from argparse import Namespace
from typing import Any, List, Tuple

import torch
import torch.nn as nn
from timm.optim import create_optimizer_v2, list_optimizers, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

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
    names = 'sched', 'sched_on_updates', 'epochs', 'warmup_epochs', 'decay_epochs', 'lr_noise', 'min_lr'
    with blame_options({name: getattr(args, name) for name in names}):
        schedule, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=updates_per_epoch)
    return optimizer, schedule, epochs


def _check_optimizer_name(name: str) -> None:
    known: List[Any] = list(list_optimizers())
    plain = name.lower().split('_')[-1]  # the part after a prefix such as lookahead_
    if plain not in known and name.lower() not in known:
        close = difflib.get_close_matches(plain, known, n=3)
        raise OptionError(f'--opt {name}: timm has no such optimizer.'
                          + (f' Did you mean {", ".join(close)}?' if close else f' There are {", ".join(known)}.'))
