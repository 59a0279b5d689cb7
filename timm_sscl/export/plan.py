"""Plan a deployment from one forward: which layers run in int8, and which neurons and poolings pass levels on."""
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch
import torch.nn as nn

from timm_sscl.conversion.finding.forward_trace import LINEAR
from timm_sscl.neurons import SpikingNeuron

from .int8 import Geometry
from .levels import ADD, SAME, VIEWS, Levels, Step, StepTrace, find_levels, pool_size

__all__ = ['Int8Map', 'Plan', 'make_plan']

_INT8 = {'conv2d', 'linear'}


class Int8Map(NamedTuple):
    """A module that becomes an int8 layer."""
    levels: Levels  # of its input
    geometry: Optional[Geometry]  # None for a linear map


class Plan(NamedTuple):
    """What becomes of the modules of a model, by their names."""
    maps: Dict[str, Int8Map]
    max_pools: Dict[str, Tuple[Levels, Any]]  # levels of the input, and the window
    sum_pools: Dict[str, Tuple[int, int]]  # window
    neurons: Dict[str, torch.dtype]  # what they write
    float_maps: Dict[str, str]  # convolutions and linear maps that stay, and why
    float_neurons: Dict[str, str]  # likewise


def make_plan(model: nn.Module, trace: StepTrace) -> Plan:
    """Return the plan of a model whose forward was traced."""
    return _Planner(model, trace).plan()


class _Planner:
    def __init__(self, model: nn.Module, trace: StepTrace):
        self.trace = trace
        self.modules = dict(model.named_modules())
        self.taken, self.made = find_levels(trace)
        self.steps_of: Dict[str, List[int]] = {}  # module -> its own steps
        for i, step in enumerate(trace.steps):
            self.steps_of.setdefault(step.module, []).append(i)
        self.maps: Dict[str, Int8Map] = {}
        self.float_maps: Dict[str, str] = {}
        self.max_pools: Dict[str, Tuple[Levels, Any]] = {}
        self.sum_pools: Dict[str, Tuple[int, int]] = {}

    def plan(self) -> Plan:
        for name, indices in self.steps_of.items():
            steps = [self.trace.steps[i] for i in indices]
            if any(step.name in LINEAR for step in steps):
                self._plan_map(name, indices)
            elif all(step.name == 'max_pool2d' for step in steps):
                self._plan_max_pool(name, indices)
            elif all(step.name == 'avg_pool2d' for step in steps):
                self._plan_sum_pool(name, indices)
        writes, stay = self._plan_neurons()
        return Plan(self.maps, self.max_pools, self.sum_pools, writes, self.float_maps, stay)

    # ---- maps

    def _plan_map(self, name: str, indices: List[int]) -> None:
        """Decide on a module with a convolution or linear map."""
        why = self._why_float(name, indices)
        if why is not None:
            self.float_maps[name] = why
            return
        levels = self._common_levels(indices)
        assert levels is not None  # else _why_float gives the reason
        first = self.trace.steps[indices[0]]
        self.maps[name] = Int8Map(levels, _geometry(first) if first.name == 'conv2d' else None)

    def _why_float(self, name: str, indices: List[int]) -> Optional[str]:
        module = self.modules.get(name)
        steps = [self.trace.steps[i] for i in indices]
        other = next((step.name for step in steps if step.name not in _INT8), None)
        if other is not None:
            return f'{other} has no int8 kernel here' if other in LINEAR else f'computes more than a map ({other})'
        if any(self.taken[i] is None for i in indices):
            return f'its input is not spikes: it comes from {self._origin(indices)}'
        own = {id(p) for p in module._parameters.values() if p is not None} if module is not None else set()
        for step in steps:
            weight, bias = (step.call.parameter(what) for what in ('weight', 'bias'))
            if id(weight) not in own or (bias is not None and id(bias) not in own):
                return 'its weight is computed or belongs to another module'
            if any(id(p) in self.trace.dtype_read or not set(self.trace.takers[id(p)]) <= set(indices)
                   for p in (weight, bias) if p is not None):
                return 'its weight or bias is used outside the map, too'
            if not self.trace.is_whole_module(step):
                return 'its module does more than the map'
            if step.name == 'conv2d' and _geometry(step) is None:
                return 'its padding is not given in numbers'
        levels = self._common_levels(indices)
        if levels is None or not levels.can_enter():
            return f'its input has too many levels ({levels})' if levels else 'its inputs have different units'
        if any(found is None or found.dtype != levels.dtype for found in (self.taken[i] for i in indices)):
            return 'its inputs have different signs'
        return None

    def _common_levels(self, indices: List[int]) -> Optional[Levels]:
        total = self.taken[indices[0]]
        for i in indices[1:]:
            levels = self.taken[i]
            total = total.union(levels) if total is not None and levels is not None else None
        return total

    def _origin(self, indices: List[int]) -> str:
        """Describe where the first analog input of a module's steps comes from."""
        i = next(i for i in indices if self.taken[i] is None)
        x = self.trace.steps[i].call.args[0] if self.trace.steps[i].call.args else None
        for step in reversed(self.trace.steps[:i]):
            if any(changed is x for changed in step.call.written):
                return f'{step.name} in {step.module or "the model"}, which changes it in place'
            if any(out is x for out in step.outputs()):
                if step.neuron is not None:
                    return f'{step.module}, whose output is {_output_text(step.neuron)}'
                if step.name in VIEWS or step.name in SAME or step.name == 'max_pool2d':
                    x = step.call.args[0]
                    continue
                return f'{step.name} in {step.module}' if step.module else step.name
        return 'the input of the model'

    # ---- pooling

    def _plan_max_pool(self, name: str, indices: List[int]) -> None:
        levels, window = self._common_levels(indices), _max_window(self.trace.steps[indices[0]])
        if levels is not None and window is not None and self._all_whole(indices):
            self.max_pools[name] = levels, window

    def _plan_sum_pool(self, name: str, indices: List[int]) -> None:
        outs, size = [self.made[i] for i in indices], pool_size(self.trace.steps[indices[0]])
        if size is not None and all(out is not None and out.fits() for out in outs) and self._all_whole(indices):
            self.sum_pools[name] = size

    def _all_whole(self, indices: List[int]) -> bool:
        return all(self.trace.is_whole_module(self.trace.steps[i]) for i in indices)

    # ---- neurons

    def _plan_neurons(self) -> Tuple[Dict[str, torch.dtype], Dict[str, str]]:
        """Return the dtypes of neurons that write levels, and the reasons of the others."""
        writes, stay = {}, {}
        for name, indices in self.steps_of.items():
            neuron = self.trace.steps[indices[0]].neuron
            if neuron is None:
                continue
            levels = self.made[indices[0]]
            if levels is None:
                stay[name] = f'its output is {_output_text(neuron)}'
                continue
            reasons = [self._why_values(i) for i in indices]
            why = next((reason for reason in reasons if reason is not None), None)
            if why is None:
                writes[name] = levels.dtype
            else:
                stay[name] = why
        return writes, stay

    def _why_values(self, i: int) -> Optional[str]:
        """Return why the output of step i must be values, not levels; None if levels will do."""
        levels = self.made[i]
        if levels is None or not levels.fits():
            return 'the levels do not fit into 8 bits'
        for x in self.trace.steps[i].outputs():
            takers = [j for j in self.trace.takers.get(id(x), []) if j > i]
            if not takers:
                return 'it may leave the model'
            if id(x) in self.trace.dtype_read:
                return 'its dtype is read'
            for j in takers:
                why = self._why_refused(j, x, levels)
                if why is not None:
                    return why
        return None

    def _why_refused(self, j: int, x: torch.Tensor, levels: Levels) -> Optional[str]:
        """Return why step j cannot take levels x; None if it can."""
        step = self.trace.steps[j]
        name, module = step.name, step.module
        refused = f'{name} in {module or "the model"} takes it'
        if step.changes(x):
            return f'{name} in {module or "the model"} changes it in place'
        if name in _INT8:
            return None if module in self.maps and step.call.args[0] is x else f'{module} takes it, in float32'
        if name in VIEWS or name in SAME or name == 'cat' or (
                module in (self.max_pools if name == 'max_pool2d' else self.sum_pools) and 'pool' in name):
            dtypes = {found.dtype if found else None for found in self._levels_of_inputs(j)}
            return self._why_values(j) if dtypes == {levels.dtype} else refused
        if name in ADD and levels.parts == 1 and len(step.inputs()) == 2:
            others = self._levels_of_inputs(j)
            if None in others:  # levels plus a float is a float
                return None if all(other.is_floating_point() for other in step.inputs()) else refused
            return self._why_values(j) if {found.dtype for found in others if found} == {levels.dtype} else refused
        return refused

    def _levels_of_inputs(self, j: int) -> List[Optional[Levels]]:
        """Return the levels of all tensors that step j takes."""
        found: List[Optional[Levels]] = []
        for x in self.trace.steps[j].inputs():
            made = [i for i in range(j) if any(out is x for out in self.trace.steps[i].outputs())]
            found.append(self.made[made[-1]] if made else None)
        return found


