"""Find activations, dropout and noise that a module calls as functions in its source, and replace them inside its
forward.
"""
import ast
import inspect
import sys
import textwrap
from functools import lru_cache, wraps
from types import FrameType
from typing import Any, Callable, Dict, FrozenSet, List, Optional, Sequence, Set, Type

import torch
import torch.fx
import torch.nn as nn
import torch.utils.checkpoint
from torch.overrides import TorchFunctionMode

from timm_sscl.class_swap import Mixin, mix_in, new_mixed
from timm_sscl.neurons.folding import require_fold
from ..over_time.dropout import OverTime, dropout_over_time, rand_over_time

__all__ = ['FunctionsOverTime', 'replace_functions', 'called_activations', 'calls_noise', 'NEURON_NAME']

NEURON_NAME = 'functional_act'  # child with the neuron or neurons for a module's functional activations

ACTIVATION_FUNCTIONS = {
    'relu', 'relu_', 'relu6', 'leaky_relu', 'leaky_relu_', 'prelu', 'rrelu', 'rrelu_', 'elu', 'elu_', 'selu', 'selu_',
    'celu', 'celu_', 'gelu', 'silu', 'mish', 'hardswish', 'hardtanh', 'hardtanh_', 'tanh', 'tanh_', 'softplus',
    'softsign',
}
_IN_PLACE_FUNCTIONS = {name for name in ACTIVATION_FUNCTIONS if name.endswith('_')}
torch.fx.wrap('dropout_over_time')  # one node of a torch.fx graph each
torch.fx.wrap('rand_over_time')

_FORWARD_METHODS = {'forward', 'forward_features', 'forward_head', 'forward_intermediates'}
_SPATIAL_DROPOUT = {'dropout1d', 'dropout2d', 'dropout3d', 'feature_dropout', 'feature_dropout_'}
_DROPOUT = {'dropout', 'dropout_', *_SPATIAL_DROPOUT}
_NOISE_FUNCTIONS = {*_DROPOUT, 'rand'}


def is_activation_function(func: Callable) -> bool:
    """Return whether a function that a torch mode intercepted is an activation. Custom operators are not."""
    return (getattr(func, '__name__', '') in ACTIVATION_FUNCTIONS
            and not isinstance(func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)))


@lru_cache(maxsize=None)
def _calls(cls: type) -> Dict[str, FrozenSet[str]]:
    """Return, per method of a class, the functions that it calls, except methods and modules of self.

    Methods whose source is not available are missing. `self.act(x)` calls a module, which the conversion replaces.
    `F.relu(x)`, `relu(x)` and `x.relu()` are function calls.
    """
    found: Dict[str, FrozenSet[str]] = {}
    overridden: Set[str] = set()  # methods that do not call their parent's version
    parents = {'super', *(base.__name__ for base in cls.__mro__[1:])}
    for base in cls.__mro__:
        if base.__module__.startswith('torch.') or base.__module__ == 'builtins':
            continue
        for name, method in vars(base).items():
            if name == '__init__' or name in overridden or not inspect.isfunction(method):
                continue
            try:
                tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
            except (OSError, TypeError, SyntaxError):
                continue
            own = first_argument(tree)
            names = (_function_name(node, own) for node in ast.walk(tree))
            found[name] = found.get(name, frozenset()).union(filter(None, names))
            if not any(isinstance(node, ast.Name) and node.id in parents for node in ast.walk(tree)):
                overridden.add(name)
    return found


def first_argument(tree: ast.Module) -> Optional[str]:
    """Return the name of the first argument ('self' by convention) of the method in a parsed source."""
    method = tree.body[0]
    arguments = [*method.args.posonlyargs, *method.args.args] if isinstance(method, ast.FunctionDef) else []
    return arguments[0].arg if arguments else None


def _function_name(node: ast.AST, own: Optional[str]) -> Optional[str]:
    """Return the name of the function that a node calls; None for other nodes and for calls on `own`, the module."""
    if not isinstance(node, ast.Call):
        return None
    if isinstance(node.func, ast.Name):
        return node.func.id
    root = node.func
    while isinstance(root, (ast.Attribute, ast.Subscript)):
        root = root.value
    is_own = isinstance(root, ast.Name) and root.id == own
    return node.func.attr if isinstance(node.func, ast.Attribute) and not is_own else None


def called_activations(module: nn.Module) -> List[str]:
    """Return the activations that a module calls as functions or has as attributes (`self.activation = F.relu`)."""
    cls: type = type(module)
    called = frozenset().union(*_calls(cls).values()) & ACTIVATION_FUNCTIONS
    held = {getattr(value, '__name__', '') for value in vars(module).values()
            if callable(value) and not isinstance(value, nn.Module)}
    return sorted(called | (held & ACTIVATION_FUNCTIONS))


def function_module(functions: Sequence[str]) -> Optional[nn.Module]:
    """Return the module that computes these activation functions; None if they differ or are neither relu nor relu6."""
    modules = {'relu': nn.ReLU, 'relu_': nn.ReLU, 'relu6': nn.ReLU6}
    kinds = {modules.get(name) for name in functions}
    kind = kinds.pop() if len(kinds) == 1 else None
    return kind() if kind is not None else None


def methods_that_fire(cls: type) -> Set[str]:
    """Return the names of a class's methods that call activations as functions."""
    return {name for name, names in _calls(cls).items() if names & ACTIVATION_FUNCTIONS}


def calls_noise(cls: type) -> bool:
    """Return whether a class calls dropout or random number functions."""
    return any(names & _NOISE_FUNCTIONS for names in _calls(cls).values())


