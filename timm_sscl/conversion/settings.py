"""SpikingSettings: everything besides the weights that determines a converted model's output, and its storage as bytes.
"""
import json
import struct
import zlib
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch

from timm_sscl.knobs import build, knob_help
from timm_sscl.neurons import (
    LIF, SpikingNeuron, create_neuron, list_neurons, list_surrogates, neuron_class)
from timm_sscl.neurons.base import hashable
from timm_sscl.neurons.watched import read_values

from .variants.base import Variant
from .variants.registry import KINDS, create_variant, list_variants

__all__ = ['SpikingSettings', 'ARGUMENTS', 'SETTINGS_KEY', 'SETTINGS_SIZE', 'SOFT_RESET', 'encode', 'decode_bytes',
           'decode_tensor', 'option_key', 'is_option_key']

SETTINGS_KEY = 'spiking_settings'  # name of the buffer, at the root of a converted model
SETTINGS_SIZE = 4096  # fixed size in bytes, so that loaders which compare shapes accept it
# stands for v_reset=None where None cannot be passed: timm.create_model drops it, YAML and shells lack it
SOFT_RESET = 'soft'
Pairs = Tuple[Tuple[str, Any], ...]

_MAGIC = b'spiking\x01'
_HEAD = struct.Struct('<8sII')  # magic, bytes that follow, their CRC-32
# kinds of variants with options, <kind>_kwargs
WITH_OPTIONS = tuple(kind for kind in KINDS if kind in ('norm', 'residual'))
_KWARGS = 'neuron_kwargs', *(f'{kind}_kwargs' for kind in WITH_OPTIONS)
_LIF_OPTIONS = tuple(name for name in knob_help(LIF.Settings) if not name.startswith('surrogate'))


def option_key(name: str, of: str = 'neuron') -> str:
    """Return the name of an option among all settings: '<of>_kwargs.<name>', or just <name> for options of the LIF.

    Args:
        name: Name of the option.
        of: What it belongs to: 'neuron', or a kind of variant.
    """
    return name if of == 'neuron' and name in _LIF_OPTIONS else f'{of}_kwargs.{name}'


def is_option_key(key: str, of: str = 'neuron') -> bool:
    """Return whether this is the name of an option of the neuron or of a variant."""
    return (of == 'neuron' and key in _LIF_OPTIONS) or key.startswith(f'{of}_kwargs.')


