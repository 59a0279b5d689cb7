"""convert_to_spiking: which modules of a model become neurons, in place, and a report of what did and did not."""
import ast
import inspect
import logging
import re
import textwrap
from collections import Counter
from dataclasses import asdict
from functools import lru_cache
from typing import Dict, FrozenSet, List, NamedTuple, Optional, Tuple, Type, Union

import torch
import torch.nn as nn

from .neurons import LIF
from .spiking import SpikingModel, SpikingModule, SpikingSettings, spiking_class
from .stochastic import OverTime, SharedDropout, share_mask_over_time, why_no_shared_mask

__all__ = ['convert_to_spiking', 'ConversionRecord', 'SOFT_RESET']

_logger = logging.getLogger(__name__)

SOFT_RESET = 'soft'  # v_reset=None where None cannot be passed: timm.create_model prunes it, YAML and shells lack it

# by name: timm has several classes of one activation, and models with their own
_ACTIVATIONS = {
    'ReLU', 'ReLU6', 'LeakyReLU', 'PReLU', 'RReLU', 'ELU', 'SELU', 'CELU', 'GELU', 'GELUTanh', 'QuickGELU', 'SiLU',
    'Swish', 'SwishMe', 'Mish', 'MishMe', 'Hardswish', 'HardSwish', 'HardSwishMe', 'HardMish', 'HardMishMe', 'Hardtanh',
    'Tanh', 'Softplus', 'Softsign', 'StarReLU', 'SquaredReLU', 'GammaAct',
}
_GATES = {'Sigmoid', 'HardSigmoid', 'HardSigmoidMe', 'Hardsigmoid', 'LogSigmoid', 'Softmax', 'Softmax2d', 'GLU'}
_POSITION_BIAS = ({'RelPosMlp'}, {'cpb_mlp', 'meta_mlp'})  # class names, attribute names: their input has no batch axis
_HIDDEN_ACTIVATION = re.compile(r'EvoNorm2d|FilterResponseNorm')
_FUNCTIONAL = {
    'relu', 'relu_', 'relu6', 'leaky_relu', 'leaky_relu_', 'prelu', 'rrelu', 'elu', 'elu_', 'selu', 'selu_', 'celu',
    'gelu', 'silu', 'mish', 'hardswish', 'hardtanh', 'tanh', 'tanh_', 'softplus', 'softsign',
}
_FUNCTIONAL_DROPOUT = {'dropout', 'dropout_'}


class ConversionRecord(NamedTuple):
    """One activation that the conversion met."""
    name: str  # module name
    was: str  # class before
    now: str  # class after
    reason: str


def _neuron(module: nn.Module, settings: SpikingSettings) -> LIF:
    lif = LIF(**asdict(settings))
    lif.train(module.training)
    # the dictionaries themselves: a handle that the user holds can still remove its hook
    for hooks in ('_forward_hooks', '_forward_hooks_with_kwargs', '_forward_hooks_always_called', '_forward_pre_hooks',
                  '_forward_pre_hooks_with_kwargs', '_backward_hooks', '_backward_pre_hooks'):
        lif.__dict__[hooks] = module.__dict__[hooks]
    lif._is_full_backward_hook = module._is_full_backward_hook
    return lif


def _is_position_bias(child_name: str, child: nn.Module) -> bool:
    classes, names = _POSITION_BIAS
    return type(child).__name__ in classes or child_name in names


class _FunctionalDropout(OverTime):
    """Mixin for a submodule that calls F.dropout itself (DenseNet's layers): one mask over time there as well."""

    def forward(self, *args, **kwargs):
        with SharedDropout(self.timesteps):
            return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol):
        return _new_functional_dropout, (self._base,), self.__dict__


@lru_cache(maxsize=None)
def _functional_dropout_class(base: Type[nn.Module]) -> type:
    return type(base.__name__, (_FunctionalDropout, base), {'__module__': base.__module__, '_base': base})


def _new_functional_dropout(base: Type[nn.Module]) -> nn.Module:
    cls = _functional_dropout_class(base)
    return cls.__new__(cls)


