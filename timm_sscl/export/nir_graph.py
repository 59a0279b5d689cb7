"""to_nir: a spiking network as a graph of the Neuromorphic Intermediate Representation (NIR)."""
import logging
import math
from typing import Any, Dict, List, Set, Tuple

import torch
import torch.nn as nn

from timm_sscl.conversion import fold_gains, fold_norms
from timm_sscl.untouched import untouched

from .extra import from_extra
from .inference_copy import check_images, inference_copy
from .levels import ADD, SAME, Step, StepTrace
from .nir_layers import layer_nodes
from .nir_neurons import Refused, neuron_node

__all__ = ['to_nir']

_logger = logging.getLogger(__name__)

_COPIES = {'clone', 'to', 'float', 'detach'}


@torch.no_grad()
def to_nir(model: nn.Module, images: torch.Tensor, dt: float = 1e-4) -> Any:
    """Return a spiking network as a graph of NIR, for other simulators and for neuromorphic hardware.

    The graph is one timestep of the network for one sample. A tool that reads it gives it the image, or a frame, at
    every timestep, keeps the potentials, and takes the mean of the outputs. `nir.write(file, graph)` saves it.

        lif: tau = dt / (1 - decay), r = tau / dt, v_leak = v_reset = 0, v_threshold = U_th / gain
        if:  r = 1 / dt, v_reset = 0, v_threshold = U_th / gain

    Before, norms, gains, scales and amplitudes are folded into the weights (`fold_gains`, `fold_norms`) of a copy; the
    model itself stays as it is. Networks of convolutions, linear maps, average pooling, flattening, residual sums and
    the neurons 'lif' and 'if' with a hard reset to 0 can be written. The surrogate gradient is not part of a graph.

    NIR fires at v > v_threshold, we at U >= U_th: a potential of exactly the threshold fires here only.

    Args:
        model: Spiking network.
        images: A batch in the model's input format; one sample suffices. Its size is part of the graph.
        dt: Length of a timestep in seconds. snnTorch's importer assumes 1e-4.

    Returns:
        A nir.NIRGraph. Nodes have the names of the modules. Its metadata holds timesteps, dt and v_threshold.

    Raises:
        ImportError: The extra `export` is not installed.
        ValueError: The model does not spike, the images do not fit, dt is not positive, or a part has no equal in NIR
            or in the tools that read it. The message names each such part and the reason.
    """
    nir: Any = from_extra('nir')
    if not 0 < dt < math.inf:
        raise ValueError(f'dt={dt}: must be a positive number of seconds.')
    copied = inference_copy(model, 'NIR graph')
    if hasattr(copied, 'deploy_report'):
        raise ValueError(f'{type(model).__name__} is deployed in int8; give the model that it was made of.')
    images = check_images(copied, images)
    image = images[:1, 0] if images.ndim == 5 else images[:1]
    image = image.to(next((p.dtype for p in copied.parameters() if p.dtype == torch.float64), torch.float32))
    copied = copied.to(image.dtype)
    copied.set_stem(None)
    folds: Dict[str, Dict[str, str]] = {}
    for fold in (fold_gains, fold_norms):
        fold(copied, image)
        for folded in copied._folds:
            if not folded.done:
                folds.setdefault(folded.name, {})[folded.factor] = folded.into
    with untouched(copied), StepTrace(copied) as trace:
        out = copied(image, per_step=True)
    builder = _Builder(nir, dt, folds)
    builder.add_all(trace, image, out, type(model).__name__)
    thresholds = {lif.v_threshold for lif in (neuron.as_lif() for neuron in copied.neurons().values()) if lif}
    metadata = dict(timesteps=copied.timesteps, dt=dt, v_threshold=thresholds.pop())
    graph = nir.NIRGraph(builder.nodes, builder.edges, metadata=metadata)
    _logger.info(f'{type(model).__name__}: NIR graph of {len(graph.nodes)} nodes, one timestep of {dt:g} s.')
    return graph


