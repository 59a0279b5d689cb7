"""Load recipes: named sets of options, shipped with the package or from a YAML file."""
from importlib import resources
from pathlib import Path
from typing import Any, Dict, List, Tuple

import yaml

from timm_sscl.closest import closest

from ..errors import OptionError

__all__ = ['DIGITS_RECIPE', 'list_recipes', 'load_recipe']

DIGITS_RECIPE = 'digits'


def list_recipes() -> List[str]:
    """Return the names of the recipes for --config. Names that start with an underscore are parts of recipes and left
    out.
    """
    folder = resources.files('timm_sscl') / 'configs'
    return sorted(f.name[:-len('.yaml')] for f in folder.iterdir() if f.name.endswith('.yaml') and f.name[0] != '_')


def load_recipe(name: str, inside: Tuple[str, ...] = ()) -> Dict[str, Any]:
    """Load the options of a recipe by its name or from a YAML file.

    `base: NAME` in it, or a list of names, includes other recipes. Later ones override earlier ones, and the recipe's
    own options override all of them.

    Args:
        name: Recipe or file.
        inside: Recipes that include this one.

    Raises:
        OptionError: There is no such recipe or file, it is not a YAML mapping, or it includes itself.
    """
    if name in inside:
        raise OptionError(f"--config: recipe '{name}' has itself as a base ({' -> '.join([*inside, name])}).")
    text = _recipe_text(name)
    try:
        options = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise OptionError(f"--config: '{name}' is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(options, dict):
        raise OptionError(f"--config: '{name}' must map option names to values.")
    bases = options.pop('base', [])
    result: Dict[str, Any] = {}
    for base in [bases] if isinstance(bases, str) else bases:
        result.update(load_recipe(base, (*inside, name)))
    return {**result, **{key.replace('-', '_'): value for key, value in options.items()}}


def _recipe_text(name: str) -> str:
    path, shipped = Path(name).expanduser(), resources.files('timm_sscl') / 'configs' / f'{name}.yaml'
    if path.suffix in ('.yaml', '.yml') or path.is_file():
        if not path.is_file():
            raise OptionError(f"--config: file '{name}' does not exist.")
        return path.read_text()
    if path.name == name and shipped.is_file():
        return shipped.read_text()
    close = closest(name, list_recipes())
    raise OptionError(f"--config: unknown recipe '{name}'." + (f" Did you mean '{close[0]}'?" if close else '')
                      + f" Give a YAML file or one of {', '.join(list_recipes())}.")
