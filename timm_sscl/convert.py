"""convert_to_spiking: which modules of a model become neurons, in place, and a report of what did and did not."""
import logging
from collections import Counter
from functools import partial
from typing import Any, Callable, Dict, FrozenSet, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple, Union

import torch
import torch.nn as nn

from .activations import is_activation, is_gate, runs_functions
from .adapters import give_neuron, hidden_activation, split_over_samples, take_neuron, why_no_adapter
from .audit import Audit, audit, is_known, known_records, message
from .batch_axis import PENDING, BatchAxis, find_batch_axis
from .call_sites import CallSites, set_calls
from .functional import NEURON_NAME, calls_noise, repeats_activations, replace_functions
from .function_calls import Caller, called_by_source, give_neurons
from .fused import leave_fused_path, return_to_fused_path
from .neurons import LIF
from .policy import GROUPS, HEAD, Policy
from .spiking import SpikingModel, SpikingModule, SpikingSettings, spiking_class
from .stem_pool import has_average_stem_pool, set_stem_pool, stem_max_pool
from .stochastic import OverTime, share_mask_over_time, why_no_shared_mask
from .tdbn import scaled_batch_norms, set_norm
from .untouched import all_or_nothing

__all__ = ['convert_to_spiking', 'ConversionRecord', 'SOFT_RESET']

_logger = logging.getLogger(__name__)

SOFT_RESET = 'soft'  # v_reset=None where None cannot be passed: timm.create_model prunes it, YAML and shells lack it

_POSITION_BIAS = ({'RelPosMlp'}, {'cpb_mlp', 'meta_mlp'})  # class names, attribute names: their input has no batch axis
_KNOWN_MODELS = 'timm.', 'timm_sscl.models.'


class ConversionRecord(NamedTuple):
    """One activation that the conversion met."""
    name: str  # module name
    was: str  # class before
    now: str  # class after
    reason: str


def _neuron(settings: SpikingSettings, training: bool) -> LIF:
    lif = LIF(**settings.neuron()).train(training)
    lif.part_of_model = True
    return lif


def _replacement(module: nn.Module, settings: SpikingSettings) -> LIF:
    """The neuron that stands where an activation stood, with its hooks."""
    lif = _neuron(settings, module.training)
    # the dictionaries themselves: a handle that the user holds can still remove its hook
    for hooks in ('_forward_hooks', '_forward_hooks_with_kwargs', '_forward_hooks_always_called', '_forward_pre_hooks',
                  '_forward_pre_hooks_with_kwargs', '_backward_hooks', '_backward_pre_hooks'):
        lif.__dict__[hooks] = module.__dict__[hooks]
    lif._is_full_backward_hook = module._is_full_backward_hook
    lif.forgotten = tuple(module._parameters)
    lif.__dict__['replaced'] = module  # no submodule: a checkpoint with another policy may want it back
    return lif


def _is_position_bias(child_name: str, child: nn.Module) -> bool:
    classes, names = _POSITION_BIAS
    return type(child).__name__ in classes or child_name in names