@dataclass(frozen=True, repr=False)
class SpikingSettings:
    """Everything besides the weights that determines a converted model's output. Defaults are the paper's.

    tau, v_threshold, v_reset, detach_reset and v_init are the options of the LIF neuron. The options of other neurons
    are in neuron_kwargs, completed by their defaults.
    """
    timesteps: int = 4
    tau: float = LIF.Settings.tau
    v_threshold: float = LIF.Settings.v_threshold
    v_reset: Optional[float] = LIF.Settings.v_reset
    detach_reset: bool = LIF.Settings.detach_reset
    v_init: Optional[float] = LIF.Settings.v_init
    include: Optional[Tuple[str, ...]] = None  # which activations become neurons, see Policy
    exclude: Optional[Tuple[str, ...]] = None
    stem: Optional[str] = None  # name of the neuron before which everything runs once per image, see share_stem
    stem_pool: Optional[str] = None  # 'avg': average pooling in the stem, see set_stem_pool
    norm: Optional[str] = None  # registered name of a norm variant, e.g. 'tdbn'
    calls: Optional[Tuple[str, ...]] = None  # 'name:n': neurons with one copy per call, see set_calls
    pool_first: Optional[Tuple[str, ...]] = None  # 'neuron:pooling': neurons that fire after their max pooling
    allow_analog: bool = False  # whether unknown nonlinear operations may stay analog
    neuron: str = 'lif'  # registered name
    neuron_kwargs: Pairs = ()  # options of the neuron by name; LIF options are moved to the fields above
    surrogate: Optional[str] = None  # registered name; None is replaced by the neuron's default
    surrogate_kwargs: Pairs = ()
    norm_kwargs: Pairs = ()  # options of the norm variant, completed by their defaults
    residual: Optional[str] = None  # registered name of a residual variant
    residual_kwargs: Pairs = ()

    def __post_init__(self):
        if isinstance(self.timesteps, bool) or not isinstance(self.timesteps, int) or self.timesteps < 1:
            raise ValueError(f'timesteps={self.timesteps!r}: must be a whole number of time steps, 1 or more.')
        for name in (*_KWARGS, 'surrogate_kwargs'):
            object.__setattr__(self, name, hashable(dict(getattr(self, name))))
        own = build(neuron_class(self.neuron).Settings, self.neuron_options(), f"neuron '{self.neuron}'")
        for name in ('surrogate', 'surrogate_kwargs'):
            object.__setattr__(self, name, getattr(own, name))
        if self.neuron == 'lif':
            for name in (*_LIF_OPTIONS, 'neuron_kwargs'):
                object.__setattr__(self, name, getattr(own, name, ()))
        else:
            object.__setattr__(self, 'neuron_kwargs', _pairs(own))
        for kind in WITH_OPTIONS:
            if getattr(self, kind) is None and getattr(self, f'{kind}_kwargs'):
                raise ValueError(f'{kind}_kwargs={dict(getattr(self, f"{kind}_kwargs"))}: are options of a {kind}; '
                                 f'say which by {kind}=NAME.')
        for kind, variant in self.variants().items():
            if kind in WITH_OPTIONS:
                object.__setattr__(self, f'{kind}_kwargs', _pairs(variant.settings.at(self.timesteps)))
        if any(getattr(self, name) for name in ('include', 'exclude', 'calls', 'pool_first', *_KWARGS)):
            encode(self.stored())

    def __repr__(self) -> str:
        return f'{type(self).__name__}({", ".join(f"{k}={v!r}" for k, v in self._shown())})'

    def __str__(self) -> str:
        """Timesteps, and the settings that differ from their defaults."""
        usual = dict(type(self)(neuron=self.neuron)._shown())
        return ', '.join(f'{k}={(dict(v) if k.endswith("_kwargs") else v)!r}' for k, v in self._shown()
                         if k == 'timesteps' or v != usual[k])

    def _shown(self) -> Pairs:
        """Settings to show: none of a LIF if the neuron is another one."""
        return tuple((f.name, getattr(self, f.name)) for f in fields(self)
                     if self.neuron == 'lif' or f.name not in _LIF_OPTIONS)

    def neuron_options(self) -> Dict[str, Any]:
        """Return the settings of the neuron, by name."""
        lif = {name: getattr(self, name) for name in _LIF_OPTIONS} if self.neuron == 'lif' else {}
        surrogate: Dict[str, Any] = {}
        if self.surrogate is not None:
            surrogate.update(surrogate=self.surrogate, surrogate_kwargs=())
        surrogate.update(dict(surrogate_kwargs=self.surrogate_kwargs) if self.surrogate_kwargs else {})
        return {**lif, **dict(self.neuron_kwargs), **surrogate}

    def new_neuron(self) -> SpikingNeuron:
        """Create a neuron with these settings."""
        return create_neuron(self.neuron, self.timesteps, **self.neuron_options())

    def variants(self) -> Dict[str, Variant]:
        """Return the variants in these settings by kind, in the order in which they are applied."""
        found = {}
        for kind in KINDS:
            name, options = getattr(self, kind), dict(getattr(self, f'{kind}_kwargs', ()))
            if kind == 'stem' and name is not None:  # this setting is the neuron's name
                name, options = 'shared', dict(neuron=name)
            if name is not None:
                found[kind] = create_variant(kind, name, **options)
        return found

    def built_from(self) -> Pairs:
        """Return the settings that determine the neurons' initial parameters. If they change, the neurons are replaced.
        """
        options = self.neuron_options()
        return tuple((name, options[name]) for name in neuron_class(self.neuron).built_from)

    @property
    def neuron_class_name(self) -> str:
        return neuron_class(self.neuron).__name__

    def threshold(self) -> float:
        """Return the firing threshold that norms use; 1 if the neuron has none."""
        return float(self.neuron_options().get('v_threshold', 1.))

    def flat(self) -> Dict[str, Any]:
        """Return all settings by name, with the options of neuron and variants as separate entries (see `option_key`).
        """
        others = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in (*_LIF_OPTIONS, *_KWARGS)}
        options = {option_key(k): v for k, v in self.neuron_options().items()
                   if k not in ('surrogate', 'surrogate_kwargs')}
        for kind in WITH_OPTIONS:
            options.update((option_key(k, kind), v) for k, v in getattr(self, f'{kind}_kwargs'))
        return {**others, **options}

    def arguments(self) -> Dict[str, Any]:
        """Return T and the settings that differ from their defaults, as arguments of timm.create_model.

        stem, calls and pool_first have no argument; a checkpoint's weights hold them.
        """
        usual = type(self)(neuron=self.neuron)
        given = {name: getattr(self, name) for name in ARGUMENTS
                 if name == 'timesteps' or getattr(self, name) != getattr(usual, name)}
        if self.neuron != type(self).neuron:
            given['neuron'] = self.neuron
        if 'v_reset' in given and given['v_reset'] is None:
            given['v_reset'] = SOFT_RESET
        if self.neuron != 'lif':
            given = {name: value for name, value in given.items() if name not in _LIF_OPTIONS}
        return {name: dict(value) if name.endswith('_kwargs') else value for name, value in given.items()}

    @classmethod
    def from_flat(cls, flat: Dict[str, Any]) -> 'SpikingSettings':
        """Return the settings for a dict that `flat` returned."""
        given: Dict[str, Any] = {'neuron_kwargs': {}}
        for name, value in flat.items():
            of = next((of for of in ('neuron', *WITH_OPTIONS) if is_option_key(name, of)), None)
            if of is None:
                given[name] = value
            else:
                given.setdefault(f'{of}_kwargs', {})[name.removeprefix(f'{of}_kwargs.')] = value
        values: Dict[str, Any] = {k: tuple(v.items()) if k in _KWARGS else v for k, v in given.items()}
        return cls(**values)

    def stored(self, gains: str = 'none') -> Dict[str, Any]:
        """Return the content of the settings in a state dict.

        Args:
            gains: Which gains the neurons have: 'none', 'layer' or 'channel'.
        """
        stored = asdict(self)
        if self.neuron != 'lif':
            stored = {name: value for name, value in stored.items() if name not in _LIF_OPTIONS}
        return {**stored, **{name: dict(getattr(self, name)) for name in (*_KWARGS, 'surrogate_kwargs')},
                'gains': gains}

    @classmethod
    def from_stored(cls, stored: Dict[str, Any]) -> 'SpikingSettings':
        """Return the settings for a dict that `stored` returned.

        Raises:
            ValueError: A setting is unknown to this version, or the neuron, the surrogate or a variant is not
                registered.
        """
        known = {f.name for f in fields(cls)}
        unknown = [f'{k}={v!r}' for k, v in stored.items() if k not in (*known, 'gains', 'model') and v is not None]
        if unknown:
            raise ValueError(f'the checkpoint was made with settings that this version of timm_sscl does not know: '
                             f'{", ".join(unknown)}.')
        for kind, list_names in REGISTERED.items():
            names = list_names()
            if stored.get(kind) is not None and stored[kind] not in names:
                raise ValueError(
                    f"the checkpoint was made with the {kind} '{stored[kind]}', which is not registered. Import the "
                    f'plug-in that registers it first (train.py --plugin FILE|MODULE). '
                    f'Registered are {", ".join(names)}.')
        values: Dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items() if k in known}
        return cls(**values)

    @classmethod
    def from_tensor(cls, tensor: torch.Tensor) -> 'SpikingSettings':
        """Return the settings in a state dict's tensor, in the format of this version or of 0.1.0."""
        return cls.from_stored(decode_tensor(tensor))