class _Builder:
    """Nodes and edges of a graph, added call by call.

    Args:
        nir: The package.
        dt: Length of a timestep.
        folds: Name of a layer -> factor -> why it was not folded.

    Attributes:
        nodes: Name -> node.
        edges: Pairs of names. A node with several edges takes their sum.
    """

    def __init__(self, nir: Any, dt: float, folds: Dict[str, Dict[str, str]]):
        self.nir = nir
        self.dt = dt
        self.folds = folds
        self.nodes: Dict[str, Any] = {}
        self.edges: List[Tuple[str, str]] = []
        self.sources: Dict[int, Tuple[str, ...]] = {}  # id of a tensor -> nodes whose sum it is
        self.refused: List[str] = []

    def add_all(self, trace: StepTrace, image: torch.Tensor, out: Any, model: str) -> None:
        """Add a traced forward.

        Raises:
            ValueError: A part has no equal.
        """
        if not isinstance(out, torch.Tensor):
            raise ValueError(f'{model} returns a {type(out).__name__}; a NIR graph has one output.')
        result = trace.made[id(out)].args[0]  # time folded into the batch
        first = next(step.call.out for step in trace.steps if step.name == 'cat' and step.call.args[0][0] is image)
        self.nodes['input'] = self.nir.Input({'input': _shape(first)})
        self.sources[id(first)] = ('input',)
        needed = _needed(trace.steps, result)
        for step in trace.steps:
            if needed & {id(x) for x in (*step.outputs(), *step.call.written)} and step.call.out is not first:
                self._add(step)
        ends = self.sources.get(id(result), ())
        if not self.refused and len(ends) != 1:
            self.refused.append("the output is a sum, or no layer's: an Output of NIR does not add")
        if self.refused:
            raise ValueError(f'{model} cannot be written to NIR:' + ''.join(f'\n  {text}' for text in self.refused))
        self.nodes['output'] = self.nir.Output({'output': _shape(result)})
        self.edges.append((ends[0], 'output'))

    def _add(self, step: Step) -> None:
        """Add one call, or note why it cannot be added."""
        inputs = [x for x in step.inputs() if id(x) in self.sources]
        if not inputs:
            return  # computes with parameters only
        try:
            sources = self._sources_of(step, inputs)
        except Refused as error:
            where = step.module or 'the model'
            self.refused.append(f'{where}: {error}' if step.neuron else f'{step.name} in {where}: {error}')
            sources = self.sources[id(inputs[0])]  # go on, to name further parts
        for x in step.call.written:
            self.sources.pop(id(x), None)
        for x in step.outputs():
            self.sources[id(x)] = sources

    def _sources_of(self, step: Step, inputs: List[torch.Tensor]) -> Tuple[str, ...]:
        """Return the nodes whose sum is a call's output, after adding the call's own nodes."""
        call, sources = step.call, self.sources[id(inputs[0])]
        if step.neuron is not None:
            if inputs[0].shape != call.out.shape:
                raise Refused('it pools its input by maximum, and NIR has no max pooling')
            node = neuron_node(step.neuron, tuple(call.out.shape[1:]), self.dt, self.folds.get(step.module, {}))
            return self._append(step.module, node, sources, call.out)
        if step.name in SAME | _COPIES:
            return sources
        if step.name in ADD:
            return self._sum(step, inputs)
        if len(inputs) != 1:
            raise Refused('NIR has no node for it')
        try:
            nodes = layer_nodes(call)
        except Refused as error:
            norm = self.folds.get(step.module, {}).get('norm')
            raise Refused(f'{error} ({norm})' if norm else str(error)) from None
        for i, node in enumerate(nodes):
            out = call.out if i == len(nodes) - 1 else None
            sources = self._append(step.module or step.name, node, sources, out)
        return sources

    def _sum(self, step: Step, inputs: List[torch.Tensor]) -> Tuple[str, ...]:
        args = step.call.args
        if len(args) != 2 or step.call.kwargs or len(inputs) != 2 or inputs[0].shape != inputs[1].shape:
            raise Refused('NIR adds outputs of layers of one shape, and no constants')
        sources = tuple(name for x in inputs for name in self.sources[id(x)])
        if len(set(sources)) != len(sources):
            raise Refused('it adds the output of a layer twice; NIR has no such edge')
        return sources

    def _append(self, name: str, node: Any, sources: Tuple[str, ...], out: Any) -> Tuple[str, ...]:
        """Add a node behind others, under a name that is free."""
        free, count = name, 0
        while free in self.nodes or free in ('input', 'output'):
            count += 1
            free = f'{name}_{count}'
        known = (node.output_type or {}).get('output')
        if out is not None and known is not None and list(known) != list(_shape(out)):
            raise Refused(f'NIR computes the shape {list(known)} for its output, which is {list(_shape(out))}')
        self.nodes[free] = node
        self.edges += [(source, free) for source in sources]
        return (free,)


def _shape(x: torch.Tensor) -> Any:
    return torch.tensor(x.shape[1:]).numpy()


def _needed(steps: List[Step], result: torch.Tensor) -> Set[int]:
    """Return the ids of the tensors on which a result depends."""
    needed = {id(result)}
    for step in reversed(steps):
        if needed & {id(x) for x in (*step.outputs(), *step.call.written)}:
            needed |= {id(x) for x in step.inputs()}
    return needed
