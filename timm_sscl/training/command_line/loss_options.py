"""Read the options of the losses, --loss-kwargs NAME.OPTION=VALUE and flags, and list them for --help."""
import argparse
import textwrap
from typing import Any, Dict, Mapping, Sequence, Tuple

from timm_sscl.losses import create_loss, list_losses, loss_spec
from timm_sscl.losses.options import REQUIRED

from ..errors import OptionError, option_text
from .loss_flags import LOSS_FLAGS, plain_text

__all__ = ['describe_losses', 'resolve_loss_options']

_BUILT_IN = frozenset(list_losses())
_Key = Tuple[str, str]  # (loss, option)
_Values = Dict[_Key, Tuple[Any, str]]  # (value, text as written)


def describe_losses() -> str:
    """Return a text with all registered losses and their options, defaults and help."""
    lines = ['losses (--loss NAME=WEIGHT,...) and their options (--loss-kwargs NAME.OPTION=VALUE ...):']
    for name in list_losses():
        lines.append(f'  {name}')
        for option in loss_spec(name).options.values():
            default = '' if option.default is REQUIRED else plain_text(option.default)
            choices = f'one of {", ".join(map(str, option.choices))}; ' if option.choices else ''
            lines.append(f'    {name}.{option.name}={default}')
            lines += textwrap.wrap(choices + option.help, 96, initial_indent=' ' * 8, subsequent_indent=' ' * 8)
    return '\n'.join(lines)


def resolve_loss_options(
        args: argparse.Namespace,
        layers: Sequence[Tuple[str, Mapping[str, Any]]],
        losses: Sequence[str],
) -> Dict[str, Dict[str, Any]]:
    """Return the options of the run's losses. The command line overrides a file, and a file the defaults.

    Sets `args.loss_kwargs` and the flags in `args` to the resulting values.

    Args:
        args: The options.
        layers: (name for messages, given options) in increasing precedence.
        losses: Names of the run's losses.

    Raises:
        OptionError: A loss or an option does not exist, a value is wrong, or one layer sets an option twice.
    """
    merged: Dict[_Key, Any] = {}
    for source, options in layers:
        by_flag, by_name = _from_flags(options), _from_kwargs(options.get('loss_kwargs') or {}, source)
        for key in by_flag.keys() & by_name.keys():
            (one, flag), (other, text) = by_flag[key], by_name[key]
            if _comparable(one) != _comparable(other):
                raise OptionError(f'{source}{flag} and --loss-kwargs {text} say different things; give one of them.')
        merged.update({key: value for key, (value, _) in {**by_name, **by_flag}.items()})
    _set_what_holds(args, merged)
    options = {name: _defaults(name) for name in losses}
    if 'tet' in options:
        options['tet']['smoothing'] = args.smoothing
    for (loss, option), value in merged.items():
        if loss in options:
            options[loss][option] = value
    for name in _BUILT_IN & options.keys():
        _check_built(name, options[name])
    return options


def _from_flags(options: Mapping[str, Any]) -> _Values:
    """Return the loss options that flags set."""
    return {key: (options[name], option_text(name, options[name]))
            for name, flag in LOSS_FLAGS.items() if options.get(name) is not None for key in flag.keys}


def _from_kwargs(texts: Any, source: str) -> _Values:
    """Parse --loss-kwargs, or `loss_kwargs` of a file, by the types of the losses' options."""
    if not isinstance(texts, Mapping):
        raise OptionError(f"{source}option 'loss_kwargs' is {texts!r}, expected NAME.OPTION: VALUE pairs.")
    values: _Values = {}
    for key, text in texts.items():
        name, _, option = str(key).rpartition('.')
        written = f'{key}={plain_text(text)}'
        try:
            values[name, option] = loss_spec(name).option(option, f"loss '{name}'").parse(text, name), written
        except ValueError as error:
            raise OptionError(f'{source}--loss-kwargs {written}: {error}') from error
    return values


def _set_what_holds(args: argparse.Namespace, merged: Mapping[_Key, Any]) -> None:
    """Set flags that another layer overrides to None, and loss_kwargs to all options that no flag sets."""
    said = set()
    for name, flag in LOSS_FLAGS.items():
        value = getattr(args, name)
        if value is not None and all(_comparable(merged[key]) == _comparable(value) for key in flag.keys):
            said.update(flag.keys)
        else:
            setattr(args, name, None)
    args.loss_kwargs = {f'{loss}.{option}': value for (loss, option), value in merged.items()
                        if (loss, option) not in said}


def _defaults(name: str) -> Dict[str, Any]:
    """Return the defaults of a loss's options, as far as a checkpoint can hold them."""
    return {option.name: option.default for option in loss_spec(name).options.values()
            if isinstance(option.default, (bool, int, float, str, tuple))}


def _check_built(name: str, options: Mapping[str, Any]) -> None:
    """Build a loss on taps of one channel, so that a wrong option is found before a teacher is trained."""
    spec = loss_spec(name)
    taps: Dict[str, Any] = {}
    num = len(options.get('layer_weights', 'ab'))
    if spec.needs_index:
        taps.update(num_samples=1)
    if spec.needs_features:
        taps.update(names=['tap'] * num, student_channels=[1] * num, teacher_channels=[1] * num)
    if spec.needs_shapes:
        taps.update(student_shapes=[(1, 1)] * num, teacher_shapes=[(1, 1)] * num)
    try:
        create_loss(name, **taps, **options)
    except ValueError as error:
        raise OptionError(f"loss '{name}': {error}") from error


def _comparable(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value
