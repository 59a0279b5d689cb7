"""SpikingNeuron: what all neurons share. A neuron is one file: its settings, its parameters and its step."""
from dataclasses import dataclass, fields
from typing import Any, Dict, Mapping, Tuple, Union

import torch

from timm_sscl.knobs import build, knob

from .factors import Factors
from .folding import require_fold
from .kernels.recursion import membrane_dtype
from .kernels.scan import scan
from .surrogate import Surrogate, follows_progress, resolve_surrogate, spike

__all__ = ['NeuronSettings', 'SpikingNeuron', 'OUTPUTS', 'check_timesteps', 'hashable']

OUTPUTS = 'binary', 'ternary', 'integer', 'analog'

State = Tuple[torch.Tensor, ...]
_SHOWN_IF_SET = 'surrogate', 'surrogate_kwargs', 'v_init'


def check_timesteps(timesteps: Any) -> None:
    """Raise ValueError where timesteps is no whole number of steps."""
    if isinstance(timesteps, bool) or timesteps != int(timesteps) or timesteps < 1:
        raise ValueError(f'timesteps={timesteps!r}: must be a whole number of time steps, 1 or more.')


def hashable(value: Any) -> Any:
    """A setting's value, lists as tuples and dictionaries as sorted pairs: settings are keys of compiled code."""
    if isinstance(value, Mapping):
        return tuple(sorted((k, hashable(v)) for k, v in value.items()))
    return tuple(map(hashable, value)) if isinstance(value, (list, tuple)) else value


