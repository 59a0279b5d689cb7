"""Settings and gains of a converted model are buffers, so that they are loaded, moved and averaged with other state."""
import logging
from typing import Any, Dict, FrozenSet, Iterable, List, Optional, TypeVar

import torch

from timm_sscl.neurons import SpikingNeuron
from timm_sscl.neurons.factors import FACTORS
from timm_sscl.neurons.watched import BufferSnapshot, changed, is_readable, read_values

from .description import MODEL_KEY, Described, describe_model
from .finding.function_calls import spread_over_calls
from .settings import (
    SETTINGS_KEY, WITH_OPTIONS, SpikingSettings, decode_bytes, decode_tensor, encode, is_option_key)

__all__ = ['SpikingState', 'split_spiking_state']

_logger = logging.getLogger(__name__)

_Self = TypeVar('_Self', bound='SpikingState')


def split_spiking_state(state_dict: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Remove the entries that only a spiking model has from a state dict, and return them."""
    keys = [key for key in state_dict if key == SETTINGS_KEY or key.endswith(tuple(FACTORS.values()))]
    return {key: state_dict.pop(key) for key in keys}


def _keys(neuron: SpikingNeuron) -> List[str]:
    """Return the keys of a neuron in a state dict: gain, scale, and its other state."""
    return list(dict.fromkeys([*FACTORS.values(), *neuron.state_dict()]))


def _as_tensor(data: bytes, device: Any) -> torch.Tensor:
    return torch.tensor(list(data), dtype=torch.uint8, device=device)


class SpikingState(Described):
    """Mixin for a converted model: settings in the buffer spiking_settings, gains in the buffers of its neurons.

    The buffer is authoritative. In eager mode it is read again if someone wrote to it or replaced it, which its
    identity and version show. Compiled code uses the settings that were last read.
    """
    _explicit: FrozenSet[str]  # names of settings that were explicitly given; a checkpoint does not override them
    _spiking_settings: SpikingSettings  # settings in the buffer when last read or written
    _spiking_data: bytes  # bytes of the buffer when last read or written
    _spiking_seen: Optional[BufferSnapshot] = None  # snapshot of that buffer

    @property
    def settings(self) -> SpikingSettings:
        """Everything besides the weights that determines the output."""
        self._read_settings()
        return self._spiking_settings

    @settings.setter
    def settings(self, settings: SpikingSettings) -> None:
        if SETTINGS_KEY in self._buffers:
            self._read_settings()
        else:
            like = next(self.parameters(), next(self.buffers(), torch.empty(0)))
            self.register_buffer(SETTINGS_KEY, torch.zeros_like(_as_tensor(encode({}), like.device)))
        self._spiking_settings = settings
        self._put_settings(self._encode_settings())

    # ---- the buffer

    def _settings_buffer(self) -> Any:
        return self._buffers[SETTINGS_KEY]

    def _kind_of_gains(self) -> str:
        """Return the kind of the neurons' gains and scales: 'none', one per 'layer', or one per 'channel'."""
        return max((lif.kind_of_factors() for lif in self.neurons().values()), key=['none', 'layer', 'channel'].index,
                   default='none')

    def _encode_settings(self, gains: Optional[str] = None) -> bytes:
        """Encode the settings, with how timm builds the model if there is room for it."""
        stored = self._spiking_settings.stored(gains or self._kind_of_gains())
        described = describe_model(self)
        try:
            return encode({**stored, MODEL_KEY: described} if described else stored)
        except ValueError:
            return encode(stored)

    def _describe_again(self) -> None:
        self._read_settings()
        self._put_settings(self._encode_settings())

    def _put_settings(self, data: bytes) -> None:
        """Write the buffer in place, since others may refer to this tensor."""
        buffer, self._spiking_data = self._settings_buffer(), data
        new = _as_tensor(data, buffer.device)
        if buffer.dtype != torch.uint8 or (buffer.is_inference() and not torch.is_inference_mode_enabled()):
            self._buffers[SETTINGS_KEY] = new
        else:
            with torch.no_grad():
                buffer.copy_(new)
        self.__dict__['_spiking_seen'] = BufferSnapshot.now(self._settings_buffer())

    def _read_settings(self) -> None:
        """Apply settings that were written to the buffer, or put in its place, since it was last read.

        Raises:
            RuntimeError: The buffer is damaged, or belongs to a model with other neurons.
        """
        if torch.compiler.is_compiling():
            return
        buffer, seen = self._settings_buffer(), self._spiking_seen
        if not changed(buffer, seen, self.training) or not is_readable(buffer):
            return
        data = bytes(map(int, read_values(buffer)))
        if data != self._spiking_data:
            self._adopt_settings(data, asked_for_stays=seen is None or buffer is not seen.tensor)
        self.__dict__['_spiking_seen'] = BufferSnapshot.now(self._settings_buffer())

    def _adopt_settings(self, data: bytes, asked_for_stays: bool) -> None:
        """Apply settings that did not come through load_state_dict, but from an averaged copy or another loader."""
        try:
            stored = decode_bytes(data)
            settings = SpikingSettings.from_stored(stored) if stored is not None else None
        except ValueError as error:
            raise RuntimeError(f'{type(self).__name__}: {error}') from error
        if stored is None or settings is None:  # uninitialised memory
            self._put_settings(self._spiking_data)
            return
        # settings that determine which neurons and parameters exist
        structure = ['include', 'exclude', 'calls', 'neuron']
        for variants in (settings.variants(), self._spiking_settings.variants()):
            structure += [kind for kind, variant in variants.items() if variant.changes_state]
        pairs = [(name, getattr(settings, name), getattr(self._spiking_settings, name)) for name in structure]
        pairs.append(('neuron_kwargs', settings.built_from(), self._spiking_settings.built_from()))
        for name, theirs, own in pairs:
            if theirs != own:
                raise RuntimeError(f'{type(self).__name__}: its state was replaced by that of a model with {name}='
                                   f'{theirs}, its own is {name}={own}. Convert it alike first or use load_state_dict.')
        self._check_channels(stored, self._neuron_factors())
        before, self._spiking_data = self._spiking_data, data
        try:
            if asked_for_stays:
                self._restore_settings(settings)
            else:
                self._set_settings(settings)
        except Exception:
            self._spiking_data = before
            raise

    def _neuron_factors(self) -> List[torch.Tensor]:
        return [lif._buffers[key] for lif in self.neurons().values() for key in FACTORS.values()
                if lif._buffers[key] is not None]

    def _check_channels(self, stored: Dict[str, Any], factors: Iterable[torch.Tensor]) -> None:
        if stored.get('gains') == 'channel' and not any(f.ndim for f in factors):
            raise RuntimeError(
                f"{type(self).__name__}: the state is of a model with gains per channel (convert_ann), but they are "
                f"not in it (keys that end in '{FACTORS['gain']}' and '{FACTORS['scale']}'), as after a selection by "
                f'equal shapes. Load all of it with load_state_dict, or them alone by load_spiking_state before.')

    # ---- a state dict

    def state_dict(self, *args: Any, prefix: str = '', **kwargs: Any) -> Any:
        if self._encode_settings() != self._spiking_data:  # gains were set since
            self._read_settings()
            self._put_settings(self._encode_settings())
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        seen = set()
        for name, module in self.named_modules(remove_duplicate=False):
            if isinstance(module, SpikingNeuron) and id(module) in seen:  # safetensors refuses two names for one tensor
                for key in _keys(module):
                    state.pop(f'{prefix}{name}.{key}', None)
            seen.add(id(module))
        return state

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if prefix + SETTINGS_KEY not in state_dict:
            self._forget(state_dict, prefix)
        self._take_settings(state_dict, prefix)
        self._forget(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def load_spiking_state(self, state_dict: Dict[str, torch.Tensor]) -> None:
        """Load only the settings and the state that only a spiking model has (see `split_spiking_state`) from a state
        dict.
        """
        state_dict = dict(state_dict)
        self._take_settings(state_dict, '')
        for name, lif in self.neurons().items():
            for factor, key in FACTORS.items():
                if f'{name}.{key}' in state_dict:
                    own, value = lif._buffers[key], state_dict[f'{name}.{key}'].detach()
                    setattr(lif, factor, value.to(value.device if own is None else own.device, copy=True))
            lif.adopt_steps(state_dict, f'{name}.')
        own = self.state_dict(keep_vars=True)
        with torch.no_grad():
            for key, value in state_dict.items():
                if key in own and key != SETTINGS_KEY and not key.endswith(tuple(FACTORS.values())):
                    own[key].copy_(value)

    def _take_settings(self, state_dict: Dict[str, torch.Tensor], prefix: str) -> None:
        """Restore the settings in a state dict and complete it: an ANN's has none, and one of 0.1.0 has no gains of 1.
        """
        self._read_settings()
        tensor, stored = state_dict.get(prefix + SETTINGS_KEY), {}
        if tensor is not None and not tensor.is_meta:
            try:
                stored = decode_tensor(tensor)
                settings = SpikingSettings.from_stored(stored)
            except ValueError as error:
                raise RuntimeError(f'{type(self).__name__}: {error}') from error
            factors = [v for k, v in state_dict.items() if k.startswith(prefix) and k.endswith(tuple(FACTORS.values()))]
            self._check_channels(stored, [*factors, *self._neuron_factors()])
            self._restore_with_steps(settings, state_dict, prefix)
        device = next((v.device for k, v in state_dict.items() if k.startswith(prefix)), torch.device('cpu'))
        gains = stored.get('gains')
        data = self._encode_settings(gains)
        state_dict[prefix + SETTINGS_KEY] = _as_tensor(data, device)
        self._fill_neurons(state_dict, prefix, device, from_0_1_0=bool(stored) and gains is None, from_ann=not stored)
        for kind, variant in self._spiking_settings.variants().items():
            own = variant.own_state(self) if stored.get(kind) is None else ()
            if own:
                variant.complete(self, state_dict, prefix)
                _logger.info(f'{type(self).__name__}: the weights were made without {variant}, whose {len(own)} '
                             f'parameters and buffers keep what they have.')

    def _fill_neurons(
            self,
            state_dict: Dict[str, torch.Tensor],
            prefix: str,
            device: Any,
            from_0_1_0: bool,
            from_ann: bool,
    ) -> None:
        """Complete a state dict with each neuron's gain and scale, and for an ANN's state with the neuron's own
        parameters.

        A missing factor is taken from another name of the same neuron; else it is 1 for a state of 0.1.0, or the
        neuron's own.
        """
        spread_over_calls(self, state_dict, prefix, FACTORS.values())
        names: Dict[SpikingNeuron, List[str]] = {}
        for name, module in self.named_modules(remove_duplicate=False):
            if isinstance(module, SpikingNeuron):
                names.setdefault(module, []).append(f'{prefix}{name}')
        for lif, aliases in names.items():
            state = lif.state_dict()
            for key in _keys(lif):
                own, is_factor = state.get(key), key in FACTORS.values()
                value = next((state_dict[f'{name}.{key}'] for name in aliases if f'{name}.{key}' in state_dict), None)
                if value is None and own is not None and (is_factor or from_ann):
                    ones = is_factor and (from_0_1_0 or own.is_meta)
                    value = torch.ones((), device=device) if ones else own.detach().to(device)
                if value is not None:
                    state_dict.update((f'{name}.{key}', value) for name in aliases)

    def _restore_with_steps(self, stored: SpikingSettings, state_dict: Dict[str, torch.Tensor], prefix: str) -> None:
        """Resize parameters per timestep to those that will be loaded, then restore the settings."""
        neurons = self.neurons()
        before = [(p, p.data) for neuron in neurons.values() for p in map(neuron._parameters.get, neuron.per_step)]
        try:
            for name, neuron in neurons.items():
                neuron.adopt_steps(state_dict, f'{prefix}{name}.')
            self._restore_settings(stored)
        except Exception:
            for parameter, data in before:
                parameter.data = data
            raise

    def _restore_settings(self, stored: SpikingSettings) -> None:
        """Apply a checkpoint's settings. Explicitly given settings stay; differences are logged."""
        own, theirs = self._spiking_settings.flat(), stored.flat()
        kept = self._explicit & own.keys()
        if 'neuron' in kept and own['neuron'] != theirs['neuron']:  # they are options of another neuron
            theirs = {name: value for name, value in theirs.items() if not is_option_key(name)}
            kept |= {name for name in own if is_option_key(name)} | {'surrogate', 'surrogate_kwargs'}
        if 'surrogate' in kept and own['surrogate'] != theirs['surrogate']:
            kept |= {'surrogate_kwargs'}
        for kind in WITH_OPTIONS:
            other = {name for name in theirs if is_option_key(name, kind)}
            if kind in kept and own[kind] != theirs[kind]:
                theirs = {name: value for name, value in theirs.items() if name not in other}
                kept |= {name for name in own if is_option_key(name, kind)}
        for name in sorted(kept & theirs.keys()):
            if own[name] != theirs[name]:
                _logger.warning(f'{type(self).__name__}: the checkpoint was made with {name}={theirs[name]}, '
                                f'{name}={own[name]} was asked for and is kept.')
        restored = SpikingSettings.from_flat({**theirs, **{name: own[name] for name in kept}})
        if restored != self._spiking_settings:
            _logger.info(f'{type(self).__name__}: settings restored from the checkpoint: {restored}')
            self._set_settings(restored)

    def _forget(self, state_dict: Dict[str, torch.Tensor], prefix: str) -> None:
        """Remove an ANN's parameters of activations that became neurons (StarReLU's scale and bias, EvoNorm's v).

        The activation that a neuron keeps takes them over, since convert_ann reads the thresholds of QCFS there.
        """
        dropped = 0
        for name, module in self.named_modules():
            forgotten = getattr(module, 'forgotten', ())
            if forgotten and prefix + SETTINGS_KEY in state_dict:
                forgotten = [parameter for parameter in forgotten if parameter not in module.state_dict()]
            for parameter in forgotten:
                value = state_dict.pop(f'{prefix}{name}.{parameter}', None)
                dropped += value is not None
                own = getattr(vars(module).get('replaced'), parameter, None)
                if value is not None and own is not None and own.shape == value.shape and not value.is_meta:
                    with torch.no_grad():
                        own.copy_(value)
        if dropped:
            _logger.info(f'{type(self).__name__}: {dropped} parameters of activations that are neurons now were not '
                         f'loaded.')

    # ---- moves and copies

    def _apply(self, fn, recurse=True):
        self._read_settings()
        super()._apply(fn, recurse)
        self._put_settings(self._spiking_data)  # to_empty leaves arbitrary values, also settings of another model
        self._put_settings(self._encode_settings())
        return self

    def train(self: _Self, mode: bool = True) -> _Self:
        if self._spiking_seen is not None:
            self.__dict__['_spiking_seen'] = self._spiking_seen.again()
        return super().train(mode)

    def __setstate__(self, state: Dict[str, Any]) -> None:
        super().__setstate__(state)
        if SETTINGS_KEY not in self._buffers:  # a pickle of version 0.1.0
            self.settings = self.__dict__.pop('settings')
        self.__dict__['_spiking_seen'] = BufferSnapshot(self._settings_buffer(), None).again()
