"""ForwardTrace: record one forward as a graph, in which neurons and norm variants are single nodes."""
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import torch
import torch.nn as nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from timm_sscl.neurons import SpikingNeuron

from ..variants.batch_norms import BatchNormOverTime

__all__ = ['ForwardTrace', 'Call', 'AFFINE', 'LINEAR', 'RESHAPES', 'POOLS', 'NORM',
           'writes_in_place']

NORM = 'batch_norm_over_time'  # name of the call of a norm variant
# function -> positions of weight and bias among its arguments; its output scales with both
AFFINE = {'conv1d': (1, 2), 'conv2d': (1, 2), 'conv3d': (1, 2), 'linear': (1, 2), 'batch_norm': (3, 4),
          'layer_norm': (2, 3), 'group_norm': (2, 3), NORM: (1, 2)}
LINEAR = {'conv1d', 'conv2d', 'conv3d', 'linear'}
RESHAPES = {'permute', 'transpose', 'reshape', 'view', 'flatten', 'unflatten', 'contiguous', 'movedim', 'squeeze',
            'unsqueeze'}
POOLS = {'max_pool2d', 'avg_pool2d', 'adaptive_avg_pool2d', 'adaptive_max_pool2d'}  # commute with a positive scale


class Call(NamedTuple):
    """One call of a function in a forward."""
    func: Any
    name: str  # name of the function
    args: Tuple[Any, ...]
    kwargs: Dict[str, Any]
    out: Any
    written: Tuple[torch.Tensor, ...] = ()  # earlier tensors that share the memory which the call wrote to

    def parameter(self, what: str) -> Any:
        """Return the weight or bias argument of the call."""
        position = AFFINE[self.name][what == 'bias']
        return self.kwargs.get(what, self.args[position] if len(self.args) > position else None)


class ForwardTrace(TorchFunctionMode):
    """Function mode that records which call made each tensor and which calls used it.

    It hooks the model's modules; create it inside `untouched(model)`.

    Args:
        model: Spiking model.

    Attributes:
        made: Call that made a tensor, by the tensor's id.
        taken: Calls, and names of neurons, that used a tensor, by its id.
        neurons: Input and output of every call of a neuron, by its name.
        norms: Calls of batch norms by the id of their weight.

    A call that writes in place, also through a view or by indices, counts as one that uses every tensor in that memory.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.made: Dict[int, Call] = {}
        self.taken: Dict[int, List[Any]] = {}
        self.neurons: Dict[str, List[Tuple[torch.Tensor, torch.Tensor]]] = {}
        self.norms: Dict[int, List[Call]] = {}
        self._memory: Dict[int, Dict[int, torch.Tensor]] = {}  # address of a storage -> tensors in it, by id
        self.inside = 0  # depth of running neurons and norm variants
        for name, module in model.named_modules():
            if isinstance(module, SpikingNeuron):
                module.register_forward_pre_hook(self._enter)
                module.register_forward_hook(self._leave(name))
            elif isinstance(module, BatchNormOverTime):
                module.__dict__['normalise'] = self._as_one_call(module, module.normalise)

    def _enter(self, neuron: SpikingNeuron, args: Tuple[torch.Tensor]) -> None:
        self.inside += 1

    def _leave(self, name: str) -> Callable:
        def leave(neuron: SpikingNeuron, args: Tuple[torch.Tensor], out: torch.Tensor) -> None:
            self.inside -= 1
            self.taken.setdefault(id(args[0]), []).append(name)
            self.neurons.setdefault(name, []).append((args[0], out))
        return leave

    def _as_one_call(self, norm: BatchNormOverTime, normalise: Callable) -> Callable:
        def traced(x: torch.Tensor) -> torch.Tensor:
            self.inside += 1
            out = normalise(x)
            self.inside -= 1
            self._record(Call(normalise, NORM, (x, norm.weight, norm.bias), {}, out))
            return out
        return traced

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.inside:
            return func(*args, **kwargs)
        taken = _tensors((args, kwargs))
        versions = [_version(x) for x in taken]
        out = func(*args, **kwargs)
        made = _tensors(out)
        name = getattr(func, '__name__', '')
        written = [x for x, version in zip(taken, versions) if _version(x) != version
                   or (x.is_inference() and x is args[0] and writes_in_place(name))]
        if made or written:
            for x in (*taken, *made):
                self._memory.setdefault(_address(x), {})[id(x)] = x
            shared = {key: x for each in written for key, x in self._memory[_address(each)].items()}
            self._record(Call(func, name, args, kwargs, out, tuple(shared.values())))
        return out

    def _record(self, call: Call) -> None:
        """Add a call, which keeps its tensors alive, so that ids stay unique."""
        taken = _tensors((call.args, call.kwargs))
        known = {id(x) for x in taken}
        for x in (*taken, *(x for x in call.written if id(x) not in known and x is not call.out)):
            self.taken.setdefault(id(x), []).append(call)
        if isinstance(call.out, torch.Tensor):
            self.made[id(call.out)] = call
        if call.name in ('batch_norm', NORM):
            self.norms.setdefault(id(call.parameter('weight')), []).append(call)


def _tensors(tree: Any) -> List[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _version(x: torch.Tensor) -> Optional[int]:
    """Return the number of writes to a tensor's memory; None if it was made in inference mode, which does not count."""
    return None if x.is_inference() else x._version


def writes_in_place(name: str) -> bool:
    """Return whether a function of this name writes to its first argument."""
    return (name.endswith('_') and not name.endswith('__')) or name.startswith('__i') or name == '__setitem__'


def _address(x: torch.Tensor) -> int:
    """Return the address of a tensor's memory; its own id if it has none."""
    return x.untyped_storage().data_ptr() or id(x)
