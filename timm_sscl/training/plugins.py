"""A user's own Python file or module, imported so that what it registers is there."""
import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

__all__ = ['import_plugin']


def import_plugin(source: str) -> ModuleType:
    """Import a Python file by its path, or a module by its name.

    A file's folder joins sys.path, so that the file may import its neighbours, as a script may. A file is run once.

    Args:
        source: Path of a file, or dotted name of a module.

    Returns:
        The module.

    Raises:
        FileNotFoundError: There is no such file and no such module.
    """
    path = Path(source)
    if path.is_file():
        return _import_file(path.resolve())
    if path.suffix == '.py' or path.name != source:
        raise FileNotFoundError(f"'{source}' does not exist.")
    try:
        return importlib.import_module(source)
    except ModuleNotFoundError as error:
        if error.name is None or not f'{source}.'.startswith(f'{error.name}.'):
            raise  # of what the module imports
        raise FileNotFoundError(f"'{source}' is no file, and no module of that name is found.") from error


def _import_file(path: Path) -> ModuleType:
    name = path.stem
    if getattr(sys.modules.get(name), '__file__', None) == str(path):
        return sys.modules[name]
    if name in sys.modules or importlib.util.find_spec(name) is not None:  # another module has the name
        name = f'{name}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}'
        if name in sys.modules:
            return sys.modules[name]
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # timm's register_model looks it up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