class FunctionsOverTime(TorchFunctionMode):
    """Function mode that replaces functional activations by neurons and draws functional noise once per sample.

    Args:
        timesteps: T of the (T * B, ...) tensors.
        neuron: Replaces functional activations: one neuron for all, or a ModuleDict with one per call, named by the
            call's number. Calls without an entry, and all calls if None, stay as they are.
        first: Number of the first call.
        last: Number after the last call; None does not check it.
    """

    def __init__(
            self,
            timesteps: int,
            neuron: Optional[Callable[..., Any]] = None,
            first: int = 0,
            last: Optional[int] = None,
    ):
        super().__init__()
        self.timesteps = timesteps
        self.neuron = neuron
        self.call = first
        self.last = last
        self.differentiable = torch.is_grad_enabled()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, '__name__', '')
        if name in _DROPOUT:
            spatial = {'spatial': True} if name in _SPATIAL_DROPOUT else {}
            out = dropout_over_time(self.timesteps, *args, **kwargs, **spatial)
            if out is not (args[0] if args else kwargs['input']):
                self._refuse_recomputation(name)
            return out
        if name == 'rand':
            self._refuse_recomputation(name)
            return rand_over_time(self.timesteps, *args, **kwargs)
        if self.neuron is not None and is_activation_function(func):
            neuron = self._next()
            if neuron is not None:
                self._refuse_recomputation(name)
            return func(*args, **kwargs) if neuron is None else self._fire(neuron, name, *args, **kwargs)
        return func(*args, **kwargs)

    def _next(self) -> Any:
        """Return the neuron of the next call, None if it stays analog."""
        call, self.call = self.call, self.call + 1
        if self.last is not None and call >= self.last:
            self._miscounted('more than')
        if not isinstance(self.neuron, nn.ModuleDict):
            return self.neuron
        return self.neuron[str(call)] if str(call) in self.neuron else None

    def check_count(self) -> None:
        """Raise an error if fewer calls were made than expected."""
        if self.neuron is not None and self.last is not None and self.call != self.last:
            self._miscounted('fewer than')

    def _miscounted(self, how: str) -> None:
        """Raise an error about the number of calls."""
        raise RuntimeError(
            f'a module with functional activations called {how} the {self.last} that it called when it was converted; '
            f'each call has a neuron of its own, by its number. Make the activations modules (self.act = nn.ReLU()) '
            f'where a forward does not always call the same.')

    def _refuse_recomputation(self, function: str) -> None:
        """Raise an error if the function is called inside a region under gradient checkpointing.

        The backward recomputes such a region after this mode has ended, so that the function would not be replaced. A
        region around the whole module is allowed, since its recomputation calls the module's forward, which enters the
        mode again.
        """
        if not self.differentiable or torch.compiler.is_compiling():
            return
        frame: Optional[FrameType] = sys._getframe(2)
        while frame is not None and frame.f_code.co_name != '_call_folded' and frame.f_code is not _FORWARD:
            if frame.f_code.co_filename == torch.utils.checkpoint.__file__:
                raise RuntimeError(
                    f"'{function}' is called as a function inside a region under gradient checkpointing, whose "
                    f'backward computes it again as it was before the conversion. Make it a module (self.act = '
                    f'nn.ReLU(), self.drop = nn.Dropout(p)), or put the region into a module of its own.')
            frame = frame.f_back

    def _fire(self, neuron, name, input, *args, inplace=False, **kwargs):
        # args[:1] is inplace for the functions with inplace as second argument: relu, relu6, silu, mish, hardswish
        inplace = inplace or name in _IN_PLACE_FUNCTIONS or args[:1] == (True,)
        spikes = neuron(input.clone() if inplace else input)  # the neuron saves its input for the backward
        return input.copy_(spikes) if inplace else spikes


def number_of_calls(module: nn.Module) -> Optional[int]:
    """Return how many functional activations every forward of a converted module calls; None if unknown."""
    called = module.__dict__.get('function_calls')
    return len(called.functions) if called is not None and called.is_counted else None


class _Functions(OverTime, Mixin):
    """Mixin for a submodule that calls activations, dropout or noise as functions."""

    @classmethod
    def class_attributes(cls, base: Type[nn.Module]) -> Dict[str, Any]:
        return methods_inside_only(base)

    def forward(self, *args, **kwargs):
        if self.part_of_model and self.training:  # in evaluation mode its neuron checks this
            require_fold(type(self).__name__)
        functions = FunctionsOverTime(self.timesteps, self._modules.get(NEURON_NAME), 0, number_of_calls(self))
        with functions:
            out = super().forward(*args, **kwargs)
        functions.check_count()
        return out


def methods_inside_only(base: type) -> Dict[str, Callable]:
    """Return overrides for a class's methods, other than forward methods, that call activations as functions.

    They raise outside a call of the converted model, where no neuron replaces the activations.
    """
    return {name: _inside_only(getattr(base, name)) for name, names in _calls(base).items()
            if names & ACTIVATION_FUNCTIONS and name not in _FORWARD_METHODS}


def _inside_only(method: Callable) -> Callable:
    @wraps(method)
    def call(self, *args, **kwargs):
        if NEURON_NAME in self._modules:
            require_fold(f'{type(self).__name__}.{method.__name__}')
        return method(self, *args, **kwargs)
    return call


_FORWARD = _Functions.forward.__code__


def _new_functions(base: Type[nn.Module]) -> nn.Module:
    """Create an instance for unpickling. Pickles of version 0.1.0 call this."""
    return new_mixed(_Functions, base)


def replace_functions(module: nn.Module, timesteps: int) -> None:
    """Give a submodule a subclass of its class whose forward replaces functional activations and noise, in place."""
    if not isinstance(module, _Functions):
        mix_in(module, _Functions)
        module.timesteps = timesteps
