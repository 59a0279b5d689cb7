"""Import what ONNX and NIR need when one is asked for: the packages of the extra `export`."""
from types import ModuleType

from timm_sscl.extras import import_extra

__all__ = ['from_extra']

_MISSING = "ONNX and NIR need the extra `export`: pip install 'timm_sscl[export]'"


def from_extra(module: str) -> ModuleType:
    """Import a module of the extra `export`.

    Raises:
        ImportError: It is not installed. The message names the extra.
    """
    return import_extra(module, _MISSING)
