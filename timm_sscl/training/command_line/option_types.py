"""Types of options, and a parser that raises instead of ending the process."""
import argparse
import os
import re
from typing import Iterable, Optional

from timm_sscl.closest import closest
from timm_sscl.knobs import RESETS, literal, read_value

from ..errors import OptionError, option_text

__all__ = ['HelpFormatter', 'OptionParser', 'not_registered', 'suggest_option', 'home_path', 'KeyValues',
           'reset_potential']


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Show the default of every option, and keep the line breaks of a text that has any.

    A help text contains the default itself if it depends on other options.
    """

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ''
        if '(default: ' in text or not action.option_strings or action.dest == 'help':
            return text
        return f'{text} (default: none)' if action.default in (None, {}, '') else f'{text} (default: %(default)s)'

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if '\n' in text else super()._fill_text(text, width, indent)


# names that other scripts use -> ours
_ALIASES = dict(
    learning_rate='lr', num_workers='workers', optimizer='opt', scheduler='sched', label_smoothing='smoothing',
    num_epochs='epochs', dropout='drop', time_steps='timesteps', threshold='v_threshold', wd='weight_decay')


def suggest_option(name: str, known: Iterable[str]) -> str:
    """Return the known name of an option that is closest to a misspelt one, as in 'weight_decay'; '' if none is near.

    Args:
        name: Name without leading dashes.
        known: Names of the options.
    """
    name, names = name.replace('-', '_').lower(), list(known)
    if _ALIASES.get(name) in names:
        return _ALIASES[name]
    return next(iter(closest(name, names)), '')


def not_registered(option: str, value: str, known: Iterable[str], show: bool = True, prefix: str = '') -> OptionError:
    """Return the error for a name that is not registered, with the closest known one.

    Args:
        option: Name of the option.
        value: The unknown name.
        known: Registered names.
        show: Whether to list them.
        prefix: Beginning of the name that all known ones may have. It makes no two names similar.
    """
    names = sorted(set(known))
    close = [prefix + match for match in closest(value.removeprefix(prefix), names)]
    listed = f'; there are {", ".join(names) or "none"}' if show else ''
    return OptionError(f'{option_text(option, value)}: is not registered{listed}. A plug-in that registers it is '
                       f'imported by --plugin FILE|MODULE.' + (f" Did you mean '{close[0]}'?" if close else ''))


class OptionParser(argparse.ArgumentParser):
    """ArgumentParser that raises OptionError instead of ending the process, and suggests what a misspelt option meant.
    """

    def error(self, message: str):
        known = {option.lstrip('-').replace('-', '_'): option for action in self._actions
                 for option in action.option_strings if action.help != argparse.SUPPRESS}
        unknown = re.findall(r'(?<!\S)--?([a-zA-Z][\w-]*)', message) if message.startswith('unrecognized') else []
        meant = {name: suggest_option(name, known) for name in unknown}
        hints = [f' Did you mean {known[right]} for {name}?' if len(unknown) > 1 else f' Did you mean {known[right]}?'
                 for name, right in meant.items() if right]
        raise OptionError(message + ('.' + ''.join(hints) if hints else ''))


def home_path(text: str) -> str:
    """Type of options that name a file or folder: expand ~ to the home folder. $VAR is not expanded."""
    scheme, colon, path = text.partition(':')
    if colon and scheme == 'local-dir':  # prefix of timm's model names
        return scheme + colon + os.path.expanduser(path)
    return os.path.expanduser(text)


class KeyValues(argparse.Action):
    """Parse KEY=VALUE pairs as timm does, with an error for anything else and for a key that has two values.

    A value is a Python literal if it is one, else a text. An option that stands twice on the command line adds its
    pairs.
    """

    def __call__(self, parser, namespace, values, option_string=None):
        before = getattr(namespace, self.dest)
        pairs = dict(before) if isinstance(before, dict) and before is not self.default else {}
        for value in values:
            key, equals, text = value.partition('=')
            if not equals:
                parser.error(f'{option_string} {" ".join(values)}: takes KEY=VALUE pairs.')
            read = literal(text)
            if key in pairs and pairs[key] != read:
                parser.error(f"{option_string}: '{key}' stands there twice, with {pairs[key]} and {text}.")
            pairs[key] = read
        setattr(namespace, self.dest, pairs)


def reset_potential(text: str):
    """Type of --v-reset: a number, or 'soft', for which 'none' is another word."""
    try:
        value = read_value(Optional[float], text, 'v_reset', words=RESETS)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor 'soft', the soft reset") from None
    return 'soft' if value is None else value
