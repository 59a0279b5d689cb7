"""Flags for some options of the losses, as in version 0.1.0, and --loss-kwargs. This does not import torch."""
import argparse
from dataclasses import dataclass
from typing import Any, Dict, List, Tuple

from .declared import Declared, loss_arguments

__all__ = ['LOSS_FLAGS', 'LossFlag', 'LossTexts', 'add_loss_flags', 'plain_text']


@dataclass(frozen=True)
class LossFlag:
    """A flag of version 0.1.0, which sets one option of one or several losses."""
    losses: Tuple[str, ...]
    option: str

    @property
    def declared(self) -> Declared:
        """Declaration of the option."""
        return loss_arguments(self.losses[0])[self.option]

    @property
    def keys(self) -> List[Tuple[str, str]]:
        """(loss, option) pairs that the flag sets."""
        return [(loss, self.option) for loss in self.losses]


_CONTRASTIVE = 'sscl', 'contrastive'
LOSS_FLAGS: Dict[str, LossFlag] = {
    'sscl_temperature': LossFlag(_CONTRASTIVE, 'temperature'),
    'sscl_dim': LossFlag(_CONTRASTIVE, 'dim'),
    'sscl_critic': LossFlag(_CONTRASTIVE, 'critic'),
    'sscl_weighting': LossFlag(('sscl',), 'weighting'),
    'sscl_projection': LossFlag(_CONTRASTIVE, 'projection'),
    'sscl_queue': LossFlag(_CONTRASTIVE, 'queue_size'),
    'sscl_cka_floor': LossFlag(('sscl',), 'cka_floor'),
    'sscl_cka_momentum': LossFlag(_CONTRASTIVE, 'cka_momentum'),
    'sscl_cka_scope': LossFlag(_CONTRASTIVE, 'cka_scope'),
    'kd_temperature': LossFlag(('kd',), 'temperature'),
    'kd_step_temperature': LossFlag(('kd_step',), 'temperature'),
    'tet_lambda': LossFlag(('tet',), 'mse_share'),
    'firing_rate_target': LossFlag(('firing_rate',), 'target'),
}


class LossTexts(argparse.Action):
    """Parse NAME.OPTION=VALUE pairs to texts. The option's type is known only after plug-ins are imported."""

    def __call__(self, parser, namespace, values, option_string=None):
        known = getattr(namespace, self.dest)
        texts = dict(known) if isinstance(known, dict) else {}
        for pair in values:
            key, equals, text = pair.partition('=')
            if not equals or not all(key.rpartition('.')[::2]):
                parser.error(f'{option_string} {pair}: takes NAME.OPTION=VALUE, for example kd.temperature=2.')
            if key in texts:
                parser.error(f"{option_string}: '{key}' stands there twice, with {texts[key]} and {text}.")
            texts[key] = text
        setattr(namespace, self.dest, texts)


def add_loss_flags(group: argparse._ArgumentGroup) -> None:
    """Add --loss-kwargs and the flags. Type, default and help of a flag come from the loss's option."""
    group.add_argument('--loss-kwargs', nargs='+', default={}, action=LossTexts, metavar='NAME.OPTION=VALUE',
                       help='options of the losses; they are listed at the end of this help')
    for name, flag in LOSS_FLAGS.items():
        option = flag.declared
        several = isinstance(option.default, tuple)
        kind = type(option.default[0] if several else option.default)
        group.add_argument(
            f'--{name.replace("_", "-")}', default=None, type=kind, nargs='+' if several else None,
            choices=option.choices or None, metavar=None if option.choices else 'VALUE',
            help=f'same as --loss-kwargs {flag.losses[0]}.{flag.option} (default: {plain_text(option.default)})')


def plain_text(value: Any) -> str:
    """Return a value as written on the command line, a sequence with commas."""
    return ','.join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
