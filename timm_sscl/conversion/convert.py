"""convert_to_spiking: turn a model into a spiking network in place."""
import logging
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any, Callable, Dict, FrozenSet, List, Mapping, Optional, Sequence, Tuple, Type, Union

import torch
import torch.nn as nn

from timm_sscl.class_swap import mix_in
from timm_sscl.knobs import RESETS, read_value
from timm_sscl.neurons import SpikingNeuron, neuron_name, surrogate_name
from timm_sscl.untouched import all_or_nothing

from .audit import Audit, audit, is_known, message
from .description import spiking_name
from .over_time.batch_axis import find_batch_axis
from .over_time.channels import give_channels, remember_input
from .over_time.dropout import why_no_shared_mask
from .finding.feature_activations import repeats_activations
from .finding.functional_calls import calls_noise
from .finding.hidden_activations import why_no_adapter
from .model import SpikingModel, SpikingModule
from .scales.neuron_probe import probe_neuron
from .finding.plan import ConversionRecord, Plan
from .finding.policy import GROUPS, HEAD, Policy
from .settings import SOFT_RESET, SpikingSettings, option_key
from .variants.base import Variant
from .variants.registry import variant_name
from .variants.stem_pool import has_average_stem_pool

__all__ = ['SOFT_RESET', 'convert_to_spiking']

_logger = logging.getLogger(__name__)

Neuron = Union[str, Type[SpikingNeuron], partial, None]
VariantName = Union[str, Type[Variant], partial, None]

_KNOWN_MODELS = 'timm.', 'timm_sscl.models.'


def _refuse_unsupported(model: nn.Module) -> None:
    """Raise an error that names the module if the conversion would be silently wrong. Nothing has been changed yet."""
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
        neuron: str,
        input_size: Optional[Sequence[int]],
        example_inputs: Any,
) -> Plan:
    """Return the plan for a model that is not converted yet. A model that is not timm's is probed."""
    plan = Plan(model, policy, neuron)
    if input_size is not None or example_inputs is not None or not _is_known(model):
        activations = {name: child for name, (_, _, child) in plan.swaps.items()}
        found = find_batch_axis(model, activations, plan.visited, input_size, example_inputs)
        plan = Plan(model, policy, neuron, found)
    return plan


def _check_patterns(model: nn.Module, plan: Plan) -> None:
    """Raise an error if a pattern of include or exclude matches nothing."""
    for pattern in sorted(plan.policy.unused):
        if pattern not in GROUPS and pattern != HEAD:
            raise ValueError(f"include/exclude: '{pattern}' matches no activation of {_ann_name(model)}; it has "
                             f'for example {", ".join(record.name for record in plan.records[:6])}.')
        _logger.info(f"{_ann_name(model)} has no activation of the group '{pattern}'.")


def _ann_name(model: nn.Module) -> str:
    """Return the name of the class that a model had before its conversion."""
    return (model.mixed[1] if isinstance(model, SpikingModule) else type(model)).__name__


def _is_known(model: nn.Module) -> bool:
    """Return whether a model is timm's and has only timm's and torch's modules, whose parts without a batch axis are
    known.
    """
    packages = {type(module).__module__.partition('.')[0] for module in model.modules()}
    return type(model).__module__.startswith(_KNOWN_MODELS) and packages <= {'timm', 'timm_sscl', 'torch'}


