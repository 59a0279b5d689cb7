"""Mixins of a converted model: fold the input over time, decode the output, change settings.

A converted model is an instance of a subclass of its own class: `(SpikingModel, Base)` if Base has timm's
forward_features and forward_head, else `(SpikingModule, Base)`. Inside, every tensor is (T * B, ...).
"""
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Set, Tuple, Type

import torch
import torch.fx
import torch.nn as nn
from torch.utils._pytree import tree_map

from .finding.call_sites import set_calls
from .over_time.channels import give_channels
from .over_time.decoding import check_folded, decode
from .over_time.model_input import check_rank, encode_input
from .finding.feature_activations import feature_neuron, fires_features, pruning_methods
from .finding.functional_calls import NEURON_NAME, FunctionsOverTime, methods_inside_only, number_of_calls
from timm_sscl.class_swap import Mixin, TimmMixin, new_mixed
from timm_sscl.neurons import SpikingNeuron, neuron_class
from timm_sscl.neurons.folding import enter_fold, folding_model, leave_fold
from timm_sscl.untouched import undone_on_error
from .finding.notrace import functions_as_nodes
from .from_ann.pool_first import set_pool_first
from .report import SpikingReport, make_report
from .settings import SETTINGS_KEY, SpikingSettings
from .state import SpikingState
from .variants.registry import KINDS
from .finding.swap import audit_records, current_records, swap_modules, unswap_modules
from .over_time.dropout import OverTime

__all__ = [
    'SpikingSettings', 'SpikingModule', 'SpikingModel', 'SpikingEncoder', 'SETTINGS_KEY', 'encode_input', 'decode']


def fold_traced_input(x: Any, timesteps: int, stem: Optional[str], args: Sequence[Any], kwargs: Dict[str, Any]) -> Any:
    """`encode_input` as one node of a torch.fx graph. `neurons.folding` looks for this node.

    Raises:
        TypeError: The graph is called with further arguments, for which it was not traced.
    """
    if args or kwargs:
        raise TypeError(f'a traced spiking model takes images and per_step, and no further arguments; got {len(args)} '
                        f'more and {", ".join(kwargs) or "none"} by name.')
    return encode_input(x, timesteps, stem)


fold_traced_input.__dict__['folds_time'] = True


_new_spiking = new_mixed  # its name in pickles of version 0.1.0


def _given(x: Any, args: Tuple[Any, ...]) -> Tuple[Any, ...]:
    """Return the positional arguments of a call whose first argument x may be given by name."""
    return args if x is None else (x, *args)


