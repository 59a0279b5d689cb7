"""OptionError, its line on the terminal, and a context that names the options behind another library's error."""
import os
import sys
import traceback
from contextlib import contextmanager
from typing import Any, Iterator, Mapping, Tuple, Type

__all__ = ['OptionError', 'blame_options', 'end_with_line', 'is_given', 'option_text']


class OptionError(ValueError):
    """An option is wrong. The message says what to do."""


def option_text(name: str, value: Any) -> str:
    """Return an option as written on the command line: '--lr-noise 0.4 0.9'."""
    flag = '--' + name.replace('_', '-')
    if value is None or value is True:
        return flag
    if isinstance(value, Mapping):
        value = [f'{key}={item}' for key, item in value.items()]
    return ' '.join([flag, *map(str, value if isinstance(value, (list, tuple)) else [value])])


def is_given(value: Any) -> bool:
    """Return whether an option's value says something: not None, False or empty. Zero does."""
    return value is not None and value is not False and not (isinstance(value, (str, list, tuple, dict)) and not value)


def end_with_line(text: str, code: int) -> None:
    """Print an error as one line, with the number of a process that is not the first, and end the script."""
    rank = int(os.environ.get('RANK', 0))
    print(f'error{f" (process {rank})" if rank else ""}: {" ".join(text.split())}', file=sys.stderr, flush=True)
    sys.exit(code)


@contextmanager
def blame_options(
        options: Mapping[str, Any],
        passing: Tuple[Type[Exception], ...] = (OptionError,),
        place: bool = False,
) -> Iterator[None]:
    """Turn any error of the block into an OptionError that names the options which the block uses.

    Args:
        options: Names and values of the options. Those that are None, False or empty are left out.
        passing: Error types that already name their option and are raised unchanged.
        place: Whether to name the line that raised, for the user's own code.

    Raises:
        OptionError: The block raised.
    """
    try:
        yield
    except passing:
        raise
    except Exception as error:  # timm and torch raise AssertionError, KeyError, TypeError, ...
        given = [option_text(name, value) for name, value in options.items() if is_given(value)]
        reason = ' '.join(str(error).split())
        if isinstance(error, ImportError):
            reason += f'; install the package {error.name}' if error.name else ''
        elif not isinstance(error, (ValueError, RuntimeError)) or not reason:
            reason = f'{type(error).__name__}{f": {reason}" if reason else ""}'
        if place:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            reason += f' ({frame.filename}, line {frame.lineno})'
        raise OptionError(f'{", ".join(given)}: {reason}') from error