def _explicit_settings(
        neuron: Neuron,
        neuron_kwargs: Optional[Mapping[str, Any]],
        surrogate: Union[str, Callable, None],
        surrogate_kwargs: Optional[Mapping[str, Any]],
        options: Dict[str, Any],
        variants: Dict[str, Tuple[VariantName, Optional[Mapping[str, Any]]]],
        others: Dict[str, Any],
) -> Tuple[SpikingSettings, FrozenSet[str]]:
    """Return the settings that were given and their names. 'soft' becomes v_reset=None.

    Args:
        neuron: Name, class, or a partial of a class; None if not given.
        neuron_kwargs: Options of the neuron.
        surrogate: Name or function.
        surrogate_kwargs: Options of the surrogate.
        options: Options of the neuron that convert_to_spiking has arguments for; None if not given.
        variants: kind -> (name, class or partial; options).
        others: All other settings; None if not given.
    """
    options = {**{k: v for k, v in options.items() if v is not None}, **(neuron_kwargs or {})}
    named: Any = neuron
    if isinstance(neuron, partial):
        named, options = neuron.func, {**neuron.keywords, **options}
    if isinstance(options.get('v_reset'), str):
        options['v_reset'] = read_value(Optional[float], options['v_reset'], 'v_reset', words=RESETS)
    given = {k: v for k, v in others.items() if v is not None}
    given.update({} if neuron is None else {'neuron': neuron_name(named)})
    given.update({} if surrogate is None else {'surrogate': surrogate_name(surrogate)})
    given.update({} if surrogate_kwargs is None else {'surrogate_kwargs': tuple(surrogate_kwargs.items())})
    keys = {*map(option_key, options)}
    kwargs: Dict[str, Any] = {'neuron_kwargs': tuple(options.items())}
    for kind, (variant, own) in variants.items():
        named, own = variant, dict(own or {})
        if isinstance(variant, partial):
            named, own = variant.func, {**variant.keywords, **own}
        given.update({} if variant is None else {kind: variant_name(kind, named)})
        kwargs[f'{kind}_kwargs'] = tuple(own.items())
        keys.update(option_key(name, kind) for name in own)
    return SpikingSettings(**given, **kwargs), frozenset((*given, *keys))


