"""Compute the learning rate from the options as timm does."""
from argparse import Namespace

__all__ = ['resolve_lr']


def resolve_lr(args: Namespace, num_processes: int) -> float:
    """Return --lr, or --lr-base scaled by the global batch size as in timm."""
    if args.lr is not None:
        return args.lr
    ratio = args.batch_size * num_processes * args.grad_accum_steps / args.lr_base_size
    scale = args.lr_base_scale or ('sqrt' if any(o in args.opt.lower() for o in ('ada', 'lamb')) else 'linear')
    return args.lr_base * (ratio ** 0.5 if scale == 'sqrt' else ratio)