def _plan(model: nn.Module) -> Tuple[List[Tuple[nn.Module, str, nn.Module]], List[nn.Module], List[ConversionRecord]]:
    """What a swap would do, changing nothing: (parent, name, activation) to replace, modules that stay, and records."""
    swaps: List[Tuple[nn.Module, str, nn.Module]] = []
    others: List[nn.Module] = []
    records: List[ConversionRecord] = []
    seen = set()  # a module registered under several names is reported once

    def visit(parent: nn.Module, prefix: str) -> None:
        for child_name, child in parent._modules.items():
            if child is None or isinstance(child, LIF):
                continue
            name, kind, first = f'{prefix}{child_name}', type(child).__name__, id(child) not in seen
            seen.add(id(child))
            if kind in _ACTIVATIONS:
                swaps.append((parent, child_name, child))
                if first:
                    records.append(ConversionRecord(name, kind, 'LIF', 'activation'))
                continue
            if _is_position_bias(child_name, child):
                if first:
                    records.append(
                        ConversionRecord(name, kind, kind, 'position bias without a batch axis, stays analog'))
                continue
            if not first:
                continue
            if kind in _GATES:
                records.append(ConversionRecord(name, kind, kind, 'gate, stays analog'))
            others.append(child)
            visit(child, f'{name}.')

    visit(model, '')
    return swaps, others, records


def swap_modules(model: nn.Module, settings: SpikingSettings) -> List[ConversionRecord]:
    """Swap what is not swapped yet below model, in place, and return a record for each activation met."""
    swaps, others, records = _plan(model)
    neurons: Dict[int, LIF] = {}  # a module registered under several names stays one module
    for parent, child_name, child in swaps:
        if id(child) not in neurons:
            neurons[id(child)] = _neuron(child, settings)
        parent._modules[child_name] = neurons[id(child)]
    for module in others:
        _share_masks(module, settings.timesteps)
    return records


def _share_masks(module: nn.Module, timesteps: int) -> None:
    """One dropout mask over time in this module, however it draws it."""
    share_mask_over_time(module, timesteps)
    attn_drop = getattr(module, 'attn_drop', None)
    if getattr(module, 'fused_attn', False) and getattr(attn_drop, 'p', 0):
        module.fused_attn = False  # the mask inside the fused kernel is out of reach
    if _calls_dropout(type(module)) and not isinstance(module, OverTime):
        module.__class__ = _functional_dropout_class(type(module))
        module.timesteps = timesteps


@lru_cache(maxsize=None)
def _called(cls: type) -> FrozenSet[str]:
    """Names of the functions that a class's methods call, other than on self, as far as its source is to be had.

    `self.act(x)` calls a module, which the swap reaches; `F.relu(x)`, `relu(x)` and `x.relu()` it does not reach.
    """
    names = set()
    for base in cls.__mro__:
        if base.__module__.startswith('torch.') or base.__module__ == 'builtins':
            continue
        for name, method in vars(base).items():
            if name == '__init__' or not inspect.isfunction(method):
                continue
            try:
                tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
            except (OSError, TypeError, SyntaxError):
                continue
            names.update(filter(None, map(_function_name, ast.walk(tree))))
    return frozenset(names)


def _function_name(node: ast.AST) -> Optional[str]:
    if not isinstance(node, ast.Call):
        return None
    if isinstance(node.func, ast.Name):
        return node.func.id
    root = node.func
    while isinstance(root, (ast.Attribute, ast.Subscript)):
        root = root.value
    is_own = isinstance(root, ast.Name) and root.id == 'self'
    return node.func.attr if isinstance(node.func, ast.Attribute) and not is_own else None


def _functional_activation(module: nn.Module) -> Optional[str]:
    """An activation that a module calls as a function or holds as one, or None."""
    called = sorted(_called(type(module)) & _FUNCTIONAL)
    held = [name for name, value in vars(module).items()
            if callable(value) and not isinstance(value, nn.Module) and getattr(value, '__name__', '') in _FUNCTIONAL]
    return (called + held + [None])[0]


def _calls_dropout(cls: type) -> bool:
    return bool(_called(cls) & _FUNCTIONAL_DROPOUT)


