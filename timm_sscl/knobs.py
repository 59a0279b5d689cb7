"""Declare a setting once, as a dataclass field with a help text, and read values by the types that are declared.

Keyword arguments, checkpoint entries and command line options are derived from the field. Functions and classes that
are registered declare their options by their signature. The same reading of values serves both.
"""
import ast
import dataclasses
import inspect
import math
import numbers
import os
import types
from collections.abc import Callable as AbstractCallable, Mapping as AbstractMapping, Sequence as AbstractSequence
from typing import (
    Any, Dict, Iterable, Literal, Mapping, Sequence, Tuple, Type, TypeVar, Union, cast, get_args, get_origin,
    get_type_hints)
from timm_sscl.closest import closest

__all__ = [
    'RESETS', 'build', 'check_known', 'declared_type', 'knob', 'knob_help', 'literal', 'read_value', 'type_hints']

D = TypeVar('D')

_UNIONS = Union, getattr(types, 'UnionType', Union)
_WORDS: Dict[type, Dict[str, Any]] = {
    bool: {'true': True, 'yes': True, 'on': True, '1': True, 'false': False, 'no': False, 'off': False, '0': False},
    type(None): {'none': None, 'null': None, '': None},
}
_NAMES = {int: 'a whole number', float: 'a number', bool: 'true or false', str: 'a word', type(None): 'none'}
_PLAIN = bool, int, float, str
RESETS: Mapping[str, Any] = types.MappingProxyType({'soft': None})  # words for a reset potential


def knob(default: Any, help: str, words: Mapping[str, Any] = types.MappingProxyType({}), **field_options: Any) -> Any:
    """Declare a dataclass field with a default and a help text.

    Args:
        default: Default value.
        help: One line, shown by `train.py --help` and in error messages.
        words: Words that stand for a value, such as 'soft' for None.
        field_options: Further arguments of dataclasses.field.
    """
    return dataclasses.field(default=default, metadata=dict(help=help, words=words), **field_options)


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
            close = closest(name, known)
            hint = f" Did you mean '{close[0]}'?" if close else ''
            raise ValueError(f"{owner} has no option '{name}'; it has {', '.join(known) or 'none'}.{hint}")


def build(cls: Type[D], options: Mapping[str, Any], owner: str) -> D:
    """Return cls(**options), with every value read by the type of its field.

    Args:
        cls: Dataclass.
        options: Values by field name.
        owner: What the options belong to, for the message: "neuron 'plif'".

    Raises:
        ValueError: An option is unknown, or a value does not have its type. The message names the option, the value and
            what would be right.
    """
    fields = {field.name: field for field in dataclasses.fields(cast(Any, cls))}
    check_known(options, list(fields), owner)
    hints = type_hints(cls)
    return cls(**{
        name: read_value(declared_type(hints.get(name), fields[name].default), value, name, fields[name].default,
                         owner, fields[name].metadata.get('words', {})) for name, value in options.items()})


def type_hints(declared: Any) -> Dict[str, Any]:
    """Return the type hints of a class or function; empty if an annotation cannot be evaluated."""
    try:
        return get_type_hints(declared)
    except (NameError, TypeError, AttributeError):  # an annotation as text with a name that is not defined here
        return {}


def declared_type(annotation: Any, default: Any) -> Any:
    """Return the type of an option: its annotation (None if there is none), else that of a plain default, else Any."""
    if annotation is not None:
        return annotation
    if type(default) is int:
        return Union[int, float]
    return type(default) if type(default) in _PLAIN else Any


def read_value(
        kind: Any,
        value: Any,
        name: str,
        default: Any = inspect.Parameter.empty,
        owner: str = '',
        words: Mapping[str, Any] = types.MappingProxyType({}),
) -> Any:
    """Return a value as its declared type. The default is accepted as it is.

    Args:
        kind: Type: bool, int, float, str, None, Literal, Optional, Union, a sequence of one of these, or Any. A value
            of another type is only asked whether it is an instance of it.
        value: Value, or a text of the command line. Items of a sequence are separated by commas: '0.05,0.25'.
        name: Name of the option, for the message.
        default: Default of the option.
        owner: What the option belongs to, for the message: "neuron 'plif'".
        words: Words that stand for a value. The message names them in place of none.

    Raises:
        ValueError: The value does not have the type, or is a number that is not finite.
    """
    if isinstance(value, str) and value in words:
        return words[value]
    if value is default or (type(value) is type(default) and value == default):
        return value
    try:
        return _read(kind, value)
    except (ValueError, OverflowError):
        described = _described(kind)
        if words:
            described = f"{described.removesuffix(' or none')} or {' or '.join(map(repr, words))}"
        if _is_not_finite(value):
            described = described.replace('a number', 'a finite number')
        of = f' (an option of {owner})' if owner else ''
        raise ValueError(f'{name}={_text(value)}: must be {described}{of}.') from None


