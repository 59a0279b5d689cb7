"""Options of a loss: the keyword arguments of its signature, with help texts from its docstring.

A loss is a class that users also build directly, so it has a signature anyway. Name, type and default come from the
signature and the help from the docstring's Args, so that an option is declared once. A dataclass would repeat it.
"""
import ast
import difflib
import inspect
import re
import types
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass
from functools import partial
from typing import (
    Any, Callable, Dict, Iterator, Literal, Mapping, Tuple, Union, get_args, get_origin, get_type_hints)

__all__ = ['REQUIRED', 'TAP_ARGUMENTS', 'LossOption', 'read_options', 'check_option', 'takes_any_option', 'underlying']

TAP_ARGUMENTS = ('names', 'student_channels', 'teacher_channels', 'student_shapes', 'teacher_shapes')
_UNIONS = Union, types.UnionType
_WORDS: Dict[Any, Dict[str, Any]] = {
    bool: {'true': True, 'yes': True, 'on': True, '1': True, 'false': False, 'no': False, 'off': False, '0': False},
    type(None): {'none': None, 'null': None, '': None},
}
_NAMES = {int: 'a whole number', float: 'a number', bool: 'true or false', str: 'a word', type(None): 'none'}


REQUIRED = inspect.Parameter.empty


@dataclass(frozen=True)
class LossOption:
    """An option of a loss, as declared in its signature.

    Attributes:
        name: Keyword.
        default: Default value; REQUIRED if there is none.
        type: Type annotation; the default's type if there is none.
        help: Text from the docstring's Args.
    """
    name: str
    default: Any
    type: Any
    help: str = ''

    @property
    def choices(self) -> Tuple[Any, ...]:
        """Values that a Literal type allows; empty for other types."""
        return get_args(self.type) if get_origin(self.type) is Literal else ()

    def parse(self, value: Any, owner: str) -> Any:
        """Convert a value from the command line or a YAML file to the option's type.

        Args:
            value: Text, or a YAML value. Items of a sequence are separated by commas: '0.05,0.25'.
            owner: Name of the loss, for the message.

        Raises:
            ValueError: The value does not have the type.
        """
        try:
            return _parse(self.type, value)
        except ValueError:
            raise ValueError(f"{owner}.{self.name}={_text(value)}: must be {_described(self.type)}.") from None


def underlying(loss: Callable) -> Callable:
    """Return the class or function of a partial."""
    return underlying(loss.func) if isinstance(loss, partial) else loss


def read_options(loss: Callable, taps: bool) -> Dict[str, LossOption]:
    """Return the options of a loss: a class's keyword arguments, or a function's arguments after the TrainStep.

    `**kwargs` of a constructor stands for the options of the base class. Arguments bound by a partial are not options.

    Args:
        loss: Class, function or partial of one.
        taps: Whether the loss receives the names and channels of the taps, which are then not options.
    """
    target = underlying(loss)
    hidden = {*loss.keywords} if isinstance(loss, partial) else set()
    hidden |= {*TAP_ARGUMENTS} if taps else set()
    options: Dict[str, LossOption] = {}
    for function, owner in _signatures(target):
        hints, texts = _hints(function), _argument_texts(owner)
        # the first is self or the TrainStep
        for parameter in list(inspect.signature(function).parameters.values())[1:]:
            if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY):
                continue
            name, default = parameter.name, parameter.default
            if name not in hidden and name not in options:
                kind = hints.get(name, Any if default in (None, REQUIRED) else type(default))
                options[name] = LossOption(name, default, kind, texts.get(name, ''))
    return options


def takes_any_option(loss: Callable) -> bool:
    """Return whether a loss accepts keyword arguments that no signature names."""
    return all(any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())
               for function, _ in _signatures(underlying(loss)))


def check_option(owner: str, known: Mapping[str, LossOption], name: str) -> None:
    """Raise an error if an option does not exist.

    Raises:
        ValueError: It does not. The message lists the options.
    """
    if not known:
        raise ValueError(f"{owner} takes no options, got '{name}'.")
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ''
        raise ValueError(f"{owner} has no option '{name}'; it has {', '.join(known)}.{hint}")


