"""The layout of the package: rooms, and imports that point one way only."""
import ast
import importlib
import warnings
from pathlib import Path

import pytest

import timm_sscl
from timm_sscl._moved import MOVED

ROOT = Path(timm_sscl.__file__).parent
FILES = {path: '.'.join(['timm_sscl', *path.relative_to(ROOT).with_suffix('').parts]).removesuffix('.__init__')
         for path in sorted(ROOT.rglob('*.py'))}
# from the top floor down; a room imports only rooms below it
ROOMS = (
    'training', 'export', 'models', 'distillation', 'conversion', 'features', 'report', 'losses', 'neurons', 'data')
ALONE = ('losses', 'neurons', 'data')  # these import no room at all
MAX_LINES, MAX_TEST_LINES, MAX_FUNCTION = 350, 600, 60


def imports(path):
    """Modules of the package that a file imports, anywhere in it."""
    package = FILES[path] if path.name == '__init__.py' else FILES[path].rpartition('.')[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split('.')[0] == 'timm_sscl')
        elif isinstance(node, ast.ImportFrom):
            base = package.split('.')[:len(package.split('.')) + 1 - node.level] if node.level else []
            module = '.'.join([*base, *([node.module] if node.module else [])])
            if module.split('.')[0] == 'timm_sscl':
                modules = [f'{module}.{alias.name}' for alias in node.names]
                yield from (m if m in FILES.values() else module for m in modules)


def room(module):
    """Room of a module; None for the tools beside the rooms and for the package itself."""
    parts = module.split('.')
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else None


GRAPH = {module: sorted(set(imports(path)) - {module}) for path, module in FILES.items()}


def test_every_folder_is_a_room_and_says_what_it_is_for():
    folders = {path.parent for path in FILES if path.parent != ROOT}
    assert {folder.name for folder in folders if folder.parent == ROOT} <= set(ROOMS)
    for folder in folders:
        assert ast.get_docstring(ast.parse((folder / '__init__.py').read_text())), f'{folder.name}/__init__.py'


@pytest.mark.parametrize('module', GRAPH)
def test_imports_point_downwards(module):
    here = room(module)
    for target in GRAPH[module]:
        there = room(target)
        if module == 'timm_sscl' or there == here:
            continue
        assert target != 'timm_sscl', f'{module} imports the package itself'
        assert here is not None or there is None, f'{module}, a tool of all rooms, imports {target}'
        if there is not None:
            assert here not in ALONE, f'{module} imports {target}; {here} imports no other room'
            assert ROOMS.index(there) > ROOMS.index(here), f'{module} imports {target}, which is above it'


def test_no_circle():
    state = {}

    def visit(module, way):
        if state.get(module) == 'done':
            return
        assert module not in way, ' -> '.join([*way[way.index(module):], module])
        for target in GRAPH.get(module, ()):
            # a package's __init__ re-exports its modules; they may import one another but not it
            visit(target, [*way, module])
        state[module] = 'done'

    for module in GRAPH:
        visit(module, [])


def _functions(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0]
            docstring = ast.get_docstring(node, clean=False)
            lines = node.end_lineno - node.lineno + 1
            yield node.name, lines - (first.end_lineno - first.lineno + 1 if docstring is not None else 0)


def test_files_and_functions_are_short():
    root = ROOT.parent
    lengths = {p: len(p.read_text().splitlines()) for p in FILES}
    too_long = [f'{p.relative_to(root)}: {n} lines' for p, n in lengths.items() if n > MAX_LINES]
    tests = {p: len(p.read_text().splitlines()) for p in (root / 'tests').rglob('*.py')}
    too_long += [f'{p.relative_to(root)}: {n} lines' for p, n in tests.items() if n > MAX_TEST_LINES]
    script = len((root / 'train.py').read_text().splitlines())
    too_long += [f'train.py: {script} lines'] if script > 250 else []
    too_long += [f'{p.relative_to(root)}: {name} has {n} lines'
                 for p in [*FILES, root / 'train.py'] for name, n in _functions(p) if n > MAX_FUNCTION]
    assert not too_long, '\n'.join(too_long)


@pytest.mark.parametrize('old', MOVED)
def test_old_module_names_warn_and_give_the_new_module(old):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        module = importlib.import_module(f'timm_sscl.{old}')
    assert module is importlib.import_module(f'timm_sscl.{MOVED[old]}')
    assert module.__spec__.name == f'timm_sscl.{MOVED[old]}'
    assert all(issubclass(w.category, DeprecationWarning) for w in caught)


def test_files_of_tests_have_names_of_their_own():
    """pytest imports a test file by its name alone, so a second one of that name is an error."""
    names = [path.name for path in Path(__file__).parent.rglob('test_*.py')]
    assert sorted(set(names)) == sorted(names)


def test_public_names_exist():
    assert sorted(set(timm_sscl.__all__)) == sorted(timm_sscl.__all__)
    for name in timm_sscl.__all__:
        assert callable(getattr(timm_sscl, name)), name
