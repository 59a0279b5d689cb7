"""CallSites: separate neurons for the calls of an activation that is called several times or held by several modules.
"""
import copy
from collections import OrderedDict
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple

import torch
import torch.nn as nn

from timm_sscl.neurons import SpikingNeuron
from timm_sscl.untouched import part_of_layer, untouched

__all__ = ['CallSites', 'set_calls', 'find_calls']

_HOOKS = (
    '_forward_hooks', '_forward_hooks_with_kwargs', '_forward_hooks_always_called', '_forward_pre_hooks',
    '_forward_pre_hooks_with_kwargs', '_backward_hooks', '_backward_pre_hooks')


class CallSites(nn.ModuleList):
    """The neurons of one activation module, one per call. Calls use them in turn.

    Each forward of the parent module starts with the first, also when gradient checkpointing recomputes it.

    Args:
        neurons: Neurons in the order of the calls.
    """

    def __init__(self, neurons: Sequence[nn.Module]):
        super().__init__(neurons)
        self._next = 0

    def restart(self) -> None:
        """Start with the first neuron again."""
        self._next = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        turn = self._next
        self._next = (turn + 1) % len(self)
        return self[turn](x)


@part_of_layer
def _restart_calls(module: nn.Module, args: Tuple) -> None:
    """Forward pre-hook of a module that holds CallSites."""
    for child in module._modules.values():
        if isinstance(child, CallSites):
            child.restart()


class _Place(NamedTuple):
    """A place where a module holds a neuron."""
    name: str
    parent: nn.Module
    child_name: str

    @property
    def neuron(self) -> Any:
        """The neuron, or the CallSites with its copies."""
        return self.parent._modules[self.child_name]


def _places(model: nn.Module) -> Iterator[_Place]:
    """Yield all places of neurons. A module that has several names is visited once."""
    for prefix, parent in model.named_modules():
        if isinstance(parent, CallSites):
            continue
        for child_name, child in parent._modules.items():
            if isinstance(child, (SpikingNeuron, CallSites)):
                yield _Place(f'{prefix}.{child_name}' if prefix else child_name, parent, child_name)


def set_calls(model: nn.Module, calls: Optional[Sequence[str]]) -> None:
    """Set the number of copies of each neuron, one per call, in place.

    Args:
        model: Spiking model.
        calls: 'name:n' for each place whose neuron is a separate copy, with n calls. Places that are not listed get one
            neuron.

    Raises:
        ValueError: The model has no neuron of a name.
    """
    wanted = {name: int(n) for name, _, n in (call.rpartition(':') for call in calls or ())}
    places = {place.name: place for place in _places(model)}
    missing = sorted(set(wanted) - set(places))
    if missing:
        raise ValueError(f'calls: {type(model).__name__} has no neuron {missing[0]} to run for several calls.')
    used: Set[int] = set()
    for name, place in places.items():
        n = wanted.get(name, 1)
        if isinstance(place.neuron, CallSites) and len(place.neuron) != n:
            _merge(place)
        if name in wanted and id(place.neuron) in used:
            place.parent._modules[place.child_name] = _copy(place.neuron)
        used.add(id(place.neuron))
        if n > 1 and not isinstance(place.neuron, CallSites):
            _split(place, n)


def _split(place: _Place, n: int) -> None:
    """Replace the neuron at a place by CallSites with n copies; hooks move to the CallSites."""
    first = place.neuron
    sites = CallSites([first, *(_copy(first) for _ in range(n - 1))]).train(first.training)
    for hooks in _HOOKS:  # move the dictionaries themselves, so that the user's handles still remove their hooks
        sites.__dict__[hooks], first.__dict__[hooks] = first.__dict__[hooks], OrderedDict()
    sites._is_full_backward_hook, first._is_full_backward_hook = first._is_full_backward_hook, None
    place.parent._modules[place.child_name] = sites
    if _restart_calls not in place.parent._forward_pre_hooks.values():
        place.parent.register_forward_pre_hook(_restart_calls)


def _merge(place: _Place) -> None:
    """Replace the CallSites at a place by their first neuron; hooks move to the neuron."""
    sites, first = place.neuron, place.neuron[0]
    for hooks in _HOOKS:
        first.__dict__[hooks] = sites.__dict__[hooks]
    first._is_full_backward_hook = sites._is_full_backward_hook
    place.parent._modules[place.child_name] = first


def _copy(lif: SpikingNeuron) -> SpikingNeuron:
    """Return a copy of a neuron with the same settings and factors, without hooks."""
    twin = copy.copy(lif)
    twin._modules, twin._parameters = dict(lif._modules), dict(lif._parameters)
    twin._non_persistent_buffers_set = set(lif._non_persistent_buffers_set)
    twin._buffers = {name: None if b is None else b.clone() for name, b in lif._buffers.items()}
    for hooks in _HOOKS:
        twin.__dict__[hooks] = OrderedDict()
    twin._is_full_backward_hook = None
    return twin


def find_calls(model: nn.Module, images: torch.Tensor) -> Optional[Tuple[str, ...]]:
    """Run one forward and return the `calls` argument of `set_calls` that gives each call its own neuron; None if not
    needed.

    Calls are told apart by their order within the forward of the parent module. A neuron whose number of calls varies,
    or that runs outside its parent's forward, stays one neuron.
    """
    places = list(_places(model))
    shared: Dict[int, List[str]] = {}
    for place in places:
        shared.setdefault(id(place.neuron), []).append(place.name)
    separate = {name: 1 for names in shared.values() if len(names) > 1 for name in names}
    counts: Dict[str, List[int]] = {place.name: [] for place in places}
    with untouched(model):
        set_calls(model, [f'{name}:1' for name in separate])
        for place in places:
            seen = counts[place.name]
            place.parent.register_forward_pre_hook(lambda *_, seen=seen: seen.append(0))
            place.neuron.register_forward_hook(lambda *_, seen=seen: _count(seen))
        model(images)
    several = {name: seen[0] for name, seen in counts.items() if seen and seen[0] > 1 and len(set(seen)) == 1}
    found = {**separate, **several}
    return tuple(f'{place.name}:{found[place.name]}' for place in places if place.name in found) or None


def _count(seen: List[int]) -> None:
    if seen:
        seen[-1] += 1
