"""NeuronSettings: the settings of a neuron's step, each declared once."""
from dataclasses import dataclass, fields
from typing import Any, Dict, Mapping, Optional, Tuple, Union

import torch

from timm_sscl.knobs import RESETS, knob

from .surrogate import Surrogate, follows_progress, read_surrogate_options, resolve_surrogate, spike

__all__ = ['NeuronSettings', 'ResetSettings', 'OwnGradient', 'hashable']


def hashable(value: Any) -> Any:
    """Return a setting's value with lists as tuples and dictionaries as sorted pairs, since settings are keys of
    compiled code.
    """
    if isinstance(value, Mapping):
        return tuple(sorted((k, hashable(v)) for k, v in value.items()))
    return tuple(map(hashable, value)) if isinstance(value, (list, tuple)) else value


class _Resolved:
    """What settings look up once. It is no setting."""
    _surrogate: Optional[Surrogate]


@dataclass(frozen=True)
class NeuronSettings(_Resolved):
    """Base of a neuron's settings: plain values, declared by `knob(default, help)`, for its step.

    A subclass may check its values in `check`, and declare `surrogate` again with another default.

    Raises:
        ValueError: The surrogate is unknown, or a value is out of range.
    """
    surrogate: Union[str, Surrogate, None] = knob('rectangle', 'surrogate gradient of the spike, by name', kw_only=True)
    surrogate_kwargs: Tuple[Tuple[str, Any], ...] = knob((), 'options of the surrogate', kw_only=True)

    def __post_init__(self):
        for field in fields(self):
            object.__setattr__(self, field.name, hashable(getattr(self, field.name)))
        self._resolve()
        self.check()

    def _resolve(self) -> None:
        """Look up the surrogate once, outside of compiled code."""
        surrogate = None
        if self.surrogate is not None:
            options = read_surrogate_options(self.surrogate, self.surrogate_kwargs)
            object.__setattr__(self, 'surrogate_kwargs', options)
            surrogate = resolve_surrogate(self.surrogate, options)
        object.__setattr__(self, '_surrogate', surrogate)

    def __getstate__(self) -> Dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __setstate__(self, state: Dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._resolve()

    @property
    def surrogate_function(self) -> Optional[Surrogate]:
        """The surrogate with its options bound; None if the neuron has a gradient of its own."""
        return self._surrogate

    @property
    def follows_progress(self) -> bool:
        """Whether the surrogate changes during training."""
        return self._surrogate is not None and follows_progress(self._surrogate)

    def check(self) -> None:
        """Raise ValueError, naming the setting, if a value is out of range."""

    def spike(self, u: torch.Tensor, v_threshold: Any) -> torch.Tensor:
        """Return 1 where u >= v_threshold, else 0, with the surrogate's gradient."""
        surrogate: Any = self._surrogate  # a neuron that calls this has one
        return spike(u, v_threshold, surrogate)


@dataclass(frozen=True)
class ResetSettings(NeuronSettings):
    """Settings of a neuron that fires at a threshold and has a hard or soft reset."""
    v_threshold: float = knob(1., 'firing threshold')
    v_reset: Optional[float] = knob(0., 'reset potential, or soft', words=RESETS)
    detach_reset: bool = knob(False, 'no gradient through the reset')

    def check(self) -> None:
        check_reset(self.v_threshold, self.v_reset)

    def reset(self, u: torch.Tensor, spikes: torch.Tensor, v_threshold: Any = None) -> torch.Tensor:
        """Return the potential after the reset.

        Args:
            u: Potential before it.
            spikes: 0 or 1.
            v_threshold: Value that the soft reset subtracts; by default the setting.
        """
        spikes = spikes.detach() if self.detach_reset else spikes
        if self.v_reset is None:
            return u - (self.v_threshold if v_threshold is None else v_threshold) * spikes
        v = u - u * spikes
        return v + self.v_reset * spikes if self.v_reset else v

    @property
    def v_start(self) -> float:
        """Potential before the first timestep."""
        return self.v_reset or 0.


@dataclass(frozen=True)
class OwnGradient(NeuronSettings):
    """Settings of a neuron whose output has a gradient of its own instead of a surrogate chosen by name."""
    surrogate: Any = knob(None, 'none: the neuron has a gradient of its own', kw_only=True)

    def __post_init__(self):
        if self.surrogate is not None or self.surrogate_kwargs:
            raise ValueError(f'surrogate={self.surrogate!r}: this neuron has a gradient of its own and takes none.')
        super().__post_init__()


def check_decay(tau: float) -> None:
    """Raise ValueError if a decay factor is out of range."""
    if not 0 <= tau <= 1:
        raise ValueError(f"tau={tau}: the decay factor must lie in [0, 1] (0.25 is the paper's, 1 does not leak).")


def check_reset(v_threshold: float, v_reset: Optional[float]) -> None:
    """Raise ValueError if the threshold is not positive or not above the reset potential."""
    if not v_threshold > 0:
        raise ValueError(f'v_threshold={v_threshold}: the firing threshold must be positive.')
    if v_reset is not None and not v_reset < v_threshold:
        raise ValueError(
            f"v_reset={v_reset}: the reset potential must lie below v_threshold={v_threshold}, or be "
            f"'soft' for the soft reset.")