_NOT_GIVEN: Any = object()


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
        norm: VariantName = None,
        example_inputs: Any = None,
        allow_analog: Optional[bool] = None,
        neuron: Neuron = None,
        neuron_kwargs: Optional[Mapping[str, Any]] = None,
        surrogate: Union[str, Callable, None] = None,
        surrogate_kwargs: Optional[Mapping[str, Any]] = None,
        norm_kwargs: Optional[Mapping[str, Any]] = None,
        residual: VariantName = None,
        residual_kwargs: Optional[Mapping[str, Any]] = None,
) -> nn.Module:
    """Turn a model into a spiking network in place: its activations become multi-step neurons, LIF by default.

    Module names, parameters, hooks and methods stay, so the ANN's state_dict loads strictly. Parameters of neurons and
    variants then keep their values. Time is folded into the batch: inside the model every tensor is (T * B, ...),
    time-major. `model(x)` takes images (B, C, H, W) or event frames (B, T, C, H, W) and returns the mean over T.
    `model(x, per_step=True)` returns every timestep, (T, B, ...).

    All activations except gates (sigmoid, softmax) become neurons: modules, activations inside a norm (EvoNorm, FRN:
    the module becomes a group or response norm with a neuron), and functions (`F.relu(x)`). A module that calls
    functions gets a child named 'functional_act': one neuron, or a ModuleDict with one neuron per call, named by the
    call's number. Activations whose input has no batch axis (position biases) stay analog. `model.spiking_report()`
    lists what became of every activation.

    `include` and `exclude` select activations by patterns (shell wildcards) on the name or class of the activation or
    of a module around it: exclude=['SqueezeExcite', 'layer4'], include=['*.mlp']. Three groups can be used like
    patterns: 'attention' (activations in attention, including kernels of linear attention), 'squeeze_excite', and
    'head' (activations that forward_head runs).

    One forward of the converted model in evaluation and one in training mode are audited. Any other nonlinear operation
    between layers (torch.clamp, x * sigmoid(x), an activation created in forward) raises, unless it is excluded, its
    class is registered by `register_activation`, or allow_analog is set. timm's own models are not audited again.

    A setting that is given here takes precedence over a checkpoint that is loaded later. Other settings are restored
    from the checkpoint.

    Args:
        model: Any nn.Module that works on a batch. timm models keep all their methods.
        timesteps: Number of timesteps T, 4 by default.
        tau: Decay factor of the membrane, 0.25 by default. This and the next four are options of the LIF neuron, and of
            any other neuron that has options of these names.
        v_threshold: Firing threshold, 0.5 by default.
        v_reset: Potential after a spike, 0. by default; 'soft', 'none' or None subtracts the threshold instead.
        detach_reset: Whether the gradient ignores the reset, False by default.
        v_init: Initial potential; v_reset by default (0 for the soft reset).
        include: Patterns of the activations that become neurons; all but gates by default. A gate becomes a neuron if
            its class ('Sigmoid') or its full name is included.
        exclude: Patterns of activations that stay analog.
        input_size: Shape of one sample, (C, H, W). A forward checks whether axis 0 is the batch at every activation and
            which activations are called as functions. Guessed from the model by default. timm's own models need none.
        stem_pool: 'avg' replaces the max pooling in the stem of a timm ResNet by average pooling of spikes, as in the
            paper; see set_stem_pool.
        norm: Variant that replaces batch norms: a registered name (`list_variants('norm')`), a registered class, or a
            functools.partial of one. 'tdbn' multiplies the scale of a batch norm by v_threshold, and by 1/sqrt(2) where
            two branches add (see TdBN). Weights still load but have another meaning: with an ANN's weights, currents
            are smaller by that factor.
        example_inputs: Input of the model for the same forward: a tensor, a tuple or list of arguments, or a dict of
            keyword arguments. Values and batch size do not matter.
        allow_analog: Whether unknown nonlinear operations may stay analog, False by default. The report lists them as
            unknown.
        neuron: Neuron that replaces activations: a registered name (`list_neurons()`), 'lif' by default, a registered
            class, or a functools.partial of one.
        neuron_kwargs: Options of the neuron.
        surrogate: Surrogate gradient: a registered name (`list_surrogates()`), 'rectangle' by default, or a registered
            function.
        surrogate_kwargs: Options of the surrogate.
        norm_kwargs: Options of the norm.
        residual: Variant that joins the branches of residual blocks: a name of `list_variants('residual')`, a class or
            a partial, as for norm.
        residual_kwargs: Options of the residual.

    Returns:
        The model itself, now of a subclass of its class.

    Raises:
        ValueError: A neuron, a surrogate, a variant or an option of one is unknown; a setting is out of range; a
            surrogate is not finite; a neuron's output is not what its class says; a pattern matches nothing; the model
            is already spiking or compiled; the model runs on no guessed input; axis 0 is not the batch at an
            activation; no activation would be replaced; a nonlinear operation is unknown; stem_pool, norm or residual
            is given but the model has no max pooling in its stem, no batch norms or no such blocks.
        NotImplementedError: The model has a part whose activation cannot be replaced. The message names it.
    """
    v_reset = None if v_reset is _NOT_GIVEN else SOFT_RESET if v_reset is None else v_reset
    options = dict(
        tau=tau, v_threshold=v_threshold, v_reset=v_reset, detach_reset=detach_reset, v_init=v_init)
    others = dict(
        timesteps=timesteps, include=_patterns(include), exclude=_patterns(exclude), stem_pool=stem_pool,
        allow_analog=allow_analog)
    variants = dict(norm=(norm, norm_kwargs), residual=(residual, residual_kwargs))
    settings, explicit = _explicit_settings(
        neuron, neuron_kwargs, surrogate, surrogate_kwargs, options, variants, others)
    if stem_pool is None and has_average_stem_pool(model):  # set_stem_pool was called on the ANN
        settings = replace(settings, stem_pool='avg')
    _refuse_unsupported(model)
    probe_neuron(settings)
    for variant in settings.variants().values():
        variant.check(model, settings)
    policy = Policy(model, settings.include, settings.exclude)
    neuron_class = settings.neuron_class_name
    given = dict(input_size=input_size, example_inputs=example_inputs)
    plan = _make_plan(model, policy, neuron_class, **given)
    inspect = None if is_known(model) else partial(audit, policy=policy, **given)
    try:
        _carry_out(model, plan, settings, explicit, given, inspect)
    except _HardSigmoids as found:
        plan = Plan(model, policy, neuron_class, plan.found, found.reasons)
        _carry_out(model, plan, settings, explicit, given, inspect)
    if 'architecture' in (vars(model).get('pretrained_cfg') or ()):  # timm created it, and saves it by this name
        model.pretrained_cfg['architecture'] = spiking_name(model.pretrained_cfg['architecture'])
    swapped = Counter(record.was for record in plan.records if record.becomes_neuron)
    _logger.info(f'{type(model).__name__}: {sum(swapped.values())} activations became {neuron_class} '
                 f'({", ".join(f"{n} {kind}" for kind, n in swapped.most_common())}), {settings}')
    return model


