"""Options of a loss: the keyword arguments of its signature, with help texts from its docstring.

A loss is a class that users also build directly, so it has a signature anyway. Name, type and default come from the
signature and the help from the docstring's Args, so that an option is declared once. A dataclass would repeat it.
"""
import inspect
import re
from dataclasses import dataclass
from functools import partial
from typing import Any, Callable, Collection, Dict, Iterator, Literal, Mapping, Tuple, get_args, get_origin

from timm_sscl.closest import closest
from timm_sscl.knobs import declared_type, literal, read_value, type_hints

__all__ = ['REQUIRED', 'INDEX_ARGUMENTS', 'TAP_ARGUMENTS', 'LossOption', 'read_options', 'check_option',
           'takes_any_option', 'underlying']

TAP_ARGUMENTS = ('names', 'student_channels', 'teacher_channels', 'student_shapes', 'teacher_shapes')
INDEX_ARGUMENTS = ('num_samples',)
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
        return self.read(literal(value) if self.type is Any else value, owner)

    def read(self, value: Any, owner: str) -> Any:
        """Return a value as the option's type; see `parse`. A text for an option of any type stays a text."""
        return read_value(self.type, value, f'{owner}.{self.name}', self.default)


def underlying(loss: Callable) -> Callable:
    """Return the class or function of a partial."""
    return underlying(loss.func) if isinstance(loss, partial) else loss


def read_options(loss: Callable, passed: Collection[str] = ()) -> Dict[str, LossOption]:
    """Return the options of a loss: a class's keyword arguments, or a function's arguments after the TrainStep.

    `**kwargs` of a constructor stands for the options of the base class. Arguments bound by a partial are not options.

    Args:
        loss: Class, function or partial of one.
        passed: Arguments that the task passes, such as the channels of the taps. They are not options.
    """
    target = underlying(loss)
    hidden = {*passed, *(loss.keywords if isinstance(loss, partial) else ())}
    options: Dict[str, LossOption] = {}
    for function, owner in _signatures(target):
        hints, texts = type_hints(function), _argument_texts(owner)
        # the first is self or the TrainStep
        for parameter in list(inspect.signature(function).parameters.values())[1:]:
            if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY):
                continue
            name, default = parameter.name, parameter.default
            if name not in hidden and name not in options:
                kind = declared_type(hints.get(name), default)
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
        close = closest(name, known)
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
