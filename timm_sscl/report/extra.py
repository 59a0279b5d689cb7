"""Import what pictures and reports need when one is asked for: the packages of the extra `report`."""
import importlib.util
from types import ModuleType

from timm_sscl.extras import import_extra

__all__ = ['can_report', 'from_extra', 'MISSING']

_PACKAGES = 'matplotlib', 'jinja2'
MISSING = "pictures and reports need the extra `report`: pip install 'timm_sscl[report]'"


def can_report() -> bool:
    """Return whether the packages of the extra `report` are installed."""
    return all(importlib.util.find_spec(name) is not None for name in _PACKAGES)


def from_extra(module: str) -> ModuleType:
    """Import a module of the extra `report`.

    Raises:
        ImportError: It is not installed. The message names the extra.
    """
    return import_extra(module, MISSING)