# settings that create_model and convert_to_spiking have arguments for
ARGUMENTS = tuple(f.name for f in fields(SpikingSettings) if f.name not in ('stem', 'calls', 'pool_first'))

# settings that are registered names -> function that lists these names
REGISTERED: Dict[str, Callable[[], List[str]]] = {
    'neuron': list_neurons, 'surrogate': list_surrogates,
    **{kind: partial(list_variants, kind) for kind in KINDS if kind != 'stem'}}


def _pairs(own: Any) -> Pairs:
    """Return the settings of a neuron or variant without the surrogate, which the model has as a setting of its own."""
    return tuple((f.name, getattr(own, f.name)) for f in fields(own)
                 if f.name not in ('surrogate', 'surrogate_kwargs'))


def encode(stored: Dict[str, Any]) -> bytes:
    """Encode settings as bytes: a head with a checksum, JSON (compressed if long), padding zeros.

    Every byte is stored as two halves, unless that is too long: weight averaging rounds whole numbers (`_halves`).

    Raises:
        ValueError: include, exclude, calls and the options of neuron and variants are too long.
    """
    content = json.dumps(stored).encode()
    if 2 * (len(content) + _HEAD.size) > SETTINGS_SIZE:
        content = zlib.compress(content)
    room = SETTINGS_SIZE - _HEAD.size
    if len(content) > room:
        raise ValueError(f'include, exclude, calls, {", ".join(_KWARGS)}: they take {len(content)} bytes, a '
                         f'checkpoint has room for {room}; shell wildcards make patterns shorter.')
    data = _HEAD.pack(_MAGIC, len(content), zlib.crc32(content)) + content
    return (_halves(data) if 2 * len(data) <= SETTINGS_SIZE else data).ljust(SETTINGS_SIZE, b'\0')


