"""Plan a conversion: which activations become neurons, which stay analog, and why."""
from functools import partial
from typing import Dict, List, NamedTuple, Optional, Set, Tuple

import torch
import torch.nn as nn

from timm_sscl.neurons import SpikingNeuron

from .activations import is_activation, is_gate, refuse_weights, runs_functions
from ..over_time.batch_axis import PENDING, BatchAxis
from ..over_time.dropout import OverTime, share_mask_over_time
from .function_calls import Caller, called_by_source, give_neurons
from .feature_activations import repeats_activations
from .functional_calls import NEURON_NAME, calls_noise, replace_functions
from ..over_time.fused import leave_fused_path
from .hidden_activations import give_neuron, hidden_activation, split_over_samples
from .policy import Policy
from ..settings import SpikingSettings

__all__ = ['ConversionRecord', 'new_neuron', 'Plan', 'share_over_time']

# class names, attribute names; the input of these modules has no batch axis
_POSITION_BIAS = ({'RelPosMlp'}, {'cpb_mlp', 'meta_mlp'})


class ConversionRecord(NamedTuple):
    """One activation and what the conversion did with it."""
    name: str  # module name
    was: str  # class name before
    now: str  # class name after
    reason: str

    @property
    def becomes_neuron(self) -> bool:
        """Whether the conversion replaced it by a neuron."""
        return self.now != self.was


def new_neuron(settings: SpikingSettings, training: bool, like: torch.Tensor) -> SpikingNeuron:
    """Create a neuron for a converted model. Its parameters get the device and dtype of the tensor `like`."""
    neuron = settings.new_neuron().train(training)
    neuron.part_of_model = True
    return neuron.to(device=like.device, dtype=like.dtype if like.is_floating_point() else None)


def _replacement(module: nn.Module, settings: SpikingSettings, like: torch.Tensor) -> SpikingNeuron:
    """Create the neuron that replaces an activation module, with the module's hooks."""
    lif = new_neuron(settings, module.training, like)
    # share the dictionaries themselves, so that the user's handles still remove their hooks
    for hooks in ('_forward_hooks', '_forward_hooks_with_kwargs', '_forward_hooks_always_called', '_forward_pre_hooks',
                  '_forward_pre_hooks_with_kwargs', '_backward_hooks', '_backward_pre_hooks'):
        lif.__dict__[hooks] = module.__dict__[hooks]
    lif._is_full_backward_hook = module._is_full_backward_hook
    lif.forgotten = tuple(module._parameters)
    # not registered as a submodule; needed if a checkpoint with another policy restores it
    lif.__dict__['replaced'] = module
    return lif


def _is_position_bias(child_name: str, child: nn.Module) -> bool:
    classes, names = _POSITION_BIAS
    return type(child).__name__ in classes or child_name in names


