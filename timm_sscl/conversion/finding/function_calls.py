"""Find which modules call activations as functions when they run, how often, and on what input."""
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from torch.overrides import TorchFunctionMode

from .functional_calls import NEURON_NAME, called_activations, function_module, is_activation_function

__all__ = ['FunctionCalls', 'WatchFunctions', 'Caller', 'called_by_source', 'give_neurons', 'merge_modes',
           'spread_over_calls']


class FunctionCalls(NamedTuple):
    """The activations that one module calls as functions in a forward, in order."""
    names: Tuple[str, ...]  # names of their neurons; one for all calls if their number varies between forwards
    functions: Tuple[str, ...]
    is_counted: bool = False  # whether every forward makes exactly these calls
    head: Optional[int] = None  # number of calls before the module's forward_head
    inputs: Tuple[List[torch.Tensor], ...] = ()  # inputs during a probe: per call a list with one entry per forward


class _Forward:
    """Function calls during one forward of a module."""

    def __init__(self, name: str):
        self.name = name
        self.functions: List[str] = []
        self.inputs: List[torch.Tensor] = []
        self.head: Optional[int] = None


class WatchFunctions(TorchFunctionMode):
    """Function mode that records the activations that modules call as functions while the model runs.

    A call is assigned to the innermost watched module whose forward is running.

    Args:
        model: The model. Hooks are left on it, so run it `undisturbed`.
        modules: Modules to watch, by name.
    """

    def __init__(self, model: nn.Module, modules: Dict[str, nn.Module]):
        super().__init__()
        self.ended: Dict[str, List[_Forward]] = {}
        self.running: List[Optional[_Forward]] = []
        names = {id(module): name for name, module in modules.items()}
        for module in model.modules():
            name = names.get(id(module))
            module.register_forward_pre_hook(lambda m, args, name=name: self._begin(name))
            module.register_forward_hook(lambda m, args, out: self._end(), always_call=True)
        if hasattr(model, 'forward_head'):
            head = model.forward_head

            def forward_head(*args: Any, **kwargs: Any) -> Any:
                if len(self.running) == 1 and self.running[0] is not None:
                    self.running[0].head = len(self.running[0].inputs)
                return head(*args, **kwargs)
            model.__dict__['forward_head'] = forward_head

    def _begin(self, name: Optional[str]) -> None:
        self.running.append(None if name is None else _Forward(name))

    def _end(self) -> None:
        forward = self.running.pop()
        if forward is not None:
            self.ended.setdefault(forward.name, []).append(forward)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if self.running and self.running[-1] is not None and is_activation_function(func):
            x = args[0] if args else next(iter((kwargs or {}).values()))
            self.running[-1].functions.append(func.__name__)
            self.running[-1].inputs.append(x.detach().clone())
        return func(*args, **(kwargs or {}))

    def result(self) -> Dict[str, FunctionCalls]:
        """Return the calls of every module that ran, including modules without calls."""
        return {name: _merged(name, forwards) for name, forwards in self.ended.items()}


def _merged(name: str, forwards: List[_Forward]) -> FunctionCalls:
    """Combine all recorded forwards of a module: one neuron per call if every forward made the same calls, else one for
    all.
    """
    first = forwards[0]
    if any(forward.functions != first.functions for forward in forwards):
        functions = [function for forward in forwards for function in forward.functions]
        return _one_for_all(name, functions, [x for forward in forwards for x in forward.inputs])
    n = len(first.functions)
    names = (_neuron_name(name),) if n == 1 else tuple(f'{_neuron_name(name)}.{i}' for i in range(n))
    inputs = tuple([forward.inputs[i] for forward in forwards] for i in range(n))
    return FunctionCalls(names, tuple(first.functions), True, first.head, inputs)


def _one_for_all(name: str, functions: Sequence[str], inputs: List[torch.Tensor]) -> FunctionCalls:
    """Return FunctionCalls with one neuron for any number of calls."""
    return FunctionCalls((_neuron_name(name),), (', '.join(sorted(set(functions))),), inputs=(inputs,))


def merge_modes(name: str, evaluation: FunctionCalls, training: FunctionCalls) -> FunctionCalls:
    """Combine a module's calls in evaluation and training mode; one neuron for all calls if the modes differ."""
    if evaluation.functions == training.functions:
        return evaluation
    inputs = [x for seen in evaluation.inputs for x in seen]
    return _one_for_all(name, [*evaluation.functions, *training.functions], inputs)


def called_by_source(module: nn.Module, name: str) -> FunctionCalls:
    """Return the function calls in the source of a module that did not run. Their number is unknown."""
    functions = called_activations(module)
    return _one_for_all(name, functions, []) if functions else FunctionCalls((), ())


def _neuron_name(module: str) -> str:
    return f'{module}.{NEURON_NAME}' if module else NEURON_NAME


class Caller(NamedTuple):
    """A module that calls activations as functions."""
    name: str
    module: nn.Module
    called: FunctionCalls
    neurons: List[str]  # those of called.names that become neurons


def give_neurons(caller: Caller, make: Callable[[], nn.Module]) -> None:
    """Add the neurons for a module's function calls in place: one child, or a ModuleDict with one per call, named by
    its number.

    Args:
        caller: The module and its calls.
        make: Function that creates a neuron.
    """
    neurons = {}
    for name, functions in zip(caller.called.names, caller.called.functions):
        if name in caller.neurons:
            neuron = make()
            neuron.__dict__['replaced'] = function_module(functions.split(', '))
            neurons[name.rpartition('.')[2]] = neuron
    one = neurons.get(NEURON_NAME)
    caller.module.add_module(NEURON_NAME, nn.ModuleDict(neurons) if one is None else one)


def spread_over_calls(model: nn.Module, state_dict: Dict[str, Any], prefix: str, factors: Iterable[str]) -> None:
    """Copy the single gain that a checkpoint of version 0.1.0 has for a module's functions to every call, in place.

    Args:
        model: Spiking model.
        state_dict: State dict to load.
        prefix: Prefix of the model's keys.
        factors: Names of a neuron's factors in a state dict.
    """
    for name, module in model.named_modules():
        if name.rpartition('.')[2] == NEURON_NAME and isinstance(module, nn.ModuleDict):
            for factor in factors:
                value = state_dict.pop(f'{prefix}{name}.{factor}', None)
                if value is not None:
                    state_dict.update((f'{prefix}{name}.{call}.{factor}', value) for call in module)