class _HardSigmoids(Exception):
    """Raised if the audit finds that neurons of a plan are gates."""

    def __init__(self, names: FrozenSet[str]):
        super().__init__(names)
        self.reasons = dict.fromkeys(names, 'gate (hard sigmoid by hand), stays analog')


@all_or_nothing()
def _carry_out(
        model: nn.Module,
        plan: Plan,
        settings: SpikingSettings,
        explicit: FrozenSet[str],
        given: Dict[str, Any],
        inspect: Optional[Callable[..., Audit]],
) -> None:
    """Make the model spiking and audit it. On an error the model is restored."""
    plan.check(model)
    if not any(record.becomes_neuron for record in plan.records):
        _check_patterns(model, plan)
        raise ValueError(_nothing_spikes(model, plan.records))
    plan.apply(model, settings)
    model._calls_noise = calls_noise(type(model))
    model._repeats_activations = repeats_activations(model)
    mix_in(model, _mixin(model))
    model.settings = settings
    model._explicit = explicit
    model._report = plan.records
    remember_input(model, **given)
    model._configure()
    give_channels(model)
    model._audit = None if inspect is None else inspect(model, plan.records)
    if model._audit is not None and model._audit.hard_sigmoids:
        raise _HardSigmoids(model._audit.hard_sigmoids)
    _check_patterns(model, plan)
    if model._audit is not None and model._audit.unknown and not settings.allow_analog:
        raise ValueError(message(_ann_name(model), model._audit.unknown))


def _nothing_spikes(model: nn.Module, records: Sequence[ConversionRecord]) -> str:
    """Return the error message for a plan in which no activation becomes a neuron."""
    reasons: Dict[str, List[str]] = {}
    for record in records:
        reasons.setdefault(record.reason, []).append(f'{record.name} ({record.was})')
    found = '; '.join(f'{", ".join(names[:3])}{", ..." if names[3:] else ""}: {reason}'
                      for reason, names in reasons.items())
    if found:
        return f'{type(model).__name__}: nothing would spike, all activations stay analog: {found}.'
    own = sorted({type(m).__name__ for m in model.modules()
                  if not any(m.children()) and type(m).__module__.split('.')[0] not in ('torch', 'timm')})
    hint = (f' Its own classes are {", ".join(own[:5])}. If one of these is an activation, register it before: '
            f'register_activation({own[0]}).' if own else '')
    return f'{type(model).__name__}: nothing would spike, no activation found to swap.{hint}'


def _mixin(model: nn.Module) -> type:
    """Return the mixin for a model: SpikingModel if it has timm's forward methods, else SpikingModule."""
    return SpikingModel if hasattr(model, 'forward_features') and hasattr(model, 'forward_head') else SpikingModule


def _patterns(patterns: Union[str, Sequence[str], None]) -> Optional[Tuple[str, ...]]:
    return (patterns,) if isinstance(patterns, str) else None if patterns is None else tuple(patterns)