class SpikingModule(SpikingState, Mixin):
    """Mixin for a converted model that is called as a whole: features_only wrappers, encoders, plain nn.Modules."""
    _calls_noise: bool  # whether its own methods call F.dropout or torch.rand
    _repeats_activations: bool  # see feature_activations
    _features_pruned = False
    _drives: Sequence[Any] = ()  # result of calibrate
    _folds: Sequence[Any] = ()  # result of fold_gains

    @classmethod
    def class_name(cls, base: Type[nn.Module]) -> str:
        return f'Spiking{base.__name__}'

    @classmethod
    def class_attributes(cls, base: Type[nn.Module]) -> Dict[str, Any]:
        return {**methods_inside_only(base), **pruning_methods(base)}

    @property
    def timesteps(self) -> int:
        """Number of timesteps T."""
        return self.settings.timesteps

    def set_timesteps(self, timesteps: int) -> 'SpikingModule':
        """Change the number of timesteps.

        Returns:
            The model itself.

        Raises:
            ValueError: timesteps is not a positive whole number.
        """
        self._set_settings(replace(self.settings, timesteps=timesteps))
        self._explicit = self._explicit | {'timesteps'}
        return self

    def set_progress(self, progress: float) -> 'SpikingModule':
        """Set the fraction of the training that is done, 0 to 1. Surrogates such as 'evaf' depend on it.

        train.py calls this at the start of every epoch; in your own loop, call it with epoch / epochs. It is not part
        of a checkpoint. Returns the model. Raises ValueError if progress is not between 0 and 1.
        """
        for neuron in self.neurons().values():
            neuron.set_progress(progress)
        return self

    def spiking_report(self) -> SpikingReport:
        """Return what the conversion did with every activation.

        Returns:
            A SpikingReport: a sequence of ConversionRecord (name, was, now, reason). Its `macs(images)` counts the
            shares of MACs with binary, fractional and analog input. It also holds what `calibrate`, `fold_gains` and
            the variants found. Print it for a summary.
        """
        return make_report(self, self._records())

    def _records(self) -> List[Any]:
        return current_records(self, self._report) + audit_records(self)

    def forward(self, x: Any = None, *args, per_step: bool = False, **kwargs) -> Any:
        """Run all timesteps.

        Args:
            x: Images (B, C, H, W), or event frames (B, T, C, H, W).
            per_step: Whether to return every timestep's output, (T, B, ...), instead of the mean, (B, ...).
        """
        if self._is_folded():
            return super().forward(*_given(x, args), **kwargs)
        if isinstance(x, torch.fx.Proxy):  # args and kwargs are Proxies, too
            folded = fold_traced_input(x, self.timesteps, self.settings.stem, args, kwargs)
            with functions_as_nodes(type(self), x.tracer):
                out = self._call_folded('forward', super().forward, folded)
            return decode(out, self.timesteps, per_step)
        args, kwargs = self._fold_arguments(x, args, kwargs)
        out = self._call_folded('forward', super().forward, *args, **kwargs)
        return decode(out, self.timesteps, per_step, self._samples(args, kwargs))

    @contextmanager
    def time_folded(self) -> Iterator[None]:
        """Allow calls of parts of the model (`model.layer1`) on (T * B, ...) tensors inside."""
        before = enter_fold(self)
        try:
            yield
        finally:
            leave_fold(before)

    def _call_folded(self, name: str, method: Callable, *args, **kwargs) -> Any:
        """Call one of the base class's forward methods on arguments with time folded into the batch."""
        functions = self._functions(name)
        before = enter_fold(self)
        try:
            with functions or nullcontext():
                out = method(*args, **kwargs)
        finally:
            leave_fold(before)
        if functions is not None and name != 'forward_intermediates':  # it may stop early
            functions.check_count()
        return out

    def _is_folded(self) -> bool:
        """Return whether the input is (T * B, ...) already: inside a call of this model or of one that contains it."""
        model = folding_model()
        if model is None or (model is not self and all(module is not self for module in model.modules())):
            return False
        if model.timesteps != self.timesteps:
            raise ValueError(f'{type(self).__name__} runs timesteps={self.timesteps} inside {type(model).__name__}, '
                             f'which runs timesteps={model.timesteps}; set_timesteps makes them agree.')
        return True

    def _fold_arguments(self, x: Any, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> Tuple[Tuple, Dict[str, Any]]:
        """Return the arguments of a call with time folded into the batch.

        The first tensor is encoded. Other tensors with the same batch axis are repeated over time.
        """
        if x is None and kwargs:
            name = next((k for k, v in kwargs.items() if isinstance(v, torch.Tensor)), next(iter(kwargs)))
            x, kwargs = kwargs[name], {k: v for k, v in kwargs.items() if k != name}
            return (), {name: self._repeat_over_time(x), **self._repeat_like(x, kwargs)}
        return (self._repeat_over_time(x), *self._repeat_like(x, args)), self._repeat_like(x, kwargs)

    def _repeat_like(self, x: torch.Tensor, arguments: Any) -> Any:
        """Return further arguments; tensors that have the batch axis of x are repeated over time."""
        def repeat(other: Any) -> Any:
            has_batch = isinstance(other, torch.Tensor) and other.ndim and other.shape[0] == x.shape[0]
            return torch.cat([other] * self.timesteps) if has_batch else other
        return tree_map(repeat, arguments) if arguments and self.settings.stem is None else arguments

    def set_stem(self, name: Optional[str]) -> 'SpikingModule':
        """Let the neuron of this name repeat its current over T (`share_stem` checks first); None undoes it.

        Returns:
            The model itself.
        """
        self._set_settings(replace(self.settings, stem=name))
        return self

    def _samples(self, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> int:
        """Return B of arguments returned by `_fold_arguments`."""
        rows = (args[0] if args else next(iter(kwargs.values()))).shape[0]
        return rows if self.settings.stem is not None else rows // self.timesteps

    def _repeat_over_time(self, x: Any) -> torch.Tensor:
        check_rank(self, x)
        return encode_input(x, self.timesteps, self.settings.stem)

    def _functions(self, method: str) -> Optional[FunctionsOverTime]:
        """Return the mode in which functions become neurons, and noise has one mask over time, in a call of this
        method; None if it has neither.
        """
        neuron: Optional[Callable[..., Any]] = self._modules.get(NEURON_NAME)
        if self._repeats_activations:
            neuron = self._fire_feature if fires_features(self, method) else None
        noise = self.training and self._calls_noise and (
            getattr(self, 'drop_rate', True) or getattr(self, 'patch_drop_rate', 0))
        if not noise and neuron is None:
            return None
        head, last = self.__dict__.get('function_calls', (None,) * 4)[3], number_of_calls(self)
        if method != 'forward' and head is None:
            return FunctionsOverTime(self.timesteps, neuron)
        first = head if method == 'forward_head' else 0
        return FunctionsOverTime(self.timesteps, neuron, first, last if method in ('forward', 'forward_head') else head)

    def _fire_feature(self, x: torch.Tensor) -> torch.Tensor:
        return feature_neuron(self, x)(x)

    def _set_settings(self, settings: SpikingSettings) -> None:
        """Change the settings and apply them to neurons, dropout, stem and variants."""
        before, variants = self.settings, settings.variants()
        again = any(getattr(settings, name) != getattr(before, name) for name in ('neuron', 'include', 'exclude'))
        again = again or settings.built_from() != before.built_from()
        for neuron in () if again else self.neurons().values():
            neuron.check_steps(settings.timesteps)
        changed_kinds = [kind for kind in KINDS if getattr(settings, kind) != getattr(before, kind)]
        if replace(settings, timesteps=before.timesteps) != before:
            for variant in variants.values():
                variant.check(self, settings)
        with undone_on_error(self) if again or changed_kinds else nullcontext():
            self.settings = settings
            for kind, variant in reversed(before.variants().items()):
                if again or kind in changed_kinds:
                    variant.remove(self)
            if again:
                unswap_modules(self)
                self._report = swap_modules(self, settings)
            if settings.calls is not None or before.calls is not None:
                set_calls(self, settings.calls)
            if again or settings.pool_first != before.pool_first:
                set_pool_first(self, settings.pool_first)
            self._configure()
            give_channels(self)

    def _configure(self) -> None:
        """Apply the settings to variants, neurons and noise, including modules added since the conversion."""
        settings = self.settings
        for module in self.modules():
            if isinstance(module, SpikingNeuron):
                options = settings.neuron_options() if isinstance(module, neuron_class(settings.neuron)) else {}
                module.configure(settings.timesteps, **options)
            elif isinstance(module, OverTime):
                module.timesteps = settings.timesteps
        for variant in settings.variants().values():
            variant.apply(self, settings)

    def neurons(self) -> Dict[str, SpikingNeuron]:
        """Return the neuron layers by module name."""
        return {name: module for name, module in self.named_modules() if isinstance(module, SpikingNeuron)}

    def no_weight_decay(self) -> Set[str]:
        """Return the names of parameters without weight decay: the base model's, and all of neurons and variants."""
        own: Set[str] = getattr(super(), 'no_weight_decay', set)()
        parameters = {name for name, _ in self.named_parameters()}
        added = {name for variant in self.settings.variants().values() for name in variant.own_state(self)}
        return {*own, *(added & parameters), *(f'{name}.{key}' for name, neuron in self.neurons().items()
                                               for key, _ in neuron.named_parameters())}

    def __reduce_ex__(self, protocol):
        return new_mixed, self.mixed, {k: v for k, v in self.__dict__.items() if k != '_spiking_seen'}

    def __prepare_scriptable__(self):
        raise RuntimeError(f'{type(self).__name__}: TorchScript is not supported for spiking models; '
                           f'use torch.compile or torch.export.')


class SpikingModel(SpikingModule, TimmMixin):
    """Mixin for a converted timm model: the outermost forward method folds its input and decodes its output.

    `forward_features` and the final features of `forward_intermediates` are (T * B, ...). `forward`, `forward_head` and
    the intermediates return the mean over T, (B, ...), or (T, B, ...) with per_step=True.
    """

    def forward_features(self, x: Any = None, *args, **kwargs) -> Any:
        """Return the features of all timesteps, (T * B, ...)."""
        if self._is_folded():
            return super().forward_features(*_given(x, args), **kwargs)
        args, kwargs = self._fold_arguments(x, args, kwargs)
        return self._call_folded('forward_features', super().forward_features, *args, **kwargs)

    def forward_head(self, x: torch.Tensor, *args, per_step: bool = False, **kwargs) -> Any:
        """Return logits (or pre_logits) from features (T * B, ...): their mean over time (B, ...), or (T, B, ...).

        Raises:
            ValueError: The features do not have T * B rows.
        """
        if self._is_folded():
            return super().forward_head(x, *args, **kwargs)
        check_folded(x, self.timesteps)
        out = self._call_folded('forward_head', super().forward_head, x, *args, **kwargs)
        return decode(out, self.timesteps, per_step)

    def forward_intermediates(self, x: Any = None, *args, per_step: bool = False, **kwargs) -> Any:
        """Run timm's forward_intermediates: final features stay (T * B, ...), intermediates are decoded."""
        if self._is_folded():
            return super().forward_intermediates(*_given(x, args), **kwargs)
        args, kwargs = self._fold_arguments(x, args, kwargs)
        out = self._call_folded('forward_intermediates', super().forward_intermediates, *args, **kwargs)
        if isinstance(out, dict):
            return {k: v if k == 'image_features' else decode(v, self.timesteps, per_step) for k, v in out.items()}
        if isinstance(out, tuple):
            final, intermediates = out
            return final, decode(intermediates, self.timesteps, per_step)
        return decode(out, self.timesteps, per_step)

    def reset_classifier(self, *args, **kwargs) -> None:
        super().reset_classifier(*args, **kwargs)
        self._convert_new_modules()

    def _convert_new_modules(self) -> None:
        """Convert the modules of a new classifier."""
        known = {record.name for record in self._report}
        self._report += [record for record in swap_modules(self, self.settings) if record.name not in known]
        self._configure()
        give_channels(self)


SpikingEncoder = SpikingModel  # name in pickles of version 0.1.0
