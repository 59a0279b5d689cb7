"""Declare a setting once, as a dataclass field with a help text.

Keyword arguments, checkpoint entries and command line options are derived from the field.
"""
import dataclasses
import difflib
from typing import Any, Dict, Iterable, Mapping, Sequence, Type, TypeVar, cast

__all__ = ['knob', 'build', 'check_known', 'knob_help']

D = TypeVar('D')


def knob(default: Any, help: str, **field_options: Any) -> Any:
    """Declare a dataclass field with a default and a help text.

    Args:
        default: Default value.
        help: One line, shown by `train.py --help` and in error messages.
        field_options: Further arguments of dataclasses.field.
    """
    return dataclasses.field(default=default, metadata=dict(help=help), **field_options)


def knob_help(cls: type) -> Dict[str, str]:
    """Return the help text of every field of a dataclass, by name."""
    return {field.name: field.metadata.get('help', '') for field in dataclasses.fields(cls)}


def check_known(names: Iterable[str], known: Sequence[str], owner: str) -> None:
    """Raise an error for an unknown option.

    Args:
        names: Names of the given options.
        known: Names of the known options.
        owner: What the options belong to, for the message: "neuron 'plif'".

    Raises:
        ValueError: An option is unknown. The message lists the known ones.
    """
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean '{close[0]}'?" if close else ''
            raise ValueError(f"{owner} has no option '{name}'; it has {', '.join(known) or 'none'}.{hint}")


def build(cls: Type[D], options: Mapping[str, Any], owner: str) -> D:
    """Return cls(**options); raise an error that names an unknown option.

    Args:
        cls: Dataclass.
        options: Values by field name.
        owner: What the options belong to, for the message: "neuron 'plif'".

    Raises:
        ValueError: An option is unknown. The message lists the known ones.
    """
    check_known(options, [field.name for field in dataclasses.fields(cast(Any, cls))], owner)
    return cls(**options)
