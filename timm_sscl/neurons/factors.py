"""A neuron's input gain and output scale, stored in buffers that are loaded, saved and averaged like other state."""
from typing import Any, Dict, Optional, TypeVar

import torch
import torch.nn as nn

from .watched import BufferSnapshot, changed, is_readable, read_values

__all__ = ['Factors', 'FACTORS']

FACTORS = {'gain': 'spiking_gain', 'scale': 'spiking_scale'}  # factor -> buffer that holds it


_Self = TypeVar('_Self', bound='Factors')


class Factors(nn.Module):
    """Base of a neuron that computes scale * neuron(gain * x).

    Neurons of a converted model always have both buffers, by default ones of shape (), so that the keys of the state
    dict do not depend on a calibration. Another neuron has a buffer once its factor is set. A factor of 1 costs no
    multiplication.
    """

    def __init__(self):
        super().__init__()
        for key in FACTORS.values():
            self.register_buffer(key, None)
        self._in_force = dict.fromkeys(FACTORS.values(), False)  # whether a factor differs from 1
        self._seen: Dict[str, BufferSnapshot] = {}  # snapshot of each buffer when it was last read

    @property
    def gain(self) -> Optional[torch.Tensor]:
        """Factor on the input, or None for 1."""
        return self._factor('spiking_gain')

    @gain.setter
    def gain(self, value: Optional[torch.Tensor]) -> None:
        self._set_factor('spiking_gain', value)

    @property
    def scale(self) -> Optional[torch.Tensor]:
        """Factor on the spikes, or None for 1."""
        return self._factor('spiking_scale')

    @scale.setter
    def scale(self, value: Optional[torch.Tensor]) -> None:
        self._set_factor('spiking_scale', value)

    def set_gain(self, gain: Optional[torch.Tensor] = None, scale: Optional[torch.Tensor] = None) -> None:
        """Set the factors on the input and on the spikes; None is 1."""
        self.gain = gain
        self.scale = scale

    def kind_of_factors(self) -> str:
        """Return 'none' if both factors are 1, else 'layer' or 'channel', as last read, without waiting for the device.
        """
        values = [self._buffers[key] for key in FACTORS.values()]
        if any(value is not None and value.ndim for value in values):
            return 'channel'
        return 'layer' if any(self._in_force.values()) else 'none'

    def keep_factors(self, like: torch.Tensor) -> None:
        """Store the factors in the state dict even if they are 1, on the device of `like`, in its precision or float32.
        """
        dtype = torch.promote_types(like.dtype, torch.float32)
        for key in FACTORS.values():
            if self._buffers[key] is None:
                ones = self._buffers[key] = torch.ones((), dtype=dtype, device=like.device)
                self._seen[key] = BufferSnapshot.now(ones)

    def _factor(self, key: str) -> Optional[torch.Tensor]:
        """Return a factor, None if it is 1. The buffer is read again if it changed."""
        value = self._buffers[key]
        if value is None:
            return None
        if not torch.compiler.is_compiling() and changed(value, self._seen.get(key), self.training):
            self._read_factor(key, value)
        return value if self._in_force[key] else None

    def _read_factor(self, key: str, value: torch.Tensor) -> None:
        if is_readable(value):
            self._in_force[key] = any(v != 1 for v in read_values(value))
            self._seen[key] = BufferSnapshot.now(value)

    def _set_factor(self, key: str, value: Optional[torch.Tensor]) -> None:
        before = self._factor(key)
        if value is not None:
            own = self._buffers[key] = value.detach() if value.requires_grad else value
            self._in_force[key] = True
            self._read_factor(key, own)
        elif before is not None:
            self._buffers[key] = torch.ones((), dtype=before.dtype, device=before.device)
            self._in_force[key] = False

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        """Load factors and take over their shapes. Factors that are missing, as in an ANN's state, keep their values.
        """
        for key in FACTORS.values():
            own, value = self._buffers[key], state_dict.get(prefix + key)
            if value is None and own is not None:
                state_dict[prefix + key] = torch.ones(()) if own.is_meta else own.detach()
            elif value is not None and (own is None or own.shape != value.shape):
                like = value if own is None else own
                self._buffers[key] = torch.ones(value.shape, dtype=like.dtype, device=like.device)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        self._seen.clear()
        for key in FACTORS.values():
            self._factor(key)  # read now, since a compiled forward does not

    def train(self: _Self, mode: bool = True) -> _Self:
        self._seen = {key: seen.again() for key, seen in self._seen.items()}
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for key in FACTORS.values():  # to_empty leaves arbitrary values
            was, value = before[key], self._buffers[key]
            if value is None or not is_readable(value) or not (was.is_meta or is_readable(was)):
                continue
            if was.is_meta or read_values(was.to(value.dtype)) != read_values(value):
                self._buffers[key] = torch.ones((), dtype=value.dtype, device=value.device)
            self._factor(key)
        return self

    def __getstate__(self) -> Dict[str, Any]:
        return {**self.__dict__, '_in_force': dict(self._in_force), '_seen': {}}

    def __setstate__(self, state: Dict[str, Any]) -> None:
        super().__setstate__(state)
        if '_seen' in self.__dict__:
            return
        self._seen, self._in_force = {}, dict.fromkeys(FACTORS.values(), False)  # a pickle of version 0.1.0
        for factor, key in FACTORS.items():
            value = self._buffers.pop(factor)
            self._non_persistent_buffers_set.discard(factor)
            self._buffers[key] = torch.ones(()) if value is None else value
