"""Run a model under the audit's interpreter, in evaluation and in training mode."""
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Set, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from timm_sscl.neurons import SpikingNeuron
from timm_sscl.conversion.over_time.dropout import OverTime
from timm_sscl.conversion.finding.functional_calls import calls_noise
from timm_sscl.conversion.variants.batch_norms import BatchNormOverTime
from timm_sscl.probing import Example

from .interpreter import Interpreter
from .taint import Event

__all__ = ['Run', 'run']

_DETOURS = {'numpy': 'numpy', '__array__': 'numpy', 'tolist': 'tolist'}  # Tensor methods by which values leave torch
_NOISE = {'bernoulli', 'bernoulli_', 'rand', 'rand_like', 'uniform_', 'randn', 'randn_like', 'normal', 'normal_',
          'exponential_', 'geometric_', 'cauchy_', 'log_normal_', 'poisson', 'multinomial', 'gumbel_softmax'}
_DROPOUT = {'dropout', 'dropout_', 'dropout1d', 'dropout2d', 'dropout3d', 'feature_dropout', 'feature_dropout_',
            'alpha_dropout', 'feature_alpha_dropout'}
# functions for which a converted module draws once per sample
_DRAWN_ONCE = {'rand', 'uniform_', 'bernoulli_'} | _DROPOUT


class Run(NamedTuple):
    """What one audit recorded."""
    events: List[Event]
    fired: Set[str]  # names of the neurons that ran
    hard_sigmoids: Set[str]  # names of neurons for the clip in a hand-written hard sigmoid, relu6(x + 3)
    depends: bool  # whether the output depends on the input
    noise: Set[str]  # modules whose random numbers differ between timesteps
    untrained: Optional[str] = None  # why training mode did not run


def run(model: nn.Module, example: Example) -> Run:
    """Audit a spiking model on an example in both modes.

    The caller restores the model (`probing.undisturbed`).

    Raises:
        Exception: Whatever the model raises in evaluation mode.
    """
    model.eval()
    seen = _pass(model, example)
    model.train()
    try:
        trained = _pass(model, example)
    except Exception as error:  # e.g. a model that requires labels or further arguments in training
        return seen._replace(untrained=f'{type(error).__name__}: {" ".join(str(error).split())[:100]}')
    return Run(seen.events + trained.events, seen.fired | trained.fired, seen.hard_sigmoids | trained.hard_sigmoids,
               seen.depends, seen.noise | trained.noise)


def _pass(model: nn.Module, example: Example) -> Run:
    """Run the model once in its current mode under the interpreter, with neurons that return their input."""
    places, fired, hard = _Places(model), set(), set()
    interpreter = Interpreter(places.now)
    detours = _Detours(interpreter, places, model)

    def fire(lif: SpikingNeuron, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        def identity(x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x] * lif.timesteps) if lif.encodes else x.clone()

        def forward(x: torch.Tensor) -> torch.Tensor:
            fired.add(name)
            meta = interpreter.taint.get(x)
            if meta is not None and meta.shift == 3 and _is_clip(lif):
                hard.add(name)
            return interpreter.neuron(identity, x)
        return forward

    for name, module in model.named_modules():
        if isinstance(module, SpikingNeuron):
            module.__dict__['forward'] = fire(module, name)
        elif isinstance(module, BatchNormOverTime):  # count it as a norm, whatever its implementation
            module.__dict__['normalise'] = _known_norm
    try:
        with places.watched(), torch.no_grad(), detours, interpreter:
            for x in example.tensors():
                interpreter.source(x)
            depends = interpreter.leaves(example(model))
    finally:
        for module in model.modules():
            if isinstance(module, SpikingNeuron):
                module.__dict__.pop('forward', None)
            elif isinstance(module, BatchNormOverTime):
                module.__dict__.pop('normalise', None)
    return Run(interpreter.events, fired, hard, depends, detours.noise)


def _known_norm(x: torch.Tensor) -> torch.Tensor:
    """Run a single operation that the interpreter knows as a norm."""
    mean, var = (torch.full((x.shape[1],), value, device=x.device, dtype=x.dtype) for value in (0., 1.))
    return F.batch_norm(x, mean, var)


def _is_clip(lif: SpikingNeuron) -> bool:
    """Return whether a neuron replaced a ReLU6."""
    replaced = lif.__dict__.get('replaced')
    return isinstance(replaced, nn.Hardtanh) and replaced.min_val == 0 and replaced.max_val == 6  # ReLU6 is a subclass


class _Places:
    """Track which module is running."""

    def __init__(self, model: nn.Module):
        self._names = {id(module): name for name, module in model.named_modules()}
        self._stack: List[Tuple[str, Optional[str]]] = [('', None)]

    def now(self) -> Tuple[str, Optional[str]]:
        """Return the path of the running module, and the class name of an unregistered module inside it (None if
        registered).
        """
        return self._stack[-1]

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Track the running module inside, by global module hooks."""
        def enter(module: nn.Module, args: Any) -> None:
            name = self._names.get(id(module))
            path = self._stack[-1][0]
            self._stack.append((path, type(module).__name__) if name is None else (name, None))

        def leave(module: nn.Module, args: Any, out: Any) -> None:
            self._stack.pop()

        handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Detours(TorchFunctionMode):
    """Function mode that records where input-dependent values leave torch, and which modules draw random numbers.

    Args:
        interpreter: The audit's interpreter.
        places: Tracker of the running module.
        model: The spiking model.
    """

    def __init__(self, interpreter: Interpreter, places: '_Places', model: nn.Module):
        super().__init__()
        self.interpreter = interpreter
        self.places = places
        self.noise: Set[str] = set()
        shared = {name: module for name, module in model.named_modules() if isinstance(module, OverTime)}
        self._functional = {name for name, module in shared.items() if calls_noise(type(module))}
        self._one_mask = shared.keys() - self._functional
        if model._calls_noise:
            self._functional.add('')

    def __torch_function__(self, func, types, args=(), kwargs=None):
        called = getattr(func, '__name__', '')
        path = self.places.now()[0]
        if ((called in _NOISE or called in _DROPOUT and _trains(args, kwargs or {})) and path not in self._one_mask
                and not (called in _DRAWN_ONCE and path in self._functional)):
            self.noise.add(path)
        name = _DETOURS.get(called)
        if name is not None and isinstance(args[0], torch.Tensor) and args[0].ndim:
            meta = self.interpreter.taint.get(args[0])
            if meta is not None:
                self.interpreter.event(f'{name} (values leave torch)', fate='unknown')
        return func(*args, **(kwargs or {}))


def _trains(args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> bool:
    """Return whether F.dropout or torch.dropout with these arguments drops anything."""
    training = args[2] if len(args) > 2 else kwargs.get('training', kwargs.get('train', True))
    return bool(training) and (args[1] if len(args) > 1 else kwargs.get('p', .5)) > 0
