"""from_nir: a spiking network from a graph of the Neuromorphic Intermediate Representation (NIR)."""
import os
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.nn as nn

from timm_sscl.conversion import convert_to_spiking
from timm_sscl.conversion.model import SpikingModule

from .extra import from_extra
from .nir_layers import read_layer
from .nir_neurons import Leaky, Refused, read_neuron

__all__ = ['NIRNetwork', 'from_nir']

_DT = 1e-4  # what snnTorch assumes, and SpikingJelly by default


class NIRNetwork(nn.Module):
    """A network that runs the nodes of a graph in order. A node takes the sum of its sources.

    Args:
        layers: Name of a node -> its module. A name with dots becomes nested modules.
        steps: (node, its sources) in the order of computation; the last is the output's source.
        source: Name of the input node.
        output: Names of the nodes whose sum is the output.
    """

    def __init__(
            self,
            layers: Dict[str, nn.Module],
            steps: List[Tuple[str, Tuple[str, ...]]],
            source: str,
            output: Tuple[str, ...],
    ):
        super().__init__()
        self._steps = steps
        self._source = source
        self._output = output
        for name, layer in layers.items():
            parent: nn.Module = self
            *path, last = name.split('.')
            for part in path:
                if part not in parent._modules:
                    _add(parent, part, nn.Module(), name)
                parent = parent.get_submodule(part)
            _add(parent, last, layer, name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = {self._source: x}
        for name, sources in self._steps:
            values[name] = self.get_submodule(name)(_sum(values, sources))
        return _sum(values, self._output)


def _add(parent: nn.Module, name: str, module: nn.Module, node: str) -> None:
    taken = not name or hasattr(parent, name) or hasattr(SpikingModule, name)
    if taken:
        raise ValueError(f"node '{node}': '{name}' cannot be the name of a module of a network; rename the node.")
    parent.add_module(name, module)


def _sum(values: Dict[str, torch.Tensor], names: Tuple[str, ...]) -> torch.Tensor:
    total = values[names[0]]
    for name in names[1:]:
        total = total + values[name]
    return total


def from_nir(
        graph: Any,
        timesteps: Optional[int] = None,
        dt: Optional[float] = None,
) -> SpikingModule:
    """Return the spiking network of a NIR graph, which `to_nir` or another tool made.

    The network has one module per node, with the node's name; its neurons are 'lif', or 'if' if they do not leak. It
    behaves like any spiking model: it takes images or event frames, runs all timesteps and returns the mean, and it can
    be trained. Different thresholds of layers become gains.

    Args:
        graph: A nir.NIRGraph, or the name of a file that nir.write wrote.
        timesteps: Number of timesteps T; by default what the graph's metadata says.
        dt: Length of a timestep in seconds; by default what the graph's metadata says, else 1e-4.

    Raises:
        ImportError: The extra `export` is not installed.
        FileNotFoundError: There is no such file.
        ValueError: The graph has a node that is not supported, several inputs or outputs, a cycle, or neurons with
            different time constants; timesteps is not known. The message names the node.
    """
    nir: Any = from_extra('nir')
    if isinstance(graph, (str, os.PathLike)):
        if not os.path.isfile(graph):
            raise FileNotFoundError(f"graph: there is no file '{os.fspath(graph)}'.")
        graph = nir.read(graph)
    if not isinstance(graph, nir.NIRGraph):
        raise ValueError(f'graph: must be a nir.NIRGraph or the name of a file, got a {type(graph).__name__}.')
    if timesteps is None and 'timesteps' not in graph.metadata:
        raise ValueError('timesteps: the graph does not say how many; give timesteps=4, for example.')
    timesteps = int(graph.metadata['timesteps']) if timesteps is None else timesteps
    dt = float(graph.metadata.get('dt', _DT)) if dt is None else dt
    source, output = _port(graph.inputs, 'input'), _port(graph.outputs, 'output')
    sources = _sources(graph, source)
    layers, neurons = _layers(graph, sources, source, dt)
    order = [name for name in _order(sources) if name not in (source, output)]
    network = NIRNetwork(layers, [(name, sources[name]) for name in order], source, sources[output])
    shape = [int(n) for n in graph.nodes[source].input_type['input']]
    dtype = next((p.dtype for p in network.parameters()), torch.float32)
    return _spiking(network, neurons, timesteps, torch.zeros(2, *shape, dtype=dtype), graph.metadata)


def _port(nodes: Dict[str, Any], what: str) -> str:
    if len(nodes) != 1:
        raise ValueError(f'the graph has {len(nodes)} {what}s ({", ".join(nodes) or "none"}); one is supported.')
    return next(iter(nodes))


def _sources(graph: Any, source: str) -> Dict[str, Tuple[str, ...]]:
    """Return the sources of every node, in the order of the edges."""
    sources: Dict[str, Tuple[str, ...]] = dict.fromkeys(graph.nodes, ())
    for before, name in graph.edges:
        sources[name] += (before,)
    for name, those in sources.items():
        if not those and name != source:
            raise ValueError(f"node '{name}' has no input.")
    return sources


def _order(sources: Dict[str, Tuple[str, ...]]) -> List[str]:
    try:
        return list(TopologicalSorter(sources).static_order())
    except CycleError as error:
        raise ValueError(f'the graph is recurrent ({" -> ".join(error.args[1])}), which is not supported.') from error


def _layers(
        graph: Any,
        sources: Dict[str, Tuple[str, ...]],
        source: str,
        dt: float,
) -> Tuple[Dict[str, nn.Module], Dict[str, Leaky]]:
    """Return the modules of all nodes, ReLUs in place of neurons, and what the neurons are."""
    layers: Dict[str, nn.Module] = {}
    neurons: Dict[str, Leaky] = {}
    for name, node in graph.nodes.items():
        kind = type(node).__name__
        if kind in ('Input', 'Output'):
            continue
        try:
            if kind in ('IF', 'LIF'):
                neurons[name], layers[name] = read_neuron(node, dt), nn.ReLU()
            else:
                shape = node.input_type['input']
                layers[name] = read_layer(node, None if shape is None else tuple(int(n) for n in shape))
        except Refused as error:
            raise ValueError(f"node '{name}' ({kind}): {error}.") from error
    if not neurons:
        raise ValueError('the graph has no neurons; IF and LIF are read.')
    return layers, neurons


def _spiking(
        network: NIRNetwork,
        neurons: Dict[str, Leaky],
        timesteps: int,
        example: torch.Tensor,
        metadata: Dict[str, Any],
) -> Any:
    """Convert a network with ReLUs in place of its neurons."""
    decays = {neuron.decay: name for name, neuron in neurons.items()}
    if len(decays) > 1:
        found = ', '.join(f'{name} {decay:.6g}' for decay, name in decays.items())
        raise ValueError(f'neurons with different decay factors per timestep ({found}); a network has one.')
    decay, = decays
    thresholds = [neuron.v_threshold for neuron in neurons.values()]
    common = float(metadata.get('v_threshold', Counter(thresholds).most_common(1)[0][0]))
    options = dict(v_threshold=common, v_reset=0.)
    options.update({} if decay == 1 else {'tau': decay})
    model: Any = convert_to_spiking(
        network, timesteps, example_inputs=example, neuron='if' if decay == 1 else 'lif', neuron_kwargs=options)
    layers = model.neurons()
    for name, neuron in neurons.items():
        gain = torch.tensor(neuron.gain * (common / neuron.v_threshold), dtype=example.dtype)
        layers[name].set_gain(None if gain == 1 else gain)
    return model
