"""SpikingNeuron: what all neurons share. A neuron is one file: its settings, its parameters and its step."""
from dataclasses import fields
from typing import Any, Dict, Optional, Tuple

import torch

from timm_sscl.knobs import build

from .factors import Factors
from .folding import require_fold
from .kernels.recursion import membrane_dtype
from .kernels.scan import scan
from .settings import NeuronSettings, hashable

__all__ = ['NeuronSettings', 'SpikingNeuron', 'OUTPUTS', 'check_timesteps', 'hashable']

OUTPUTS = 'binary', 'ternary', 'integer', 'analog'

State = Tuple[torch.Tensor, ...]
_SHOWN_IF_SET = 'surrogate', 'surrogate_kwargs', 'v_init'


def check_timesteps(timesteps: Any) -> None:
    """Raise ValueError where timesteps is no whole number of steps."""
    if isinstance(timesteps, bool) or timesteps != int(timesteps) or timesteps < 1:
        raise ValueError(f'timesteps={timesteps!r}: must be a whole number of time steps, 1 or more.')


class SpikingNeuron(Factors):
    """Base of all neurons: (T * B, ...) in, the same shape out, time-major.

        out = scale * neuron(gain * x)

    A subclass has a `Settings` dataclass and writes `step`, and where it needs them `build` (its parameters),
    `constants` (what the step reads of them) and `start` (the state):

        ```python
        @register_neuron('my_plif')
        class MyPLIF(SpikingNeuron):
            @dataclass(frozen=True)
            class Settings(NeuronSettings):
                tau: float = knob(0.5, 'decay factor at the start of training')

            def build(self, shape):
                self.w = nn.Parameter(torch.full(shape, self.settings.tau).logit())

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
    inside a call of its model. Gain and scale are not trained, see `Factors`. A parameter named `amplitude` multiplies
    the output, so that one level of it has that size.

    Attributes:
        Settings: Dataclass of the neuron's settings.
        output: What the output is: 'binary' (0 and 1), 'ternary' (-1, 0, 1), 'integer' (0 to `top`) or 'analog'; the
            first three times the amplitude and the scale.
        top: Highest level of the output.
        needs_channels: Whether there are parameters per channel.
        per_step: Names of parameters whose first axis is the time step.
        built_from: Names of settings that the parameters are made from; they do not change afterwards.
        channels: Shape of parameters per channel.

    Args:
        timesteps: Number of time steps T that the first axis of the input holds.
        channels: For a neuron that needs them: shape that broadcasts against a sample, (C, 1, 1) for maps (C, H, W),
            (C,) for tokens (L, C). A conversion finds it.
        settings: Fields of `Settings`, by name.

    Raises:
        ValueError: timesteps is no positive whole number, channels no shape, or a setting is unknown or out of range.
    """
    Settings = NeuronSettings
    output = 'binary'
    top = 1
    needs_channels = False
    per_step: Tuple[str, ...] = ()
    built_from: Tuple[str, ...] = ()
    channels: Optional[Tuple[int, ...]] = None
    part_of_model = False

    def __init__(self, timesteps: int, channels: Optional[Tuple[int, ...]] = None, **settings: Any):
        super().__init__()
        check_timesteps(timesteps)
        self.timesteps = timesteps
        self.settings = build(self.Settings, settings, f"neuron '{type(self).__name__}'")
        self.encodes = False
        self._keep_progress()
        if not self.needs_channels:
            self.build(())
        elif channels is not None:
            self.set_channels(channels)

    def set_channels(self, channels: Tuple[int, ...]) -> None:
        """Create the parameters of a neuron that has some per channel.

        Raises:
            ValueError: channels is no shape such as (C, 1, 1) or (C,).
        """
        if not isinstance(channels, tuple) or not channels or any(n != 1 for n in channels[1:]):
            raise ValueError(f'channels={channels!r}: must be a shape that broadcasts against a sample, (64, 1, 1) for '
                             f'maps (C, H, W) and (64,) for tokens (L, C).')
        self.channels = channels
        self.build(channels)

    def build(self, shape: Tuple[int, ...]) -> None:
        """Create the parameters; called once, with the settings there.

        Args:
            shape: Of one parameter: () for a layer, or the channels' where the neuron needs them.
        """

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

    def over_time(self, parameter: torch.Tensor) -> torch.Tensor:
        """A parameter with one value per time step, for the steps that run: its first T, or with the last repeated."""
        missing = self.timesteps - len(parameter)
        if missing <= 0:
            return parameter[:self.timesteps]
        return torch.cat([parameter, parameter[-1:].expand(missing, *parameter.shape[1:])])

    def unit(self) -> Optional[torch.Tensor]:
        """Size of one level of the output, amplitude times scale; None is 1."""
        amplitude, scale = self._parameters.get('amplitude'), self.scale
        return scale if amplitude is None else amplitude if scale is None else amplitude * scale

    def levels(self, out: torch.Tensor) -> torch.Tensor:
        """An output in whole levels: 0 and 1, -1 to 1, or 0 to `top`; an analog output as it is."""
        unit = self.unit()
        if self.output == 'analog' or unit is None:
            return out
        if self.output == 'binary':
            return (out != 0).to(out.dtype)
        return torch.where(unit == 0, 0., torch.round(out / unit)).to(out.dtype)

    def activity(self, out: torch.Tensor) -> torch.Tensor:
        """How much of the top level each output has, 0 to 1, whatever the sign; of an analog one, if it is not 0."""
        if self.output == 'analog':
            return (out != 0).to(out.dtype)
        levels = self.levels(out)
        levels = levels.abs() if self.output == 'ternary' else levels
        return levels if self.top == 1 else levels / self.top

    def check_steps(self, timesteps: int) -> None:
        """Raise ValueError where the neuron does not run so many time steps."""
        check_timesteps(timesteps)

    def configure(self, timesteps: int, **settings: Any) -> None:
        """Change the number of time steps and settings; those that are not given stay.

        Raises:
            ValueError: As of the constructor; nothing is changed then.
        """
        self.check_steps(timesteps)
        if settings:
            own = {field.name: getattr(self.settings, field.name) for field in fields(self.settings)}
            changed = build(self.Settings, {**own, **settings}, f"neuron '{type(self).__name__}'")
            for name in self.built_from:
                if getattr(changed, name) != own[name]:
                    raise ValueError(f'{name}={getattr(changed, name)!r}: the parameters of {type(self).__name__} were '
                                     f'made with {name}={own[name]!r}; make a new neuron.')
            self.settings = changed
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
        if self.needs_channels and self.channels is None:
            raise RuntimeError(f'{type(self).__name__} has parameters per channel, whose number it was not told: '
                               f'channels=(C, 1, 1), or set_channels.')
        out = self.run(self._unfold(x), x).flatten(0, 1)
        for factor in (self._parameters.get('amplitude'), self.scale):
            out = out if factor is None else out * factor.to(x.dtype)
        return out

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

    def adopt_steps(self, state_dict: Dict[str, torch.Tensor], prefix: str) -> None:
        """Give parameters per time step the number of steps that those of a state dict have."""
        for name in self.per_step:
            own, value = self._parameters[name], state_dict.get(f'{prefix}{name}')
            if value is not None and value.ndim == own.ndim and value.shape != own.shape:
                own.data = own.new_zeros(self.shape_of(name, len(value)))

    def shape_of(self, name: str, timesteps: int) -> Tuple[int, ...]:
        """Shape of a parameter per time step, for so many steps."""
        return timesteps, *self._parameters[name].shape[1:]

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self.adopt_steps(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

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
