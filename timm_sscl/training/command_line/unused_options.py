"""Find options of losses on the command line that no loss of the run uses."""
import argparse
import logging
from typing import Collection, Dict, Sequence

from timm_sscl.losses import loss_spec

from .loss_flags import LOSS_FLAGS

__all__ = ['check_loss_options']

_logger = logging.getLogger(__name__)

_READ_BY: Dict[str, Sequence[str]] = {
    **{name: flag.losses for name, flag in LOSS_FLAGS.items()},
    'sscl_weight': ('sscl', 'contrastive'), 'kd_weight': ('kd',),
}
_TEACHER = 'teacher', 'kd_model_name', 'teacher_checkpoint', 'teacher_pretrained', 'teacher_epochs', 'teacher_frames'


def check_loss_options(args: argparse.Namespace, given: Collection[str], losses: Dict[str, float]) -> None:
    """Warn of options that no loss uses.

    Args:
        args: The options.
        given: Names of the options on the command line.
        losses: Weights of the losses by name.
    """
    unread = [option for option, names in _READ_BY.items() if option in given and not set(names) & set(losses)]
    specs = [loss_spec(name) for name in losses]
    if not any(spec.needs_features for spec in specs):
        unread += [option for option in ('sscl_taps', 'sscl_teacher_taps') if option in given]
    if not any(spec.needs_teacher for spec in specs):
        unread += [option for option in _TEACHER if option in given]
    unread = [*map(_flag, unread), *(f'--loss-kwargs {key}' for key in args.loss_kwargs
                                     if 'loss_kwargs' in given and key.rpartition('.')[0] not in losses)]
    if unread and not args.eval_only:
        _logger.warning(f'{", ".join(unread)}: no loss of this run reads it (cross-entropy'
                        f'{"".join(f" + {name}" for name in losses)}), so it changes nothing.')


def _flag(option: str) -> str:
    return '--' + option.replace('_', '-')