class _Plan:
    """What a conversion would do to a model, changing nothing.

    Args:
        model: Model, converted already in part or not.
        policy: Which activations become neurons.
        found: What a probe found; without it the source of each module tells which functions it calls.
        gates: Names of activations that the audit found to be gates, and why.
    """

    def __init__(
            self,
            model: nn.Module,
            policy: Policy,
            found: Optional[BatchAxis] = None,
            gates: Optional[Dict[str, str]] = None,
    ):
        self.policy = policy
        self.found = found or BatchAxis(set(), {}, False)
        self.gates = gates or {}
        self.swaps: Dict[str, Tuple[nn.Module, str, nn.Module]] = {}  # name -> parent, child's name, activation
        self.norms: Dict[str, nn.Module] = {}  # name of the neuron -> norm that hides its activation
        self.visited: Dict[str, nn.Module] = {}  # modules that may call functions, by name
        self.callers: List[Caller] = []
        self.others: List[nn.Module] = []
        self.records: List[ConversionRecord] = []
        self._seen: Set[int] = set()  # a module registered under several names is reported once
        self._calls_functions(model, '', [])
        self._visit(model, '', [('', type(model).__name__)])

    def _visit(self, parent: nn.Module, prefix: str, around: List[Tuple[str, str]]) -> None:
        for child_name, child in parent._modules.items():
            if child is None or isinstance(child, LIF):
                continue
            name, kind, first = f'{prefix}{child_name}', type(child).__name__, id(child) not in self._seen
            self._seen.add(id(child))
            if is_activation(child):
                if self._decide(name, kind, around, 'activation', first):
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
            self.others.append(child)
            if hidden_activation(child):
                if self._decide(f'{name}.act', kind, [*around, (name, kind)], 'activation hidden in a norm', True):
                    self.norms[f'{name}.act'] = child
                continue
            if not is_gate(child):
                self._calls_functions(child, name, around)
            self._visit(child, f'{name}.', [*around, (name, kind)])

    def _calls_functions(self, module: nn.Module, name: str, around: List[Tuple[str, str]]) -> None:
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
        """Whether an activation becomes a neuron; a record is kept of either."""
        why = self.policy.why_analog(name, kind, around, gate)
        if why is None and name in self.found.unbatched:
            why = 'its input has no batch axis, stays analog'
        if why is None:
            why = self.gates.get(name)
        if first and why is not None:
            self._analog(name, kind, why)
        elif first:
            reason += f', {PENDING}' if self.found.pending else ''
            self.records.append(ConversionRecord(name, kind, 'LIF', reason))
        return why is None

    def _analog(self, name: str, kind: str, why: str) -> None:
        self.records.append(ConversionRecord(name, kind, kind, why))

    def check(self, model: nn.Module) -> None:
        """Raise where a module that stays analog runs inside one whose functions are replaced."""
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
        neurons: Dict[int, LIF] = {}  # a module registered under several names stays one module
        for parent, child_name, child in self.swaps.values():
            if id(child) not in neurons:
                neurons[id(child)] = _replacement(child, settings)
            parent._modules[child_name] = neurons[id(child)]
        for norm in self.norms.values():
            give_neuron(norm, _neuron(settings, norm.training))
        for name, module in self.visited.items():
            if name in self.found.calls:
                module.__dict__['function_calls'] = self.found.calls[name]._replace(inputs=())
        for caller in self.callers:
            give_neurons(caller, lambda: _neuron(settings, caller.module.training))
            if caller.module is not model:
                replace_functions(caller.module, settings.timesteps)
        for module in self.others:
            _share_over_time(module, settings.timesteps)
        device = next(model.parameters(), next(model.buffers(), torch.empty(0))).device
        for module in model.modules():
            leave_fused_path(module)
            if isinstance(module, LIF):
                module.keep_factors(device)


def swap_modules(model: nn.Module, settings: SpikingSettings) -> List[ConversionRecord]:
    """Swap what is not swapped yet below model, in place, and return a record for each activation met."""
    plan = _Plan(model, Policy(model, settings.include, settings.exclude))
    plan.check(model)
    plan.apply(model, settings)
    return plan.records