@dataclass(frozen=True)
class NeuronSettings:
    """Base of a neuron's settings: plain values, declared by `knob(default, help)`, that its step reads.

    A subclass may check its values in `check`.

    Raises:
        ValueError: The surrogate is unknown, or a value is out of its range.
    """
    surrogate: Union[str, Surrogate] = knob('rectangle', 'surrogate gradient of the spike, by name', kw_only=True)
    surrogate_kwargs: Tuple[Tuple[str, Any], ...] = knob((), 'options of the surrogate', kw_only=True)

    def __post_init__(self):
        for field in fields(self):
            object.__setattr__(self, field.name, hashable(getattr(self, field.name)))
        self._resolve()
        self.check()

    def _resolve(self) -> None:
        """Look the surrogate up once, outside of compiled code."""
        object.__setattr__(self, '_surrogate', resolve_surrogate(self.surrogate, self.surrogate_kwargs))

    def __getstate__(self) -> Dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __setstate__(self, state: Dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._resolve()

    @property
    def surrogate_function(self) -> Surrogate:
        """The surrogate with its options bound."""
        return self._surrogate

    @property
    def follows_progress(self) -> bool:
        """Whether the surrogate changes during training."""
        return follows_progress(self._surrogate)

    def check(self) -> None:
        """Raise ValueError, naming the setting, where a value makes no neuron."""

    def spike(self, u: torch.Tensor, v_threshold: Any) -> torch.Tensor:
        """1 where u >= v_threshold, else 0; the gradient is the surrogate's."""
        return spike(u, v_threshold, self._surrogate)


class SpikingNeuron(Factors):
    """Base of all neurons: (T * B, ...) in, the same shape out, time-major.

        out = scale * neuron(gain * x)

    A subclass has a `Settings` dataclass, may have parameters, and writes `start`, `constants` and `step`:

        ```python
        @register_neuron('my_plif')
        class MyPLIF(SpikingNeuron):
            @dataclass(frozen=True)
            class Settings(NeuronSettings):
                tau: float = knob(0.5, 'decay factor at the start of training')

            def __init__(self, timesteps, **settings):
                super().__init__(timesteps, **settings)
                self.w = nn.Parameter(torch.logit(torch.tensor(self.settings.tau)))

            def constants(self):
                return (self.w.sigmoid(),)

            def start(self, x):
                return (torch.zeros_like(x),)

            @staticmethod
            def step(x, state, constants, t, settings):
                (v,), (tau,) = state, constants
                u = tau * v + x
                spikes = settings.spike(u, 1.)
                return spikes, (u * (1 - spikes),)
        ```

    A call holds no state: every call starts from `start`. A neuron that `encodes` takes a current (B, ...) that is the
    same at every step, and returns (T * B, ...). A neuron that is `part_of_model`, as a conversion makes it, runs only
    inside a call of its model. Gain and scale are not trained, see `Factors`.

    Attributes:
        Settings: Dataclass of the neuron's settings.
        output: What the output is: 'binary' (0 and 1), 'ternary' (-1, 0, 1), 'integer' (0 to `top`) or 'analog'.
        top: Highest level of the output.

    Args:
        timesteps: Number of time steps T that the first axis of the input holds.
        settings: Fields of `Settings`, by name.

    Raises:
        ValueError: timesteps is no positive whole number, or a setting is unknown or out of its range.
    """
    Settings = NeuronSettings
    output = 'binary'
    top = 1
    part_of_model = False

    def __init__(self, timesteps: int, **settings: Any):
        super().__init__()
        check_timesteps(timesteps)
        self.timesteps = timesteps
        self.settings = build(self.Settings, settings, f"neuron '{type(self).__name__}'")
        self.encodes = False
        self._keep_progress()

    def start(self, x: torch.Tensor) -> State:
        """State before the first step, for a current x of one step, (B, ...), before the gain, at least float32."""
        return ()

    def constants(self) -> State:
        """Tensors that the step reads at every time step, learnable ones included; computed once a call."""
        return ()

    @staticmethod
    def step(x: torch.Tensor, state: State, constants: State, t: int, settings: Any) -> Tuple[torch.Tensor, State]:
        """One time step, as a pure function.

        Args:
            x: Current of this step, (B, ...), after the gain, at least float32.
            state: State after the step before.
            constants: What `constants` returned, in x's dtype.
            t: Number of the step, from 0.
            settings: The neuron's settings.

        Returns:
            Output of this step, and the state after it.
        """
        raise NotImplementedError

    def threshold(self) -> float:
        """Current that a neuron at rest needs to fire; calibration scales currents by it."""
        return float(getattr(self.settings, 'v_threshold', 1.))

    def configure(self, timesteps: int, **settings: Any) -> None:
        """Change the number of time steps and settings; those that are not given stay.

        Raises:
            ValueError: As of the constructor; nothing is changed then.
        """
        check_timesteps(timesteps)
        if settings:
            own = {field.name: getattr(self.settings, field.name) for field in fields(self.settings)}
            self.settings = build(self.Settings, {**own, **settings}, f"neuron '{type(self).__name__}'")
            self._keep_progress()
        self.timesteps = timesteps

    def _keep_progress(self) -> None:
        """Have a buffer for the share of the training that is done, where the surrogate changes with it."""
        if not self.settings.follows_progress:
            self._buffers.pop('progress', None)
        elif 'progress' not in self._buffers:
            like = next((b for b in self._buffers.values() if b is not None), torch.empty(()))
            self.register_buffer('progress', torch.zeros((), device=like.device), persistent=False)

    def set_progress(self, progress: float) -> None:
        """Say which share of the training is done, from 0 to 1; some surrogates change with it."""
        if not 0 <= progress <= 1:
            raise ValueError(f'progress={progress}: must be a share of the training, 0 to 1.')
        if 'progress' in self._buffers:
            self.progress.fill_(progress)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.part_of_model:
            require_fold('a spiking neuron', self.timesteps)
        out, scale = self.run(self._unfold(x), x).flatten(0, 1), self.scale
        return out if scale is None else out * scale.to(x.dtype)

    def run(self, x: torch.Tensor, folded: torch.Tensor) -> torch.Tensor:
        """Output before the scale.

        Args:
            x: Current (T, B, ...), before the gain.
            folded: The module's input, of which x is a view.

        Returns:
            Output (T, B, ...).
        """
        settings = self.settings
        state = self.start(x[0].to(membrane_dtype(x.dtype)))
        return scan(type(self).step, x, self.gain, state, self.constants(), settings, settings.surrogate_function,
                    self._buffers.get('progress'))

    def _unfold(self, x: torch.Tensor) -> torch.Tensor:
        """(T * B, ...) as (T, B, ...), or (B, ...) repeated over time."""
        if not x.is_floating_point():
            raise ValueError(f'x has dtype {x.dtype}: a spiking neuron integrates floating point currents.')
        if self.encodes:
            return x.expand(self.timesteps, *x.shape)
        if x.ndim == 0 or x.shape[0] % self.timesteps:
            raise ValueError(
                f'the first axis of {tuple(x.shape)} does not hold timesteps={self.timesteps} equal steps; '
                f'a spiking neuron works on (timesteps * batch, ...).')
        return x.reshape(self.timesteps, x.shape[0] // self.timesteps, *x.shape[1:])

    def extra_repr(self) -> str:
        shown = [f'timesteps={self.timesteps}']
        for field in sorted(fields(self.settings), key=lambda field: field.name.startswith('surrogate')):
            value = getattr(self.settings, field.name)
            if value != field.default or field.name not in _SHOWN_IF_SET:
                shown.append(f'{field.name}={value}')
        for name in ('gain', 'scale'):
            value = getattr(self, name)
            if value is not None:
                shown.append(f'{name}=' + (f'{value.item():.4g}' if value.numel() == 1 and not value.is_meta
                                           else f'{tuple(value.shape)}'))
        return ', '.join(shown)
