"""Levels: which tensors of a forward hold whole multiples of a unit, and which range they keep."""
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Set, Tuple

import torch
import torch.nn as nn
from torch.utils._pytree import tree_leaves

from timm_sscl.conversion.finding.forward_trace import RESHAPES, Call, ForwardTrace, writes_in_place
from timm_sscl.neurons import SpikingNeuron

__all__ = ['Levels', 'Step', 'StepTrace', 'ADD', 'SAME', 'VIEWS', 'find_levels', 'pool_size']

ADD = {'add', 'add_', '__add__', '__radd__', '__iadd__'}
SAME = {'dropout', 'dropout1d', 'dropout2d', 'dropout3d', 'feature_dropout', 'alpha_dropout'}  # in evaluation mode
VIEWS = RESHAPES | {'chunk', 'split', 'unbind', 'narrow', 'select', '__getitem__', 'roll', 'flip', 'expand'}
_MAX_LEVELS = 128  # int8 products of two neighbours fit into 16 bits up to here, on a CPU without VNNI


class Levels(NamedTuple):
    """A tensor of values k / parts with whole k from `low` to `high`."""
    low: int
    high: int
    parts: int = 1

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that holds k."""
        return torch.uint8 if self.low >= 0 else torch.int8

    def fits(self) -> bool:
        """Return whether k fits into its dtype."""
        return self.high <= 255 if self.low >= 0 else self.low >= -128 and self.high <= 127

    def can_enter(self) -> bool:
        """Return whether an int8 layer can take it."""
        return self.high - min(self.low, 0) <= _MAX_LEVELS

    def union(self, other: 'Levels') -> Optional['Levels']:
        """Return the levels of either; None if their units differ."""
        if self.parts != other.parts:
            return None
        return Levels(min(self.low, other.low), max(self.high, other.high), self.parts)


class Step(NamedTuple):
    """One call of a function, or of a neuron, in the order of the forward."""
    call: Call
    module: str  # name of the innermost module that runs it
    neuron: Optional[SpikingNeuron] = None

    @property
    def name(self) -> str:
        return 'neuron' if self.neuron is not None else self.call.name

    def inputs(self) -> List[torch.Tensor]:
        """Return all tensors among the arguments."""
        return [x for x in tree_leaves((self.call.args, self.call.kwargs)) if isinstance(x, torch.Tensor)]

    def outputs(self) -> List[torch.Tensor]:
        return [x for x in tree_leaves(self.call.out) if isinstance(x, torch.Tensor)]

    def changes(self, x: torch.Tensor) -> bool:
        """Return whether the call may write to x in place."""
        return writes_in_place(self.call.name) and bool(self.call.args) and self.call.args[0] is x


class StepTrace(ForwardTrace):
    """ForwardTrace that also keeps the order of the calls and the modules that make them.

    Attributes:
        steps: All calls, in order.
        takers: id of a tensor -> indices of the steps that take it.
        runs: Name of a module -> (arguments, output) of its calls.
        dtype_read: ids of tensors whose dtype was read.
    """

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self.steps: List[Step] = []
        self.takers: Dict[int, List[int]] = {}
        self.runs: Dict[str, List[Tuple[Any, Any]]] = {}
        self.dtype_read: Set[int] = set()
        self._running = ['']
        for name, module in model.named_modules():
            module.register_forward_pre_hook(self._enter_module(name))
            module.register_forward_hook(self._leave_module(name))

    def _enter_module(self, name: str):
        def enter(module: nn.Module, args: Any) -> None:
            self._running.append(name)
        return enter

    def _leave_module(self, name: str):
        def leave(module: nn.Module, args: Any, out: Any) -> None:
            self._running.pop()
            if isinstance(module, SpikingNeuron):
                self._add_step(Step(Call(module, '', args, {}, out), name, module))
            elif not self.inside:
                self.runs.setdefault(name, []).append((args, out))
        return leave

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = super().__torch_function__(func, types, args, kwargs)
        if isinstance(out, torch.dtype) and not self.inside:
            self.dtype_read.update(id(x) for x in args if isinstance(x, torch.Tensor))
        return out

    def _record(self, call: Call) -> None:
        super()._record(call)
        self._add_step(Step(call, self._running[-1]))

    def _add_step(self, step: Step) -> None:
        for x in {id(x): x for x in step.inputs()}:
            self.takers.setdefault(x, []).append(len(self.steps))
        self.steps.append(step)

    def is_whole_module(self, step: Step) -> bool:
        """Return whether the step is all that its module does with its one input."""
        runs = [run for run in self.runs.get(step.module, []) if run[1] is step.call.out]
        return len(runs) == 1 and len(runs[0][0]) == 1 and runs[0][0][0] is step.call.args[0]


def find_levels(trace: StepTrace) -> Tuple[List[Optional[Levels]], List[Optional[Levels]]]:
    """Follow whole levels from the neurons through a forward, by what the functions do and not by values.

    Returns:
        Levels of the first argument and of the output of every step; None where they are not whole.
    """
    known: Dict[int, Levels] = {}
    taken, made = [], []
    for step in trace.steps:
        first = step.call.args[0] if step.call.args else None
        taken.append(known.get(id(first)) if isinstance(first, torch.Tensor) else None)
        levels = _levels_of(step, known)
        made.append(levels)
        for x in step.call.written:
            known.pop(id(x), None)
        for x in step.outputs():
            if levels is None:
                known.pop(id(x), None)
            else:
                known[id(x)] = levels
    return taken, made


def _levels_of(step: Step, known: Dict[int, Levels]) -> Optional[Levels]:
    """Return the levels of a step's output."""
    if step.neuron is not None:
        return _of_neuron(step.neuron)
    name = step.name
    found = [known.get(id(x)) for x in step.inputs()]
    if not found or any(levels is None for levels in found):
        return None
    levels = [each for each in found if each is not None]
    if name in VIEWS or name in SAME or name == 'max_pool2d':
        return levels[0] if len(levels) == 1 else None
    if name == 'cat':
        total = levels[0]
        for other in levels[1:]:
            union = total.union(other)
            if union is None:
                return None
            total = union
        return total
    if name in ADD and len(levels) == 2 and not step.call.kwargs and levels[0].parts == levels[1].parts:
        return Levels(levels[0].low + levels[1].low, levels[0].high + levels[1].high, levels[0].parts)
    size = pool_size(step) if name == 'avg_pool2d' else None
    if size is not None:
        n = size[0] * size[1]
        return Levels(levels[0].low * n, levels[0].high * n, levels[0].parts * n)
    return None


def _of_neuron(neuron: SpikingNeuron) -> Optional[Levels]:
    unit = neuron.unit()
    if neuron.output == 'analog' or (unit is not None and not bool((unit == 1).all())):
        return None
    return Levels(-1 if neuron.output == 'ternary' else 0, int(neuron.top))


def pool_size(step: Step) -> Optional[Tuple[int, int]]:
    """Return the size of an average pooling whose windows neither overlap nor are padded; else None."""
    names = 'input', 'kernel_size', 'stride', 'padding', 'ceil_mode', 'count_include_pad', 'divisor_override'
    given = {**dict(zip(names, step.call.args)), **step.call.kwargs}
    size = _pair(given['kernel_size'])
    stride = given.get('stride')
    stride = size if stride is None or stride == [] else _pair(stride)
    if stride != size or _pair(given.get('padding', 0)) != (0, 0) or given.get('ceil_mode') or given.get(
            'divisor_override') is not None:
        return None
    return size


def _pair(value: Any) -> Tuple[int, int]:
    values: Sequence[int] = (value,) * 2 if isinstance(value, int) else tuple(value)
    return (values[0], values[-1])
