"""Tell neurons with parameters per channel the number and axis of their layer's channels, found by one forward."""
from typing import Any, Dict, Optional, Sequence, Set, Tuple

import torch
import torch.nn as nn
from torch.utils._pytree import tree_map

from timm_sscl.features.channel_axis import ChannelAxes
from timm_sscl.neurons import SpikingNeuron
from timm_sscl.probing import Example, ProbeError, probe

__all__ = ['give_channels', 'find_channels', 'remember_input']

_Shape = Tuple[int, ...]


def remember_input(model: nn.Module, input_size: Optional[Sequence[int]], example_inputs: Any) -> None:
    """Store what a model takes, as given to its conversion, for later probes: shapes and dtypes, no values."""
    def shape_only(leaf: Any) -> Any:
        return leaf.new_zeros(()).expand(leaf.shape) if isinstance(leaf, torch.Tensor) else leaf

    model.__dict__['_known_input'] = dict(input_size=input_size, example_inputs=tree_map(shape_only, example_inputs))


def _known_input(model: nn.Module) -> Dict[str, Any]:
    known = vars(model).get('_known_input', {})
    return tree_map(lambda leaf: leaf.contiguous() if isinstance(leaf, torch.Tensor) else leaf, known)


def give_channels(model: nn.Module) -> None:
    """Create the parameters of a spiking model's neurons with parameters per channel whose channels are not set yet.

    Raises:
        ValueError: A layer did not run, runs on different numbers of channels, or its channel axis is unknown.
    """
    waiting = {name: neuron for name, neuron in model.neurons().items()
               if neuron.needs_channels and neuron.channels is None}
    if not waiting:
        return
    kind = type(next(iter(waiting.values()))).__name__
    for name, shape in find_channels(model, waiting, kind).items():
        neuron = waiting[name]
        neuron.set_channels(shape)
        like = next(p for p in model.parameters() if p.is_floating_point())
        neuron.to(device=like.device, dtype=like.dtype)


def find_channels(
        model: nn.Module,
        neurons: Dict[str, SpikingNeuron],
        what: str,
) -> Dict[str, _Shape]:
    """Return the shape of parameters per channel for neurons of a model: (C, 1, 1) for maps and (C,) for tokens.

    A forward shows it, on the input that was given to the conversion (see `remember_input`) or a guessed one.

    Args:
        model: Spiking model.
        neurons: Some of its neurons, by name.
        what: Name of what has parameters per channel, for messages.

    Raises:
        ValueError: A layer did not run, runs on different numbers of channels, or its channel axis is unknown.
    """
    try:
        seen = probe(model, lambda example: _run(model, neurons, example), 2, **_known_input(model))
    except ProbeError as error:
        raise ProbeError(f'{what} has parameters per channel, and {type(model).__name__} was run to see how many there '
                         f'are: {error}') from error
    found: Dict[str, _Shape] = {}
    for name in neurons:
        shapes = seen.get(name, set())
        shape = next(iter(shapes)) if len(shapes) == 1 else None
        if shape is None:
            raise ValueError(f'{what} has parameters per channel, but {name} {_why(shapes)}. exclude={name!r} leaves '
                             f'it analog; other neurons have parameters per layer, or none.')
        found[name] = shape
    return found


def _why(shapes: Set[Optional[_Shape]]) -> str:
    """Return why the channels of a neuron are unknown."""
    if not shapes:
        return 'did not run in a forward'
    if None in shapes:
        return 'has an input of which the axis of the channels is not known'
    widths = sorted(shape[0] for shape in shapes if shape is not None)
    return f'runs on inputs of {" and ".join(map(str, widths))} channels'


def _run(model: nn.Module, neurons: Dict[str, SpikingNeuron], example: Example) -> Dict[str, Set[Optional[_Shape]]]:
    """Return the parameter shapes of all calls of every neuron; None for an unknown channel axis. Neurons return their
    input.
    """
    seen: Dict[str, Set[Optional[_Shape]]] = {}
    axes = ChannelAxes()
    for name, neuron in neurons.items():
        def note(x: torch.Tensor, name: str = name) -> torch.Tensor:
            axis = axes.known_axis(x)
            shape = None if axis is None else (x.shape[axis], *(1,) * (x.ndim - 1 - axis))
            seen.setdefault(name, set()).add(shape)
            return x
        neuron.__dict__['forward'] = note
    with axes:
        example(model)
    return seen
