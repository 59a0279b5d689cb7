"""Read from the source of the package what it declares: constants, settings, options of losses, registered names.

The command line is checked before torch is imported, and the modules that declare these things import it. Their source
is the only declaration; nothing is executed.
"""
import ast
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple, Union

__all__ = ['REQUIRED', 'Declared', 'constant', 'loss_arguments', 'registered', 'settings']

_PACKAGE = Path(__file__).resolve().parents[2]
_Function = Union[ast.FunctionDef, ast.AsyncFunctionDef]
REQUIRED = ...  # the default of an argument that has none


@dataclass(frozen=True)
class Declared:
    """An option as its source declares it.

    Attributes:
        default: Default value; REQUIRED if there is none.
        help: Help text of a knob.
        choices: Values that a Literal annotation allows; empty for other types.
    """
    default: Any
    help: str = ''
    choices: Tuple[Any, ...] = ()


def constant(module: str, name: str) -> Any:
    """Return a constant of a module: `constant('conversion.from_ann.qcfs', 'QCFS_THRESHOLD')`.

    Raises:
        LookupError: The module assigns no literal to this name.
    """
    for target, value in _assignments(_tree(_file(module)).body):
        if target == name:
            return ast.literal_eval(value)
    raise LookupError(f'{module} has no constant {name}.')


def settings(module: str, name: str) -> Dict[str, Declared]:
    """Return the fields of a dataclass by name, those of its bases left out: `settings('neurons.lif', 'LIF.Settings')`.

    Raises:
        LookupError: The module has no such class.
    """
    body: List[ast.stmt] = _tree(_file(module)).body
    for part in name.split('.'):
        found = [node for node in body if isinstance(node, ast.ClassDef) and node.name == part]
        if not found:
            raise LookupError(f'{module} has no class {name}.')
        body = found[0].body
    fields = {}
    for field, value in _assignments(body):
        if isinstance(value, ast.Call):  # knob(default, help)
            fields[field] = Declared(*map(ast.literal_eval, value.args))
        else:
            fields[field] = Declared(ast.literal_eval(value))
    return fields


def registered(folder: str, decorator: str, *first: str) -> List[str]:
    """Return the names that a folder of the package registers, sorted.

    Args:
        folder: Folder in the package.
        decorator: Name of the decorator: 'register_neuron'.
        first: Arguments before the name: 'norm' of `@register_variant('norm', 'tdbn')`.
    """
    return sorted(name for file in _files(folder) for name in _registered_in(file, decorator, *first))


def loss_arguments(name: str) -> Dict[str, Declared]:
    """Return the arguments of a loss of this package by name. What the loss is: a class with a constructor.

    Raises:
        LookupError: No file of the losses registers a class by this name.
    """
    for file in _files('losses'):
        if name in _registered_in(file, 'register_loss'):
            owner = _registered_class(_tree(file), name)
            if owner is not None:
                return dict(_arguments(owner))
    raise LookupError(f"no class is registered as the loss '{name}'.")


def _file(module: str) -> Path:
    return _PACKAGE.joinpath(*module.split('.')).with_suffix('.py')


def _files(folder: str) -> List[Path]:
    return sorted((_PACKAGE / folder).rglob('*.py'))


@lru_cache(maxsize=None)
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def _registered_in(file: Path, decorator: str, *first: str) -> List[str]:
    """Return the names in calls of a decorator at the beginning of a line; those in docstrings are indented."""
    before = ''.join(rf"'{re.escape(word)}',\s*" for word in first)
    return re.findall(rf"^@?{decorator}\(\s*{before}'([^']+)'", file.read_text(), re.MULTILINE)


def _assignments(body: List[ast.stmt]) -> Iterator[Tuple[str, ast.expr]]:
    """Yield (name, value) of the assignments to one name."""
    for node in body:
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, 'targets', [])
        value = getattr(node, 'value', None)
        if len(targets) == 1 and isinstance(targets[0], ast.Name) and value is not None:
            yield targets[0].id, value


def _registered_class(tree: ast.Module, name: str) -> Optional[_Function]:
    """Return the constructor of the class that a file registers as a loss, by a decorator or by a call with it."""
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    found = [cls for cls in classes.values() if any(_registers(call, name) for call in cls.decorator_list)]
    calls = [node.value for node in tree.body if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)]
    found += [classes[arg.id] for call in calls if _registers(call.func, name)
              for arg in call.args if isinstance(arg, ast.Name) and arg.id in classes]
    constructors = [node for cls in found for node in cls.body
                    if isinstance(node, ast.FunctionDef) and node.name == '__init__']
    return constructors[0] if constructors else None


def _registers(call: ast.expr, name: str) -> bool:
    """Return whether an expression is register_loss(name, ...)."""
    return (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == 'register_loss'
            and isinstance(call.args[0], ast.Constant) and call.args[0].value == name)


def _arguments(function: _Function) -> Iterator[Tuple[str, Declared]]:
    """Yield (name, declaration) of the arguments after self."""
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args][1:]
    defaults: List[Optional[ast.expr]] = [*[None] * (len(named) - len(arguments.defaults)), *arguments.defaults]
    for argument, default in [*zip(named, defaults), *zip(arguments.kwonlyargs, arguments.kw_defaults)]:
        value = REQUIRED if default is None else ast.literal_eval(default)
        yield argument.arg, Declared(value, choices=_literal_choices(argument.annotation))


def _literal_choices(annotation: Optional[ast.expr]) -> Tuple[Any, ...]:
    """Return the values of the annotation Literal[...]; empty for another."""
    if isinstance(annotation, ast.Subscript) and isinstance(annotation.value, ast.Name) \
            and annotation.value.id == 'Literal':
        values = ast.literal_eval(annotation.slice)
        return values if isinstance(values, tuple) else (values,)
    return ()