def _output_text(neuron: SpikingNeuron) -> str:
    return neuron.output_text() + ('' if neuron.scale is None else ', times a scale')


def _geometry(step: Step) -> Optional[Geometry]:
    """Return the geometry of a call of conv2d; None if its padding is named."""
    names = 'input', 'weight', 'bias', 'stride', 'padding', 'dilation', 'groups'
    given = {'stride': 1, 'padding': 0, 'dilation': 1, 'groups': 1, **dict(zip(names, step.call.args)),
             **step.call.kwargs}
    if isinstance(given['padding'], str):
        return None
    return Geometry(_two(given['stride']), _two(given['padding']), _two(given['dilation']), given['groups'])


def _max_window(step: Step) -> Optional[Any]:
    """Return the arguments of a call of max_pool2d after its input; None if it returns indices."""
    names = 'input', 'kernel_size', 'stride', 'padding', 'dilation', 'ceil_mode', 'return_indices'
    given = {'stride': None, 'padding': 0, 'dilation': 1, 'ceil_mode': False, 'return_indices': False,
             **dict(zip(names, step.call.args)), **step.call.kwargs}
    size = _two(given['kernel_size'])
    if given['return_indices']:
        return None
    stride = size if given['stride'] in (None, []) else _two(given['stride'])
    return [list(size), list(stride), list(_two(given['padding'])), list(_two(given['dilation'])), given['ceil_mode']]


def _two(value: Any) -> Tuple[int, int]:
    values = (value,) * 2 if isinstance(value, int) else tuple(value)
    return values[0], values[-1]
