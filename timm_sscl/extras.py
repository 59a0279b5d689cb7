"""Import packages of the optional extras when they are needed."""
import importlib
from types import ModuleType

__all__ = ['import_extra']


def import_extra(module: str, missing: str) -> ModuleType:
    """Import a module of an extra.

    Args:
        module: Name of the module.
        missing: What needs the extra, and the command that installs it.

    Raises:
        ImportError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'{module.partition(".")[0]} is not installed; {missing}.') from error