def current_records(model: SpikingModule, converted: Sequence[ConversionRecord]) -> List[ConversionRecord]:
    """What the activations are now, where modules were exchanged, added or removed after the conversion.

    Args:
        model: Spiking model.
        converted: The conversion's records.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    records, told = [], set()
    for record in _records_per_call(converted, modules):
        module = modules.get(record.name)
        if record.now != 'LIF':
            exists = record.name.rpartition('.')[0] in modules  # what stays analog may be no module (F.gelu)
            records += [record] if exists and not isinstance(module, LIF) else []
        elif module is not None:
            now, reason = type(module).__name__, record.reason
            if not isinstance(module, LIF):
                reason = f'replaced by {now} after the conversion'
            records.append(record._replace(now=now, reason=reason))
        told.add(record.name)
    records += [ConversionRecord(name, 'nothing', type(module).__name__, 'added after the conversion')
                for name, module in model.neurons().items() if name not in told]
    plan = _Plan(model, Policy(model, model.settings.include, model.settings.exclude))
    records += [record._replace(now=record.was, reason='added after the conversion, stays analog')
                for record in plan.records if record.now == 'LIF' and record.name not in told]
    return records


def _records_per_call(
        converted: Sequence[ConversionRecord],
        modules: Dict[str, nn.Module],
) -> Iterator[ConversionRecord]:
    """The conversion's records, those of neurons with a copy per call once per copy."""
    for record in converted:
        module = modules.get(record.name)
        if not isinstance(module, CallSites):
            yield record
            continue
        for i in range(len(module)):
            yield record._replace(
                name=f'{record.name}.{i}', reason=f'{record.reason}, call {i + 1} of {len(module)}')


def audit_records(model: SpikingModule) -> List[ConversionRecord]:
    """Nonlinear operations that stay analog besides the activations: gates by functions, and unknown ones."""
    found = known_records(model) if model._audit is None else model._audit.findings
    modules = dict(model.named_modules(remove_duplicate=False))
    return [ConversionRecord(finding.name, finding.op, finding.op, finding.reason) for finding in found
            if finding.name.removesuffix(finding.op).removesuffix('.') in modules]


def unswap_modules(model: nn.Module) -> None:
    """Put the activations back that neurons replaced below model."""
    set_calls(model, None)
    like = next(model.parameters(), torch.zeros(()))
    for module in list(model.modules()):
        module._modules.pop(NEURON_NAME, None)
        for name, child in list(module._modules.items()):
            if isinstance(child, LIF) and 'replaced' in child.__dict__:
                module._modules[name] = child.replaced.to(like.device).train(child.training)
        take_neuron(module)
        return_to_fused_path(module)


def _share_over_time(module: nn.Module, timesteps: int) -> None:
    """One dropout mask over time in this module, however it draws it, and whole samples where the batch is split."""
    share_mask_over_time(module, timesteps)
    split_over_samples(module, timesteps)
    attn_drop = getattr(module, 'attn_drop', None)
    if getattr(module, 'fused_attn', False) and getattr(attn_drop, 'p', 0):
        module.fused_attn = False  # the mask inside the fused kernel is out of reach
    if calls_noise(type(module)):
        replace_functions(module, timesteps)
    if isinstance(module, OverTime):
        module.part_of_model = True


def _refuse_unsupported(model: nn.Module) -> None:
    """Raise before anything is changed, naming the module, where a conversion would be wrong in silence."""
    if isinstance(model, SpikingModule):
        raise ValueError(f'{type(model).__name__} is a spiking model already; use set_timesteps to change T.')
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError('model is a TorchScript module, whose activations cannot be swapped; convert the eager model.')
    for name, module in model.named_modules():
        kind = type(module).__name__
        where = f"'{name}' ({kind})" if name else kind
        if isinstance(module, SpikingModule):
            raise ValueError(f'{where} is a spiking model already, and returns its mean over time to the model around '
                             f'it, which runs as it is. Convert other parts of {type(model).__name__} by themselves, '
                             f'or the whole of it before any part.')
        if hasattr(module, '_orig_mod') or module._compiled_call_impl is not None:
            raise ValueError(f'{where} is compiled; convert the model first, then compile it.')
        refused = why_no_shared_mask(module) or why_no_adapter(module)
        if refused:
            raise NotImplementedError(f'{where}: {refused}')
        if isinstance(module, nn.MultiheadAttention) and module.dropout > 0:
            raise NotImplementedError(f'{where} draws its dropout mask inside the fused kernel, another one at every '
                                      f'time step; set its dropout to 0.')
        if getattr(module, 'mix_token', False):
            raise NotImplementedError(f'{where} mixes tokens of the batch in reverse order, which would reverse time '
                                      f'as well; create it without mix_token.')