class Plan:
    """Plan of a conversion. Creating it does not change the model.

    Args:
        model: Model, possibly converted in part.
        policy: Which activations become neurons.
        neuron: Class name of the neurons, for the records.
        found: Result of a probe. Without it, the source of each module determines which functions it calls.
        gates: Activations that the audit found to be gates: name -> reason.
    """

    def __init__(
            self,
            model: nn.Module,
            policy: Policy,
            neuron: str,
            found: Optional[BatchAxis] = None,
            gates: Optional[Dict[str, str]] = None,
    ):
        self.policy = policy
        self.neuron = neuron
        self.found = found or BatchAxis(set(), {}, False)
        self.gates = gates or {}
        self.swaps: Dict[str, Tuple[nn.Module, str, nn.Module]] = {}  # name -> (parent, child name, activation)
        self.norms: Dict[str, nn.Module] = {}  # name of the neuron -> norm with an activation inside
        self.visited: Dict[str, nn.Module] = {}  # name -> module that may call functions
        self.callers: List[Caller] = []
        self.passive_modules: List[nn.Module] = []
        self.records: List[ConversionRecord] = []
        self._visited_ids: Set[int] = set()  # a module with several names is recorded once
        self._calls_functions(model, '', [])
        self._visit(model, '', [('', type(model).__name__)])

    def _visit(self, parent: nn.Module, prefix: str, around: List[Tuple[str, str]]) -> None:
        """Plan the children of a module. `around` lists (name, class name) of all modules around them."""
        for child_name, child in parent._modules.items():
            if child is None or isinstance(child, SpikingNeuron):
                continue
            name, kind, first = f'{prefix}{child_name}', type(child).__name__, id(child) not in self._visited_ids
            self._visited_ids.add(id(child))
            if is_activation(child):
                if self._decide(name, kind, around, 'activation', first):
                    refuse_weights(name, child)
                    self.swaps[name] = parent, child_name, child
                continue
            if _is_position_bias(child_name, child):
                if first:
                    self._analog(name, kind, 'position bias without a batch axis, stays analog')
                continue
            if not first:
                continue
            if is_gate(child) and self._decide(name, kind, around, 'gate, included by name', first, gate=True):
                self.swaps[name] = parent, child_name, child
                continue
            if isinstance(child, (nn.RNNBase, nn.RNNCellBase)):
                self._analog(name, kind, 'recurrent layer, its gates and activations stay analog')
            self.passive_modules.append(child)
            if hidden_activation(child):
                if self._decide(f'{name}.act', kind, [*around, (name, kind)], 'activation hidden in a norm', True):
                    self.norms[f'{name}.act'] = child
                continue
            if not is_gate(child):
                self._calls_functions(child, name, around)
            self._visit(child, f'{name}.', [*around, (name, kind)])

    def _calls_functions(self, module: nn.Module, name: str, around: List[Tuple[str, str]]) -> None:
        """Plan the activations that a module calls as functions."""
        if NEURON_NAME in module._modules or repeats_activations(module):
            return
        self.visited[name] = module
        called = self.found.calls.get(name) or vars(module).get('function_calls') or called_by_source(module, name)
        inside = [*around, (name, type(module).__name__)]
        neurons = [neuron for neuron, function in zip(called.names, called.functions)
                   if self._decide(neuron, function, inside, 'called as a function', True)]
        if neurons:
            self.callers.append(Caller(name, module, called, neurons))

    def _decide(
            self,
            name: str,
            kind: str,
            around: List[Tuple[str, str]],
            reason: str,
            first: bool,
            gate: bool = False,
    ) -> bool:
        """Return whether an activation becomes a neuron, and add a record.

        Args:
            name: Name of the activation.
            kind: Its class name.
            around: (name, class name) of the modules around it.
            reason: Reason in the record if it becomes a neuron.
            first: Whether the activation is met for the first time; only then it is recorded.
            gate: Whether it is a gate.
        """
        why = self.policy.why_analog(name, kind, around, gate)
        if why is None and name in self.found.unbatched:
            why = 'its input has no batch axis, stays analog'
        if why is None:
            why = self.gates.get(name)
        if first and why is not None:
            self._analog(name, kind, why)
        elif first:
            reason += f', {PENDING}' if self.found.pending else ''
            self.records.append(ConversionRecord(name, kind, self.neuron, reason))
        return why is None

    def _analog(self, name: str, kind: str, why: str) -> None:
        """Record an activation that stays analog."""
        self.records.append(ConversionRecord(name, kind, kind, why))

    def check(self, model: nn.Module) -> None:
        """Raise an error if a module that stays analog runs inside a module whose functions are replaced."""
        modules = dict(model.named_modules(remove_duplicate=False))
        for caller in self.callers:
            prefix = f'{caller.name}.' if caller.name else ''
            for record in self.records:
                inner = modules.get(record.name)
                if (record.now == record.was and inner is not None and runs_functions(inner)
                        and record.name.startswith(prefix)):
                    raise NotImplementedError(
                        f"'{caller.name or type(model).__name__}' calls activations as functions and holds "
                        f"'{record.name}' ({record.was}), which is to stay analog; exclude both, or make the "
                        f'activation a module (self.act = nn.ReLU()).')

    def apply(self, model: nn.Module, settings: SpikingSettings) -> None:
        """Carry out the plan on the model, in place."""
        like = next(model.parameters(), next(model.buffers(), torch.empty(0)))
        neurons: Dict[int, SpikingNeuron] = {}  # a module with several names is replaced by one neuron
        for parent, child_name, child in self.swaps.values():
            if id(child) not in neurons:
                neurons[id(child)] = _replacement(child, settings, like)
            parent._modules[child_name] = neurons[id(child)]
        for norm in self.norms.values():
            give_neuron(norm, new_neuron(settings, norm.training, like))
        for name, module in self.visited.items():
            if name in self.found.calls:
                module.__dict__['function_calls'] = self.found.calls[name]._replace(inputs=())
        for caller in self.callers:
            give_neurons(caller, partial(new_neuron, settings, caller.module.training, like))
            if caller.module is not model:
                replace_functions(caller.module, settings.timesteps)
        for module in self.passive_modules:
            share_over_time(module, settings.timesteps)
        for module in model.modules():
            leave_fused_path(module)
            if isinstance(module, SpikingNeuron):
                module.keep_factors(like)


def share_over_time(module: nn.Module, timesteps: int) -> None:
    """Give a module one dropout mask over time, and let a split batch norm split whole samples, in place."""
    share_mask_over_time(module, timesteps)
    split_over_samples(module, timesteps)
    attn_drop = getattr(module, 'attn_drop', None)
    if getattr(module, 'fused_attn', False) and getattr(attn_drop, 'p', 0):
        module.fused_attn = False  # the fused kernel would draw its own mask per timestep
    if calls_noise(type(module)):
        replace_functions(module, timesteps)
    if isinstance(module, OverTime):
        module.part_of_model = True
