"""Functions that timm takes as one node of a torch.fx graph, in the methods of a class that a converted model inherits.

torch.fx wraps them where it finds the root module's forward, which is timm_sscl's in a converted model.
"""
import sys
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator

import torch.fx
from timm.layers import get_notrace_functions
from torch.utils._pytree import tree_leaves

__all__ = ['functions_as_nodes']


def _as_node(function: Callable, tracer: torch.fx.Tracer) -> Callable:
    def call(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(leaf, torch.fx.Proxy) for leaf in tree_leaves((args, kwargs))):
            return tracer.create_proxy('call_function', function, args, kwargs)
        return function(*args, **kwargs)
    return call


@contextmanager
def functions_as_nodes(cls: type, tracer: torch.fx.Tracer) -> Iterator[None]:
    """Inside, timm's notrace functions are one node each where the methods of a class and its bases call them."""
    functions = set(get_notrace_functions())
    modules = {base.__module__ for base in cls.__mro__ if not base.__module__.startswith(('torch.', 'builtins'))}
    replaced: Dict[str, Dict[str, Callable]] = {}
    for name in modules:
        names = vars(sys.modules[name]) if name in sys.modules else {}
        replaced[name] = {key: value for key, value in names.items()
                          if isinstance(value, type(_as_node)) and value in functions}
        for key, value in replaced[name].items():
            names[key] = _as_node(value, tracer)
    try:
        yield
    finally:
        for name, originals in replaced.items():
            vars(sys.modules[name]).update(originals)
