"""Make timm's notrace functions one node of a torch.fx graph of a converted model.

torch.fx looks for them in the module of the root's forward, which in a converted model is in timm_sscl.
"""
import sys
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator

import torch.fx
from timm.layers import get_notrace_functions
from torch.utils._pytree import tree_leaves

__all__ = ['functions_as_nodes']


def _as_node(function: Callable, tracer: torch.fx.proxy.TracerBase) -> Callable:
    """Wrap a function: a call with a Proxy among its arguments adds a node to the tracer's graph."""
    def call(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(leaf, torch.fx.Proxy) for leaf in tree_leaves((args, kwargs))):
            return tracer.create_proxy('call_function', function, args, kwargs)
        return function(*args, **kwargs)
    return call


@contextmanager
def functions_as_nodes(cls: type, tracer: torch.fx.proxy.TracerBase) -> Iterator[None]:
    """Inside, calls of timm's notrace functions in the modules of a class and its bases become one graph node each."""
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