def _signatures(target: Callable) -> Iterator[Tuple[Callable, Any]]:
    """Yield (function that declares options, object whose docstring documents them), the most specific first."""
    if not isinstance(target, type):
        yield target, target
        return
    for cls in target.__mro__:
        if '__init__' in vars(cls) and cls.__module__ != 'torch.nn.modules.module' and cls is not object:
            declares = vars(cls)['__init__']
            yield declares, cls
            if not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(declares).parameters.values()):
                return


def _hints(function: Callable) -> Dict[str, Any]:
    """Return the type hints of a function; empty if an annotation cannot be evaluated."""
    try:
        return get_type_hints(function)
    except (NameError, TypeError, AttributeError):  # an annotation as text with a name that is not defined here
        return {}


def _argument_texts(documented: Any) -> Dict[str, str]:
    """Return {argument: text} of the Args section of a Google docstring."""
    texts: Dict[str, str] = {}
    inside, name = False, ''
    for line in (inspect.getdoc(documented) or '').splitlines():
        if line.strip() == 'Args:':
            inside = True
            continue
        if inside and line.strip() and not line.startswith(' '):
            break
        found = re.match(r' {4}(\w+): (.*)', line) if inside else None
        if found:
            name = found[1]
            texts[name] = found[2].strip()
        elif inside and name and line.strip():
            texts[name] += ' ' + line.strip()
    return texts


def _parse(kind: Any, value: Any) -> Any:
    """Convert a value to a type, or raise ValueError."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return _literal(value)
    if origin is Literal:
        for choice in arguments:
            if value == choice or str(value) == str(choice):
                return choice
        raise ValueError
    if origin in _UNIONS:
        return _parse_union(arguments, value)
    if isinstance(origin, type) and issubclass(origin, AbstractSequence):
        return _parse_sequence(arguments[0] if arguments else Any, value)
    return _parse_plain(kind, value)


def _literal(value: Any) -> Any:
    """Return a text as a Python literal if it is one, else the text."""
    try:
        return ast.literal_eval(value) if isinstance(value, str) else value
    except (ValueError, SyntaxError):
        return value


def _parse_union(kinds: AbstractSequence, value: Any) -> Any:
    """Convert a value to the first type that fits, text last."""
    several = isinstance(value, (list, tuple)) or (isinstance(value, str) and ',' in value)
    for kind in sorted(kinds, key=lambda kind: (kind is str, _is_sequence(kind) != several, kind is float)):
        try:
            return _parse(kind, value)
        except ValueError:
            continue
    raise ValueError


def _is_sequence(kind: Any) -> bool:
    origin = get_origin(kind)
    return isinstance(origin, type) and issubclass(origin, AbstractSequence)


def _parse_sequence(kind: Any, value: Any) -> Tuple[Any, ...]:
    if isinstance(value, str):
        value = [part.strip() for part in value.strip('()[] ').split(',') if part.strip()]
    return tuple(_parse(kind, item) for item in (value if isinstance(value, (list, tuple)) else [value]))


def _parse_plain(kind: Any, value: Any) -> Any:
    if kind in _WORDS:
        if isinstance(value, kind):
            return value
        return _WORDS[kind][_known(str(value).strip().lower(), _WORDS[kind])]
    if kind in (int, float):
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError
        number = float(value)
        if kind is int and not number.is_integer():
            raise ValueError
        return kind(number)
    if kind is str and not isinstance(value, str):
        return str(value)
    return value


def _known(word: str, words: Mapping[str, Any]) -> str:
    if word not in words:
        raise ValueError
    return word


def _described(kind: Any) -> str:
    """Describe a type in words: 'a number', 'one of a, b'."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return f'one of {", ".join(map(str, arguments))}'
    if origin in _UNIONS:
        return ' or '.join(_described(argument) for argument in arguments)
    if _is_sequence(kind):
        return f'{_described(arguments[0]) if arguments else "a value"}, or several with commas'
    return _NAMES.get(kind, getattr(kind, '__name__', str(kind)))


def _text(value: Any) -> str:
    return ','.join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