def _halves(data: bytes) -> bytes:
    """Return every byte as two bytes: its upper and its lower 4 bits, each in the upper bits above an 8.

    An average of equal bytes is rounded down, by decay * x + (1 - decay) * x in float32: an error of up to 7 (8 below)
    leaves the upper bits as they are.
    """
    return bytes(half << 4 | 8 for byte in data for half in divmod(byte, 16))


def _whole(data: bytes) -> bytes:
    """Undo `_halves`."""
    return bytes(upper & 0xF0 | lower >> 4 for upper, lower in zip(data[::2], data[1::2]))


def decode_bytes(data: bytes) -> Optional[Dict[str, Any]]:
    """Decode settings; None if nothing was written (memory after to_empty).

    Raises:
        ValueError: The checksum does not match, as after averaging different settings.
    """
    for packed in (_whole(data), data):
        magic, length, checksum = _HEAD.unpack(packed[:_HEAD.size])
        if magic == _MAGIC:
            break
    else:
        return None
    content = packed[_HEAD.size:_HEAD.size + length]
    if zlib.crc32(content) != checksum:
        raise ValueError(f"'{SETTINGS_KEY}' does not match its checksum: it is damaged, or an average over models with "
                         f'different settings (T, tau, ...); give them the same before averaging.')
    return json.loads(content if content.startswith(b'{') else zlib.decompress(content))


def decode_tensor(tensor: torch.Tensor) -> Dict[str, Any]:
    """Decode the settings in a tensor of a state dict.

    Raises:
        ValueError: The tensor holds no settings.
    """
    data = bytes(read_values(tensor.to(torch.uint8)))
    stored = decode_bytes(data) if len(data) >= 2 * _HEAD.size else None
    if stored is None:  # version 0.1.0 wrote only the JSON
        try:
            stored = json.loads(data)
        except ValueError as error:
            raise ValueError(f"'{SETTINGS_KEY}' holds no settings.") from error
    return stored
