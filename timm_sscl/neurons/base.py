"""SpikingNeuron: base class of all neurons. A neuron is one file with its settings, parameters and step."""
from dataclasses import fields
from types import MappingProxyType
from typing import Any, Dict, Mapping, Optional, Tuple

import torch

from timm_sscl.knobs import build
from timm_sscl.time_axis import repeat_over_time

from .contract import check_output, check_start, check_step
from .elementwise import Elementwise
from .factors import Factors
from .folding import require_fold
from .kernels.recursion import Neuron, membrane_dtype
from .kernels.scan import Recursion, State, potentials, scan
from .settings import NeuronSettings, hashable

__all__ = ['NeuronSettings', 'SpikingNeuron', 'OUTPUTS', 'check_timesteps', 'hashable']

OUTPUTS = 'binary', 'ternary', 'integer', 'analog'

_SHOWN_IF_SET = 'surrogate', 'surrogate_kwargs', 'v_init'


def check_timesteps(timesteps: Any, name: str = 'timesteps') -> None:
    """Raise ValueError if timesteps is not a positive whole number."""
    if isinstance(timesteps, bool) or timesteps != int(timesteps) or timesteps < 1:
        raise ValueError(f'{name}={timesteps!r}: must be a whole number of time steps, 1 or more.')


class SpikingNeuron(Elementwise, Factors):
    """Base of all neurons: (T * B, ...) in, the same shape out, time-major.

        out = scale * neuron(gain * x)

    A subclass has a `Settings` dataclass and implements `step`. If needed, it also implements `build` (its parameters),
    `constants` (tensors computed from them for the step) and `start` (the initial state):

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

    Every call begins with `start`. With `encodes`, the current (B, ...) is the same at every timestep; the output is
    (T * B, ...). A neuron with `part_of_model`, which a conversion sets, runs only inside a call of its model. Gain and
    scale are not trained; see `Factors`. A parameter `amplitude` multiplies the output.

    Attributes:
        Settings: Dataclass of the neuron's settings.
        output: Kind of output: 'binary' (0 and 1), 'ternary' (-1, 0, 1), 'integer' (0 to `top`) or 'analog'. The first
            three are multiplied by amplitude and scale.
        top: Highest level of the output.
        needs_channels: Whether there are parameters per channel.
        per_step: Names of parameters whose first axis is the timestep.
        lr_scales: Name of a parameter -> factor on its learning rate, which train.py applies.
        elementwise: Whether `step` treats every element by itself. See `Elementwise`.
        built_from: Names of settings that determine the initial parameters. They cannot be changed later.
        channels: Shape of parameters per channel.
        repeats: Whether it now runs a second time on the same batch, which recorders ignore.

    Args:
        timesteps: Number of timesteps T in the first axis of the input.
        channels: For a neuron with parameters per channel: shape that broadcasts against a sample, (C, 1, 1) for maps
            (C, H, W), (C,) for tokens (L, C). A conversion finds it.
        settings: Fields of `Settings`, by name.

    Raises:
        ValueError: timesteps is not a positive whole number, channels is not such a shape, or a setting is unknown or
            out of range.
    """
    Settings = NeuronSettings
    output = 'binary'
    top: Any = 1  # an int, which a subclass may compute
    needs_channels: Any = False  # a bool, which a subclass may compute
    per_step: Tuple[str, ...] = ()
    lr_scales: Mapping[str, float] = MappingProxyType({})
    built_from: Tuple[str, ...] = ()
    channels: Optional[Tuple[int, ...]] = None
    part_of_model = False
    repeats = False

    def __init__(self, timesteps: int, channels: Optional[Tuple[int, ...]] = None, **settings: Any):
        super().__init__()
        check_step(type(self), SpikingNeuron)
        check_timesteps(timesteps)
        self.timesteps = timesteps
        self.settings: Any = build(self.Settings, settings, f"neuron '{type(self).__name__}'")
        self.encodes = False
        self._keep_progress()
        if not self.needs_channels:
            self.build(())
        elif channels is not None:
            self.set_channels(channels)

    def set_channels(self, channels: Tuple[int, ...]) -> None:
        """Create the parameters of a neuron that has parameters per channel.

        Raises:
            ValueError: channels is not a shape such as (C, 1, 1) or (C,).
        """
        if not isinstance(channels, tuple) or not channels or any(n != 1 for n in channels[1:]):
            raise ValueError(f'channels={channels!r}: must be a shape that broadcasts against a sample, (64, 1, 1) for '
                             f'maps (C, H, W) and (64,) for tokens (L, C).')
        self.channels = channels
        self.build(channels)

    def build(self, shape: Tuple[int, ...]) -> None:
        """Create the parameters. Called once, after the settings are set.

        Args:
            shape: Shape of one parameter: () for a layer, or the channels' shape if the neuron needs channels.
        """

    def start(self, x: torch.Tensor) -> State:
        """Return the state before the first timestep.

        Args:
            x: Current of one timestep, (B, ...), before the gain, at least float32; 0-d for an elementwise neuron.
        """
        return ()

    def constants(self) -> State:
        """Return the tensors that every step uses, including learnable ones. Called once per forward."""
        return ()

    @staticmethod
    def step(x: torch.Tensor, state: State, constants: State, t: int, settings: Any) -> Tuple[torch.Tensor, State]:
        """Compute one timestep, as a pure function.

        Args:
            x: Current of this timestep, (B, ...), after the gain, at least float32.
            state: State after the previous timestep.
            constants: Result of `constants`, in x's dtype.
            t: Index of the timestep, from 0.
            settings: The neuron's settings.

        Returns:
            Output of this timestep, and the state after it.
        """
        raise NotImplementedError

    def threshold(self) -> float:
        """Return the current at which a neuron at rest fires. Calibration scales currents by it."""
        return float(getattr(self.settings, 'v_threshold', 1.))

    def over_time(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return a parameter per timestep for the current T: its first T entries, or with the last entry repeated."""
        missing = self.timesteps - len(parameter)
        if missing <= 0:
            return parameter[:self.timesteps]
        return torch.cat([parameter, parameter[-1:].expand(missing, *parameter.shape[1:])])

    def set_step_gain(self, gain: torch.Tensor) -> None:
        """Multiply the current of every timestep by a factor of its own, (T,), besides the gain; for `fold_norms`."""
        self.register_buffer('step_gain', gain)

    def unit(self) -> Optional[torch.Tensor]:
        """Return the size of one level of the output, amplitude times scale; None is 1."""
        amplitude, scale = self._parameters.get('amplitude'), self.scale
        return scale if amplitude is None else amplitude if scale is None else amplitude * scale

    def levels(self, out: torch.Tensor) -> torch.Tensor:
        """Convert an output to whole levels: 0 and 1, -1 to 1, or 0 to `top`. An analog output stays unchanged."""
        unit = self.unit()
        if self.output == 'analog' or unit is None:
            return out
        if self.output == 'binary':
            return (out != 0).to(out.dtype)
        return torch.where(unit == 0, 0., torch.round(out / unit)).to(out.dtype)

    def output_text(self) -> str:
        """Describe the neuron's output in words."""
        levels = dict(ternary='-1, 0 or 1', integer=f'0 to {self.top}', analog='layers behind it multiply')
        text = f'{self.output} ({levels[self.output]})' if self.output in levels else self.output
        return f'{text}, times an amplitude' if 'amplitude' in self._parameters else text

    def activity(self, out: torch.Tensor) -> torch.Tensor:
        """Return each output's share of the top level, without sign; of an analog output, whether it is not 0."""
        if self.output == 'analog':
            return (out != 0).to(out.dtype)
        levels = self.levels(out)
        levels = levels.abs() if self.output == 'ternary' else levels
        return levels if self.top == 1 else levels / self.top

    def as_lif(self) -> Optional[Neuron]:
        """Return the settings with which `lif` computes the same, apart from gain, scale and amplitude; or None."""
        return None

    def check_steps(self, timesteps: int) -> None:
        """Raise ValueError if the neuron cannot run this number of timesteps."""
        check_timesteps(timesteps)

    def configure(self, timesteps: int, **settings: Any) -> None:
        """Change the number of timesteps and settings. Other settings keep their values.

        Raises:
            ValueError: As for the constructor. Nothing is changed then.
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
        """Register a buffer for the fraction of the training that is done, if the surrogate depends on it."""
        if not self.settings.follows_progress:
            self._buffers.pop('progress', None)
        elif 'progress' not in self._buffers:
            like = next((b for b in self._buffers.values() if b is not None), torch.empty(()))
            self.register_buffer('progress', torch.zeros((), device=like.device), persistent=False)

    def set_progress(self, progress: float) -> None:
        """Set the fraction of the training that is done, 0 to 1. Some surrogates depend on it."""
        if not 0 <= progress <= 1:
            raise ValueError(f'progress={progress}: must be a share of the training, 0 to 1.')
        if 'progress' in self._buffers:
            self.progress.fill_(progress)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        current, folded = self.currents(x)
        out = self.run(current, folded)
        check_output(type(self).__name__, out, current)
        out = out.flatten(0, 1)
        for factor in (self._parameters.get('amplitude'), self.scale):
            out = out if factor is None else out * factor.to(x.dtype)
        return out

    def currents(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Return the arguments of `run` for an input (T * B, ...).

        Raises:
            RuntimeError: The neuron runs outside of its model, or does not know its number of channels.
            ValueError: The input does not hold T equal steps, or is not floating point.
        """
        if self.part_of_model:
            require_fold('a spiking neuron', self.timesteps)
        if self.needs_channels and self.channels is None:
            raise RuntimeError(f'{type(self).__name__} has parameters per channel, whose number it was not told: '
                               f'channels=(C, 1, 1), or set_channels.')
        return self._over_time(x)

    def _over_time(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        current, folded = self._unfold(x), x
        if 'step_gain' in self._buffers:
            gain = self.over_time(self.step_gain).to(x.dtype)
            current = folded = current * gain.view(-1, *(1,) * (current.ndim - 1))
        return current, folded

    def run(self, x: torch.Tensor, folded: torch.Tensor) -> torch.Tensor:
        """Return the output before amplitude and scale.

        Args:
            x: Current (T, B, ...), before the gain.
            folded: The module's input, of which x is a view.

        Returns:
            Output (T, B, ...).
        """
        return scan(type(self).step, *self._recursion(x), elementwise=self.elementwise)

    def potential(self, x: torch.Tensor) -> torch.Tensor:
        """Return the potential before the reset, divided by the firing threshold, (T, B, ...), at least float32. It is
        recomputed from the neuron's input, with gradients. A value of 1 or more fires.

        Args:
            x: Input as in forward, (T * B, ...), or (B, ...) of a neuron that encodes.

        Raises:
            ValueError: The step does not compare one potential per timestep with its threshold by `settings.spike`.
        """
        if type(self).step is SpikingNeuron.step:
            raise ValueError(f'{type(self).__name__} has no step that computes a potential.')
        return potentials(type(self).step, *self._recursion(self._over_time(x)[0]))

    def _recursion(self, x: torch.Tensor) -> Recursion:
        """Return the arguments of `scan` after the step, for a current (T, B, ...)."""
        settings, constants = self.settings, self.constants()
        state = self.start(self.first_current(x, membrane_dtype(x.dtype)))
        check_start(f'{type(self).__name__}.start', state)
        check_start(f'{type(self).__name__}.constants', constants)
        return (x, self.gain, state, constants, settings, settings.surrogate_function, self._buffers.get('progress'))

    def run_as(self, x: torch.Tensor, folded: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return `run(x, folded)` in another dtype, without a gradient. A neuron with whole levels fits into int8."""
        return self.run(x, folded).to(dtype)

    def adopt_steps(self, state_dict: Dict[str, torch.Tensor], prefix: str) -> None:
        """Resize parameters per timestep to the number of timesteps in a state dict."""
        for name in self.per_step:
            own, value = self.get_parameter(name), state_dict.get(f'{prefix}{name}')
            if value is not None and value.ndim == own.ndim and value.shape != own.shape:
                own.data = own.new_zeros(self.shape_of(name, len(value)))

    def shape_of(self, name: str, timesteps: int) -> Tuple[int, ...]:
        """Return the shape of a parameter per timestep for this number of timesteps."""
        return timesteps, *self.get_parameter(name).shape[1:]

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self.adopt_steps(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _unfold(self, x: torch.Tensor) -> torch.Tensor:
        """Reshape (T * B, ...) to (T, B, ...), or repeat (B, ...) over time."""
        if not x.is_floating_point():
            raise ValueError(f'x has dtype {x.dtype}: a spiking neuron integrates floating point currents.')
        if self.encodes:
            return repeat_over_time(x, self.timesteps)
        if x.ndim == 0 or x.shape[0] % self.timesteps:
            raise ValueError(f'the first axis of {tuple(x.shape)} does not hold timesteps={self.timesteps} equal '
                             f'steps; a spiking neuron works on (timesteps * batch, ...).')
        return x.reshape(self.timesteps, x.shape[0] // self.timesteps, *x.shape[1:])

    def extra_repr(self) -> str:
        shown = [f'timesteps={self.timesteps}']
        for field in sorted(fields(self.settings), key=lambda field: field.name.startswith('surrogate')):
            value = getattr(self.settings, field.name)
            if value != field.default or field.name not in _SHOWN_IF_SET:
                shown.append(f'{field.name}={value}')
        for name, value in (('gain', self.gain), ('scale', self.scale)):
            if value is not None:
                single = value.numel() == 1 and not value.is_meta
                shown.append(f'{name}={value.item():.4g}' if single else f'{name}={tuple(value.shape)}')
        return ', '.join(shown)
