"""SpikingSettings: what a converted model's numbers depend on besides its weights, and its bytes in a state dict."""
import json
import struct
import zlib
from dataclasses import asdict, dataclass, fields
from typing import Any, Dict, Optional, Tuple

import torch

from timm_sscl.neurons.lif import check_neuron
from timm_sscl.neurons.watched import read_values
from timm_sscl.conversion.variants.stem_pool import check_stem_pool
from timm_sscl.conversion.variants.tdbn import check_norm

__all__ = ['SpikingSettings', 'SETTINGS_KEY', 'SETTINGS_SIZE', 'encode', 'decode_bytes', 'decode_tensor']

SETTINGS_KEY = 'spiking_settings'  # the buffer's name, at the root of a converted model
SETTINGS_SIZE = 4096  # always, so that loaders which compare shapes take it
_MAGIC = b'spiking\x01'
_HEAD = struct.Struct('<8sII')  # magic, bytes that follow, their CRC-32
_NEURON_SETTINGS = ('timesteps', 'tau', 'v_threshold', 'v_reset', 'detach_reset', 'v_init')


@dataclass(frozen=True)
class SpikingSettings:
    """All that a converted model's numbers depend on besides its weights; defaults are the paper's."""
    timesteps: int = 4
    tau: float = 0.25
    v_threshold: float = 0.5
    v_reset: Optional[float] = 0.
    detach_reset: bool = False
    v_init: Optional[float] = None
    include: Optional[Tuple[str, ...]] = None  # which activations became neurons, see Policy
    exclude: Optional[Tuple[str, ...]] = None
    stem: Optional[str] = None  # neuron before which all runs once per image, see share_stem
    stem_pool: Optional[str] = None  # 'avg': average pooling in the stem, see set_stem_pool
    norm: Optional[str] = None  # 'tdbn': batch norms in units of the threshold, see TdBatchNorm
    calls: Optional[Tuple[str, ...]] = None  # 'name:n': neurons with a copy per call, see set_calls
    allow_analog: bool = False  # whether nonlinear operations that are no known activations stay analog

    def __post_init__(self):
        if isinstance(self.timesteps, bool) or not isinstance(self.timesteps, int) or self.timesteps < 1:
            raise ValueError(f'timesteps={self.timesteps!r}: must be a whole number of time steps, 1 or more.')
        check_neuron(self.tau, self.v_threshold, self.v_reset, self.v_init)
        check_stem_pool(self.stem_pool)
        check_norm(self.norm)
        if self.include or self.exclude or self.calls:
            encode(self.stored())

    def neuron(self) -> Dict[str, Any]:
        """Arguments of a LIF."""
        return {k: v for k, v in asdict(self).items() if k in _NEURON_SETTINGS}

    def stored(self, gains: str = 'none') -> Dict[str, Any]:
        """What a state dict keeps: the settings, and whether neurons have gains ('none', 'layer' or 'channel')."""
        return {**asdict(self), 'gains': gains}

    @classmethod
    def from_stored(cls, stored: Dict[str, Any]) -> 'SpikingSettings':
        """The settings that a state dict keeps.

        Raises:
            ValueError: There is one that this version does not know; the numbers would be others.
        """
        known = {f.name for f in fields(cls)}
        unknown = [f'{k}={v!r}' for k, v in stored.items() if k not in known and k != 'gains' and v is not None]
        if unknown:
            raise ValueError(f'the checkpoint was made with settings that this version of timm_sscl does not know: '
                             f'{", ".join(unknown)}.')
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in stored.items() if k in known})

    @classmethod
    def from_tensor(cls, tensor: torch.Tensor) -> 'SpikingSettings':
        """The settings in a state dict's tensor, of this version's format or of 0.1.0's."""
        return cls.from_stored(decode_tensor(tensor))


def encode(stored: Dict[str, Any]) -> bytes:
    """Bytes of the settings' buffer: a head with a checksum, JSON (compressed where it is long), zeros.

    Raises:
        ValueError: include, exclude and calls are too long for it.
    """
    content = json.dumps(stored).encode()
    room = SETTINGS_SIZE - _HEAD.size
    if len(content) > room:
        content = zlib.compress(content)
    if len(content) > room:
        raise ValueError(f'include, exclude, calls: they take {len(content)} bytes, a checkpoint has room for {room}; '
                         f'shell wildcards make patterns shorter.')
    return (_HEAD.pack(_MAGIC, len(content), zlib.crc32(content)) + content).ljust(SETTINGS_SIZE, b'\0')


def decode_bytes(data: bytes) -> Optional[Dict[str, Any]]:
    """The settings in a buffer's bytes; None where none were written (memory after to_empty).

    Raises:
        ValueError: The bytes do not match their checksum, as after an average over different settings.
    """
    magic, length, checksum = _HEAD.unpack(data[:_HEAD.size])
    if magic != _MAGIC:
        return None
    content = data[_HEAD.size:_HEAD.size + length]
    if zlib.crc32(content) != checksum:
        raise ValueError(f"'{SETTINGS_KEY}' does not match its checksum: it is damaged, or an average over models with "
                         f'different settings (T, tau, ...); give them the same before averaging.')
    return json.loads(content if content.startswith(b'{') else zlib.decompress(content))


def decode_tensor(tensor: torch.Tensor) -> Dict[str, Any]:
    """The settings in a tensor that comes in a state dict.

    Raises:
        ValueError: It holds none.
    """
    data = bytes(read_values(tensor.to(torch.uint8)))
    stored = decode_bytes(data) if len(data) >= _HEAD.size else None
    if stored is None:  # version 0.1.0 wrote the JSON only
        try:
            stored = json.loads(data)
        except ValueError as error:
            raise ValueError(f"'{SETTINGS_KEY}' holds no settings.") from error
    return stored