def _make_plan(
        model: nn.Module,
        policy: Policy,
        input_size: Optional[Sequence[int]],
        example_inputs: Any,
) -> _Plan:
    """The plan for a model that is not converted yet, after a probe where the model is not timm's."""
    plan = _Plan(model, policy)
    if input_size is not None or example_inputs is not None or not _is_known(model):
        activations = {name: child for name, (_, _, child) in plan.swaps.items()}
        plan = _Plan(model, policy, find_batch_axis(model, activations, plan.visited, input_size, example_inputs))
    return plan


def _check_patterns(model: nn.Module, plan: _Plan) -> None:
    """Raise where a pattern of include or exclude matches nothing."""
    for pattern in sorted(plan.policy.unused):
        if pattern not in GROUPS and pattern != HEAD:
            raise ValueError(f"include/exclude: '{pattern}' matches no activation of {_ann_name(model)}; it has "
                             f'for example {", ".join(record.name for record in plan.records[:6])}.')
        _logger.info(f"{_ann_name(model)} has no activation of the group '{pattern}'.")


def _ann_name(model: nn.Module) -> str:
    """Name of the class that a model had before its conversion."""
    return (model._spiking_bases[1] if isinstance(model, SpikingModule) else type(model)).__name__


def _is_known(model: nn.Module) -> bool:
    """Whether a model is one of timm's, of timm's and torch's modules only: what in it has no batch axis has a name."""
    packages = {type(module).__module__.partition('.')[0] for module in model.modules()}
    return type(model).__module__.startswith(_KNOWN_MODELS) and packages <= {'timm', 'timm_sscl', 'torch'}


def _explicit_settings(
        timesteps: Optional[int] = None,
        tau: Optional[float] = None,
        v_threshold: Optional[float] = None,
        v_reset: Union[float, str, None] = None,
        detach_reset: Optional[bool] = None,
        v_init: Optional[float] = None,
        include: Optional[Sequence[str]] = None,
        exclude: Optional[Sequence[str]] = None,
        stem_pool: Optional[str] = None,
        norm: Optional[str] = None,
        allow_analog: Optional[bool] = None,
) -> Dict[str, object]:
    """Only the settings that were given, as SpikingSettings takes them; 'soft' becomes v_reset=None."""
    given = dict(timesteps=timesteps, tau=tau, v_threshold=v_threshold, v_reset=v_reset, detach_reset=detach_reset,
                 v_init=v_init, include=include, exclude=exclude, stem_pool=stem_pool, norm=norm,
                 allow_analog=allow_analog)
    given = {k: v for k, v in given.items() if v is not None}
    if isinstance(v_reset, str):
        if v_reset != SOFT_RESET:
            raise ValueError(f"v_reset={v_reset!r}: must be a number, or 'soft' for the soft reset.")
        given['v_reset'] = None
    return given


_NOT_GIVEN = object()


