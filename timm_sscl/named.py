"""Registries: tables that the register_* decorators fill and the list_* functions read."""
import logging
from typing import Any, Dict, Generic, Iterator, List, TypeVar

from timm_sscl.closest import closest

__all__ = ['Registry']

_logger = logging.getLogger(__name__)

T = TypeVar('T')


def _qualified_name(value: Any) -> str:
    return f'{getattr(value, "__module__", "?")}.{getattr(value, "__qualname__", repr(value))}'


class Registry(Generic[T]):
    """Map names to classes or functions.

    Args:
        kind: What the registry holds, in the singular, for messages: 'neuron', 'loss'.
        separators: Characters that a name must not contain, since the command line uses them between names.
    """

    def __init__(self, kind: str, separators: str = '=,'):
        self.kind = kind
        self.separators = separators
        self._entries: Dict[str, T] = {}

    def register(self, name: str, value: T) -> T:
        """Add an entry and return it.

        A class or function with the same qualified name (a notebook cell run twice) replaces the old one with a
        warning.

        Raises:
            ValueError: Another class or function has this name, or the command line cannot express the name.
        """
        self._check_name(name)
        known = self._entries.get(name)
        if known is not None and known is not value:
            if _qualified_name(known) != _qualified_name(value):
                raise ValueError(f"a {self.kind} named '{name}' is registered already ({_qualified_name(known)}); "
                                 f'choose another name.')
            _logger.warning(f"The {self.kind} '{name}' was defined again; the new definition replaces the old one.")
        self._entries[name] = value
        return value

    def _check_name(self, name: Any) -> None:
        """Raise ValueError if the command line cannot express a name."""
        if not isinstance(name, str) or not name or name != name.strip():
            raise ValueError(f'{name!r} as the name of a {self.kind}: must be a text without spaces at its ends.')
        wrong = [repr(character) for character in self.separators if character in name]
        if wrong or name.startswith('-'):
            what = f'contains {" and ".join(wrong)}' if wrong else "begins with '-'"
            raise ValueError(f'{name!r} as the name of a {self.kind}: {what}, so that the command line cannot express '
                             f'it; letters, digits, _ and - inside are safe.')

    def unregister(self, name: str) -> T:
        """Remove an entry and return it.

        Raises:
            ValueError: There is no such entry.
        """
        self.get(name)
        return self._entries.pop(name)

    def get(self, name: str) -> T:
        """Return the entry of this name.

        Raises:
            ValueError: There is none. The message lists the registered names.
        """
        if name not in self._entries:
            close = closest(name, self._entries)
            hint = f" Did you mean '{close[0]}'?" if close else ''
            raise ValueError(f"unknown {self.kind} '{name}'; registered are {', '.join(self.names())}.{hint}")
        return self._entries[name]

    def name_of(self, value: T) -> str:
        """Return the name of an entry.

        Raises:
            ValueError: The value is not registered.
        """
        for name, known in self._entries.items():
            if known is value:
                return name
        raise ValueError(f'{_qualified_name(value)} is no registered {self.kind}; register it under a name.')

    def names(self) -> List[str]:
        """Return all names, sorted."""
        return sorted(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())