def _refuse_unsupported(model: nn.Module) -> None:
    """Raise before anything is changed, naming the module, where an activation would stay real-valued in silence."""
    if isinstance(model, SpikingModule):
        raise ValueError(f'{type(model).__name__} is a spiking model already; use set_timesteps to change T.')
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError('model is a TorchScript module, whose activations cannot be swapped; convert the eager model.')
    for name, module in model.named_modules():
        kind = type(module).__name__
        where = f"'{name}' ({kind})" if name else kind
        if hasattr(module, '_orig_mod') or module._compiled_call_impl is not None:
            raise ValueError(f'{where} is compiled; convert the model first, then compile it.')
        if _HIDDEN_ACTIVATION.search(kind):
            raise NotImplementedError(f'{where} hides its activation inside the norm; such models (EvoNorm, FRN) '
                                      f'cannot be converted yet.')
        if kind == 'SplitBatchNorm2d':
            raise NotImplementedError(f'{where} would split time steps instead of samples; convert before or without '
                                      f'split batch norm.')
        refused = why_no_shared_mask(module)
        if refused:
            raise NotImplementedError(f'{where}: {refused}')
        if isinstance(module, nn.MultiheadAttention) and module.dropout > 0:
            raise NotImplementedError(f'{where} draws its dropout mask inside the fused kernel, another one at every '
                                      f'time step; set its dropout to 0.')
        if getattr(module, 'mix_token', False):
            raise NotImplementedError(f'{where} mixes tokens of the batch in reverse order, which would reverse time as '
                                      f'well; create it without mix_token.')
        if isinstance(module, nn.RNNBase):
            raise NotImplementedError(f'{where} is recurrent, with activations inside that cannot be swapped.')
        function = _functional_activation(module) if kind not in _ACTIVATIONS and kind not in _GATES else None
        if function:
            raise NotImplementedError(f'{where} calls the function {function}, where no module can be swapped; make '
                                      f'the activation a module (self.act = nn.ReLU()) to convert it.')


def _explicit_settings(
        timesteps: Optional[int] = None,
        tau: Optional[float] = None,
        v_threshold: Optional[float] = None,
        v_reset: Union[float, str, None] = None,
        detach_reset: Optional[bool] = None,
) -> Dict[str, object]:
    """Only the settings that were given, as SpikingSettings takes them; 'soft' becomes v_reset=None."""
    given = dict(timesteps=timesteps, tau=tau, v_threshold=v_threshold, v_reset=v_reset, detach_reset=detach_reset)
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
) -> nn.Module:
    """Turn a model into a spiking network, in place: its activations become multi-step LIF neurons.

    Module names, parameters, hooks and methods stay, so the ANN's state_dict loads strictly. Time is folded into the
    batch: inside, every tensor is (T * B, ...), time-major. `model(x)` takes images (B, C, H, W) or event frames
    (B, T, C, H, W) and returns the mean over T; `model(x, per_step=True)` returns every step, (T, B, ...). Gates
    (sigmoid, softmax) stay analog. `model.spiking_report()` lists what became of every activation.

    A setting that is given here wins over the one in a checkpoint loaded later; one that is not is restored from it.

    Args:
        model: Any nn.Module that works on a batch; timm models keep all their methods.
        timesteps: Time steps T, 4 by default.
        tau: Decay factor of the membrane, 0.25 by default.
        v_threshold: Firing threshold, 0.5 by default.
        v_reset: Potential after a spike, 0. by default; None or 'soft' subtracts the threshold instead.
        detach_reset: Whether the gradient skips the reset, False by default.

    Returns:
        The model itself, now of a subclass of its class.

    Raises:
        ValueError: A setting is out of range, the model is spiking or compiled already, or nothing was swapped.
        NotImplementedError: The model holds a part whose activation cannot be swapped; the message names it.
    """
    v_reset = None if v_reset is _NOT_GIVEN else SOFT_RESET if v_reset is None else v_reset
    explicit = _explicit_settings(timesteps, tau, v_threshold, v_reset, detach_reset)
    settings = SpikingSettings(**explicit)
    _refuse_unsupported(model)
    swapped = Counter(record.was for record in _plan(model)[2] if record.now == 'LIF')
    if not swapped:
        raise ValueError(f'{type(model).__name__}: no activation found to swap, so nothing would spike.')

    records = swap_modules(model, settings)
    model._calls_dropout = _calls_dropout(type(model))
    is_timm_model = hasattr(model, 'forward_features') and hasattr(model, 'forward_head')
    model.__class__ = spiking_class(SpikingModel if is_timm_model else SpikingModule, type(model))
    model.settings = settings
    model._explicit = frozenset(explicit)
    model._report = records
    _logger.info(f'{type(model).__name__}: {sum(swapped.values())} activations became LIF '
                 f'({", ".join(f"{n} {kind}" for kind, n in swapped.most_common())}), {settings}')
    return model