def convert_to_spiking(
        model: nn.Module,
        timesteps: Optional[int] = None,
        tau: Optional[float] = None,
        v_threshold: Optional[float] = None,
        v_reset: Union[float, str, None] = _NOT_GIVEN,
        detach_reset: Optional[bool] = None,
        v_init: Optional[float] = None,
        include: Union[str, Sequence[str], None] = None,
        exclude: Union[str, Sequence[str], None] = None,
        input_size: Optional[Sequence[int]] = None,
        stem_pool: Optional[str] = None,
        norm: Optional[str] = None,
        example_inputs: Any = None,
        allow_analog: Optional[bool] = None,
) -> nn.Module:
    """Turn a model into a spiking network, in place: its activations become multi-step LIF neurons.

    Module names, parameters, hooks and methods stay, so the ANN's state_dict loads strictly. Time is folded into the
    batch: inside, every tensor is (T * B, ...), time-major. `model(x)` takes images (B, C, H, W) or event frames
    (B, T, C, H, W) and returns the mean over T; `model(x, per_step=True)` returns every step, (T, B, ...).

    All activations but gates (sigmoid, softmax) become neurons: modules, those hidden in a norm (EvoNorm, FRN: a group
    or response norm and a neuron), and those called as functions (`F.relu(x)`). For the latter the calling module gets a
    child named 'functional_act': the neuron of its one call, or a ModuleDict with one neuron per call, by its number.
    What has no batch axis (position biases) stays analog. `model.spiking_report()` lists what became
    of every activation.

    `include` and `exclude` choose among them by patterns (shell wildcards) on the name or class of an activation or of
    a module around it: exclude=['SqueezeExcite', 'layer4'], include=['*.mlp']. The groups 'attention' (activations in
    attention, kernels of linear attention among them), 'squeeze_excite' and 'head' (those that forward_head runs) may
    stand for patterns.

    One forward of the converted model on the example, in evaluation and in training mode, is audited: any other
    nonlinear operation between layers (torch.clamp, x * sigmoid(x), an activation made in forward) raises, unless it is
    excluded, its class is named by `register_activation`, or allow_analog is set. timm's own models are known.

    A setting that is given here wins over the one in a checkpoint loaded later; one that is not is restored from it.

    Args:
        model: Any nn.Module that works on a batch; timm models keep all their methods.
        timesteps: Time steps T, 4 by default.
        tau: Decay factor of the membrane, 0.25 by default.
        v_threshold: Firing threshold, 0.5 by default.
        v_reset: Potential after a spike, 0. by default; None or 'soft' subtracts the threshold instead.
        detach_reset: Whether the gradient skips the reset, False by default.
        v_init: Initial potential; v_reset by default (0 for the soft reset).
        include: Patterns of the activations that become neurons; all but gates by default. A gate becomes one where
            its class ('Sigmoid') or its full name is included.
        exclude: Patterns of activations that stay analog.
        input_size: Shape of one sample, (C, H, W), for a forward that shows whether axis 0 is the batch at every
            activation, and which are called as functions; guessed from the model by default. timm's own models need
            none.
        stem_pool: 'avg' pools spikes by the average in the stem of a ResNet, as the paper does, where timm has a max
            pooling; see set_stem_pool.
        norm: 'tdbn' makes every batch norm a tdBN: its scale is multiplied by v_threshold, and by 1/sqrt(2) where two
            branches add (see set_norm). Weights load as before, but mean something else: an ANN's weights under tdBN
            give currents smaller by that factor.
        example_inputs: What the model takes, for the same probe: a tensor, a tuple or list of arguments, or a dict of
            keyword arguments. Values and batch size do not matter.
        allow_analog: Whether nonlinear operations that are no known activations may stay analog, False by default; the
            report lists them as unknown.

    Returns:
        The model itself, now of a subclass of its class.

    Raises:
        ValueError: The model runs on no guessed input, or a sample moves rows of others at an activation, so that axis
            0 is not the batch there; a setting is out of range, a pattern matches nothing, the model is spiking or
            compiled already, nothing would be swapped, or a nonlinear operation is no known activation; stem_pool or
            norm are asked of a model without a max pooling in its stem, or without batch norms.
        NotImplementedError: The model holds a part whose activation cannot be swapped; the message names it.
    """
    v_reset = None if v_reset is _NOT_GIVEN else SOFT_RESET if v_reset is None else v_reset
    explicit = _explicit_settings(
        timesteps, tau, v_threshold, v_reset, detach_reset, v_init, _patterns(include), _patterns(exclude), stem_pool,
        norm, allow_analog)
    kept = {'stem_pool': 'avg'} if has_average_stem_pool(model) else {}  # set_stem_pool was called on the ANN
    settings = SpikingSettings(**{**kept, **explicit})
    _refuse_unsupported(model)
    _check_fits(model, settings)
    policy = Policy(model, settings.include, settings.exclude)
    plan = _make_plan(model, policy, input_size, example_inputs)
    inspect = None if is_known(model) else partial(
        audit, policy=policy, input_size=input_size, example_inputs=example_inputs)
    try:
        _carry_out(model, plan, settings, frozenset(explicit), inspect)
    except _HardSigmoids as found:
        plan = _Plan(model, policy, plan.found, found.reasons)
        _carry_out(model, plan, settings, frozenset(explicit), inspect)
    swapped = Counter(record.was for record in plan.records if record.now == 'LIF')
    _logger.info(f'{type(model).__name__}: {sum(swapped.values())} activations became LIF '
                 f'({", ".join(f"{n} {kind}" for kind, n in swapped.most_common())}), {settings}')
    return model


