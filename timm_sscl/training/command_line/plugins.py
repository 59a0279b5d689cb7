"""Import a user's Python file or module, which registers neurons, losses, data sets and so on."""
import hashlib
import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any, Dict, Iterable

__all__ = ['describe_failure', 'import_plugin', 'plugin_digests', 'source_digest']

_PACKAGE = str(Path(__file__).resolve().parents[2])


def import_plugin(source: str) -> ModuleType:
    """Import a Python file by its path, or a module by its name.

    The file's folder is added to sys.path, so that the file can import its neighbours, as a script can. A file is
    executed once.

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
            raise  # a module that the plug-in itself imports
        raise FileNotFoundError(f"'{source}' is not a file, and there is no module of that name.") from error


def describe_failure(source: str, error: Exception) -> str:
    """Return file, line and reason of an error that a plug-in's import raised: 'FILE, line N: REASON'."""
    reason = ' '.join(str(error).split())
    if isinstance(error, SyntaxError):
        file, line, reason = error.filename or source, error.lineno, str(error.msg)
    else:
        frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)
                  if not frame.filename.startswith((_PACKAGE, '<frozen importlib'))]
        folder = str(Path(source).resolve().parent)  # a line of the user's tells more than one of torch
        own = [frame for frame in frames if Path(source).is_file() and frame[0].startswith(folder)]
        file, line = (own or frames or [(source, None)])[-1]
    if not isinstance(error, ValueError):
        reason = f'{type(error).__name__}: {reason}'
    place = file if file == source else f'{source}: {file}'
    return f'{place}{f", line {line}" if line else ""}: {reason}'


def plugin_digests(sources: Iterable[str]) -> Dict[str, str]:
    """Return a digest of every plug-in's file; for a package, of its `__init__`."""
    files = {source: source if Path(source).is_file() else getattr(sys.modules.get(source), '__file__', None)
             for source in sources}
    return {source: _digest(Path(file)) for source, file in files.items() if file and Path(file).is_file()}


def source_digest(value: Any) -> str:
    """Return a digest of the file that defines a class or function; '' for timm, torch and this package."""
    module = getattr(value, '__module__', None) or ''
    file = getattr(sys.modules.get(module), '__file__', None)
    known = module.split('.')[0] in ('timm', 'timm_sscl', 'torch', 'torchvision')
    return '' if known or not file or not Path(file).is_file() else _digest(Path(file))


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def _import_file(path: Path) -> ModuleType:
    name = path.stem
    if getattr(sys.modules.get(name), '__file__', None) == str(path):
        return sys.modules[name]
    if name in sys.modules or importlib.util.find_spec(name) is not None:  # another module has this name
        name = f'{name}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}'
        if name in sys.modules:
            return sys.modules[name]
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(f"'{path}' is not a Python file: its name must end in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # timm's register_model looks the module up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
