"""Types of options, and a parser that raises instead of ending the process."""
import argparse
import os

from timm.utils import ParseKwargs

from .errors import OptionError

__all__ = ['HelpFormatter', 'OptionParser', 'home_path', 'KeyValues', 'reset_potential']


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that there are, and leaves a text that has lines as it is."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return (action.help or '') if action.default in (None, {}, '') else super()._get_help_string(action)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if '\n' in text else super()._fill_text(text, width, indent)


class OptionParser(argparse.ArgumentParser):
    def error(self, message: str):
        raise OptionError(message)


def home_path(text: str) -> str:
    """Type of options that name a file or folder: ~ is the home folder, as in a shell; $VAR is left alone."""
    scheme, colon, path = text.partition(':')
    if colon and scheme == 'local-dir':  # timm's model names
        return scheme + colon + os.path.expanduser(path)
    return os.path.expanduser(text)


class KeyValues(ParseKwargs):
    def __call__(self, parser, namespace, values, option_string=None):
        if not all('=' in value for value in values):
            parser.error(f'{option_string} {" ".join(values)}: takes KEY=VALUE pairs.')
        super().__call__(parser, namespace, values, option_string)


def reset_potential(text: str):
    return text if text == 'soft' else float(text)