def _read(kind: Any, value: Any) -> Any:
    """Convert a value to a type, or raise ValueError."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin is Literal:
        for choice in arguments:
            if value == choice or str(value) == str(choice):
                return choice
        raise ValueError
    if origin in _UNIONS:
        return _read_union(arguments, value)
    if _is_sequence(kind):
        return value if isinstance(value, AbstractMapping) else _read_sequence(arguments, value)
    return _read_plain(origin or kind, value)


def literal(value: Any) -> Any:
    """Return a text as a Python literal if it is one, else the text."""
    try:
        return ast.literal_eval(value) if isinstance(value, str) else value
    except (ValueError, SyntaxError):
        return value


def _read_union(kinds: Sequence[Any], value: Any) -> Any:
    """Convert a value to the first type that fits, text last."""
    several = isinstance(value, (list, tuple)) or (isinstance(value, str) and ',' in value)
    for kind in sorted(kinds, key=lambda kind: (kind is str, _is_sequence(kind) != several, kind is float)):
        try:
            return _read(kind, value)
        except ValueError:
            continue
    raise ValueError


def _is_sequence(kind: Any) -> bool:
    origin = get_origin(kind) or kind
    return isinstance(origin, type) and issubclass(origin, AbstractSequence) and not issubclass(origin, (str, bytes))


def _read_sequence(kinds: Sequence[Any], value: Any) -> Tuple[Any, ...]:
    """Convert to a tuple: of any length for the items' types (A,) and (A, ...), else of one item per type."""
    if isinstance(value, str):
        parts = [part.strip() for part in value.strip('()[] ').split(',') if part.strip()]
        value = parts if kinds and kinds[0] is not Any else [literal(part) for part in parts]
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    if len(kinds) > 1 and kinds[1] is not Ellipsis:
        if len(items) != len(kinds):
            raise ValueError
        return tuple(_read(kind, item) for kind, item in zip(kinds, items))
    return tuple(_read(kinds[0], item) if kinds else item for item in items)


def _read_plain(kind: Any, value: Any) -> Any:
    if kind in _WORDS:
        words = _WORDS[kind]
        if isinstance(value, kind):
            return value
        word = str(value).strip().lower()
        if word not in words:
            raise ValueError
        return words[word]
    if kind in (int, float):
        return _read_number(kind, value)
    if kind is str:
        if isinstance(value, (*_PLAIN, os.PathLike)):
            return value if isinstance(value, os.PathLike) else str(value)
        raise ValueError
    if kind is AbstractCallable:
        return _if(callable(value), value)
    if isinstance(kind, type) and isinstance(value, (*_PLAIN, type(None))):  # others are the user's own business
        if issubclass(kind, os.PathLike) and isinstance(value, str):
            return cast(Any, kind)(value)
        return _if(isinstance(value, kind), value)
    return value


def _read_number(kind: type, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, str)):
        raise ValueError
    if kind is int and isinstance(value, (int, str)):
        try:
            return int(value)
        except ValueError:
            pass  # '1e3'
    number = float(value)
    if not math.isfinite(number) or (kind is int and not number.is_integer()):
        raise ValueError
    return kind(number)


def _if(fits: bool, value: Any) -> Any:
    if not fits:
        raise ValueError
    return value


def _is_not_finite(value: Any) -> bool:
    try:
        return not math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False


def _described(kind: Any) -> str:
    """Describe a type in words: 'a number', 'one of a, b'."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return f'one of {", ".join(map(str, arguments))}'
    if origin in _UNIONS:
        kinds = [argument for argument in arguments if not (argument is int and float in arguments)]
        return ' or '.join(_described(argument) for argument in kinds)
    if _is_sequence(kind):
        items = _described(arguments[0]) if arguments else 'a value'
        if len(arguments) > 1 and arguments[1] is not Ellipsis:
            return f'{len(arguments)} values, with commas: {", ".join(map(_described, arguments))}'
        return f'{items}, or several with commas'
    if origin is AbstractCallable:
        return 'a function'
    return _NAMES.get(kind, getattr(kind, '__name__', str(kind)))


def _text(value: Any) -> str:
    return ','.join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
