"""Decide which activations become neurons, by include and exclude patterns on names and classes."""
import ast
import inspect
import textwrap
from fnmatch import fnmatchcase
from typing import Dict, List, Optional, Sequence, Set, Tuple

import torch.nn as nn

from .functional_calls import first_argument

__all__ = ['GROUPS', 'Policy']

# named groups of patterns; 'head' depends on the model: the activations that forward_head runs
GROUPS: Dict[str, Tuple[str, ...]] = {
    'attention': ('*Attention*', '*Attn*', 'LiteMLA', '*MSA', 'MHSA*'),
    'squeeze_excite': ('SqueezeExcite*', 'SEModule*', 'EffectiveSEModule*', 'CecaModule*', '*.se', '*.se_module'),
}
HEAD = 'head'


class Policy:
    """Decide for one model which activations become neurons.

    A pattern (shell wildcards) is matched against the names and classes of an activation and of all modules around it.
    So 'layer4', 'SqueezeExcite' and '*.mlp' select everything inside. The group names 'attention', 'squeeze_excite' and
    'head' can be used like patterns.

    Args:
        model: Model to convert.
        include: Patterns of the activations that become neurons; None is all but gates. A gate becomes one if its class
            or its full name is included.
        exclude: Patterns of activations that stay analog; takes precedence over include.
    """

    def __init__(self, model: nn.Module, include: Optional[Sequence[str]], exclude: Optional[Sequence[str]]):
        self.head = _head_children(model) if HEAD in {*(include or ()), *(exclude or ())} else set()
        self.include = None if include is None else list(include)
        self.exclude = list(exclude or ())
        self.unused: Set[str] = {*(include or ()), *self.exclude}  # patterns without a match so far

    def why_analog(self, name: str, kind: str, around: List[Tuple[str, str]], gate: bool) -> Optional[str]:
        """Return why an activation stays analog, None if it becomes a neuron.

        Args:
            name: Module name of the activation.
            kind: Its class name.
            around: (name, class name) of the modules around it.
            gate: Whether it is a gate.
        """
        places = [(name, kind), *around]
        excluded = self._first(self.exclude, places)
        included = None if self.include is None else self._first(self.include, places)
        if gate and not {name, kind} & set(self.include or ()):
            return 'gate, stays analog'
        if excluded is not None:
            return f"excluded by '{excluded}', stays analog"
        if self.include is not None and included is None:
            return 'not included, stays analog'
        return None

    def _first(self, patterns: Sequence[str], places: List[Tuple[str, str]]) -> Optional[str]:
        """Return the first matching pattern, and remove all matching ones from `unused`."""
        matched = [pattern for pattern in patterns if self._matches(pattern, places)]
        self.unused.difference_update(matched)
        return matched[0] if matched else None

    def _matches(self, pattern: str, places: List[Tuple[str, str]]) -> bool:
        if pattern == HEAD:
            return any(name.split('.')[0] in self.head for name, _ in places)
        return any(fnmatchcase(text, p) for p in GROUPS.get(pattern, (pattern,)) for place in places for text in place)


def _head_children(model: nn.Module) -> Set[str]:
    """Return the names of top-level modules that forward_head uses and forward_features does not."""
    return _used(model, 'forward_head') - _used(model, 'forward_features')


def _used(model: nn.Module, method: str) -> Set[str]:
    """Return the names of top-level modules that a method's source mentions."""
    # the model's own method, not the one of the conversion's mixin
    function = next((vars(cls)[method] for cls in type(model).__mro__
                     if method in vars(cls) and cls.__module__ != 'timm_sscl.conversion.model'), None)
    if function is None:
        return set()
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    own = first_argument(tree)
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name) and node.value.id == own and node.attr in model._modules}