class _HardSigmoids(Exception):
    """Neurons of a plan that the audit found to be gates."""

    def __init__(self, names: FrozenSet[str]):
        super().__init__(names)
        self.reasons = dict.fromkeys(names, 'gate (hard sigmoid by hand), stays analog')


@all_or_nothing()
def _carry_out(
        model: nn.Module,
        plan: _Plan,
        settings: SpikingSettings,
        explicit: FrozenSet[str],
        inspect: Optional[Callable[..., Audit]],
) -> None:
    """Make the model spiking, and audit it; whatever is raised leaves it as it was."""
    plan.check(model)
    if not any(record.now == 'LIF' for record in plan.records):
        raise ValueError(_nothing_spikes(model, plan.records))
    plan.apply(model, settings)
    model._calls_noise = calls_noise(type(model))
    model._repeats_activations = repeats_activations(model)
    model.__class__ = spiking_class(_mixin(model), type(model))
    model.settings = settings
    model._explicit = explicit
    set_stem_pool(model, settings.stem_pool)
    set_norm(model, settings.norm, settings.v_threshold)
    model._report = plan.records
    model._audit = None if inspect is None else inspect(model, plan.records)
    if model._audit is not None and model._audit.hard_sigmoids:
        raise _HardSigmoids(model._audit.hard_sigmoids)
    _check_patterns(model, plan)
    if model._audit is not None and model._audit.unknown and not settings.allow_analog:
        raise ValueError(message(_ann_name(model), model._audit.unknown))


def _nothing_spikes(model: nn.Module, records: Sequence[ConversionRecord]) -> str:
    """Why no activation became a neuron."""
    reasons: Dict[str, List[str]] = {}
    for record in records:
        reasons.setdefault(record.reason, []).append(f'{record.name} ({record.was})')
    found = '; '.join(f'{", ".join(names[:3])}{", ..." if names[3:] else ""}: {reason}'
                      for reason, names in reasons.items())
    return f'{type(model).__name__}: nothing would spike, ' + (
        f'all activations stay analog: {found}.' if found else 'no activation found to swap.')


def _check_fits(model: nn.Module, settings: SpikingSettings) -> None:
    """Raise before anything is changed where the model lacks what a setting is about."""
    if settings.stem_pool is not None and not has_average_stem_pool(model):
        stem_max_pool(model)
    if settings.norm is not None and not scaled_batch_norms(model):
        raise ValueError(f"norm='{settings.norm}': {type(model).__name__} has no batch norm with a scale.")


def _mixin(model: nn.Module) -> type:
    """Which of a converted model's methods fold and decode."""
    return SpikingModel if hasattr(model, 'forward_features') and hasattr(model, 'forward_head') else SpikingModule


def _patterns(patterns: Union[str, Sequence[str], None]) -> Optional[Tuple[str, ...]]:
    return (patterns,) if isinstance(patterns, str) else None if patterns is None else tuple(patterns)
