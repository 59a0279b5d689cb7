"""Leaky integrate-and-fire neuron: function, explicit backward, and module."""
from dataclasses import dataclass, fields
from typing import Any, Dict, Optional, Tuple

import torch

from timm_sscl.knobs import RESETS, knob

from .base import SpikingNeuron
from .kernels.chunks import run_backward, run_fire, run_fire_as
from .kernels.current_recompute import Source, find_source
from .kernels.first_order import first_order
from .kernels.memory_layout import Flat, on_same_memory
from .kernels.packing import active_packing
from .kernels.recursion import (
    Neuron, backward_from_bits, backward_from_input, backward_from_sources, reset, traced)
from .registry import register_neuron
from .settings import NeuronSettings, check_decay, check_reset
from .surrogate import rectangle_window

__all__ = ['lif', 'LIF', 'check_neuron']


def check_neuron(tau: float, v_threshold: float, v_reset: Optional[float], v_init: Optional[float] = None) -> None:
    """Raise ValueError, naming the argument, if a setting of the neuron is out of range."""
    check_decay(tau)
    check_reset(v_threshold, v_reset)
    if v_init is not None and not v_init < v_threshold:
        raise ValueError(f'v_init={v_init}: the initial potential must lie below v_threshold={v_threshold}.')


def _setting(name: str) -> property:
    """Create a property that reads and changes a setting of the neuron."""
    def get(neuron: SpikingNeuron) -> Any:
        return getattr(neuron.settings, name)

    def set_(neuron: SpikingNeuron, value: Any) -> None:
        neuron.configure(neuron.timesteps, **{name: value})

    return property(get, set_)


def _kernel_settings(settings: Any) -> Neuron:
    """Return a LIF's settings for the recursion."""
    return Neuron.of(settings.tau, settings.v_threshold, settings.v_reset, settings.detach_reset, settings.v_init)


class _LIF(torch.autograd.Function):
    """The recursion of `lif` with an explicit backward.

    Two bits per element are saved for the backward: whether it fired, and whether it was in the surrogate's window. A
    hard reset with gradients also needs the potentials. They are recomputed from what the batch norm before the neuron
    saves, or behind a residual sum the norm and the branch's first convolution. Elsewhere, only the input is saved.
    """

    @staticmethod
    def forward(ctx, x, gain, neuron, keep, source):
        timesteps, flat = x.shape[0], Flat.of(x, gain)
        packing = active_packing() if keep else None
        ctx.needs_potential = neuron.v_reset is not None and not neuron.detach_reset and timesteps > 1
        source = source if flat.by_channel() is not None else None
        two_bits = keep and (source is not None or not ctx.needs_potential)
        (spikes, fired, window), starts = run_fire(
            flat.view(x), flat.gain, timesteps, neuron, two_bits or packing is not None, two_bits)
        spikes = flat.restore(spikes)
        if packing is not None:
            packing.add(spikes, fired.flatten(1), timesteps)
        if two_bits:
            ctx.save_for_backward(*starts, fired, window, *(term.bias for term in source or ()))
        elif keep:
            ctx.save_for_backward(*starts, x)
        ctx.settings = flat, neuron, timesteps, source, len(starts)
        return spikes

    @staticmethod
    @first_order
    def backward(ctx, grad):
        flat, neuron, timesteps, source, num = ctx.settings
        kept = ctx.saved_tensors  # checkpointing allows one access
        starts, tensors = kept[:num], kept[num:]
        kernel: Any = backward_from_bits
        saved: Tuple[Any, ...] = tensors[:2]
        if ctx.needs_potential and source is None:
            kernel, saved = backward_from_input, (flat.view(tensors[0]),)
        elif ctx.needs_potential:
            kernel, (fired, window, *biases), flat = backward_from_sources, tensors, flat.by_channel()
            terms = tuple(_flat_affine(flat, *term.affine(bias)) for term, bias in zip(source, biases))
            saved = (*(bits.view(-1, *flat.shape[1:]) for bits in (fired, window)), terms)
            starts = [on_same_memory(v, flat.shape[1:]) for v in starts]
        grad_x = run_backward(kernel, flat.view(grad), saved, flat.gain, starts, timesteps, neuron)
        return flat.restore(grad_x), None, None, None, None


def _flat_affine(flat: Flat, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> Tuple[torch.Tensor, ...]:
    """Return a term of the current, scale * x + shift, in a flat shape with an axis for the channels."""
    same = x.shape == flat.size[1:]  # one timestep for all, else folded
    x = x.expand(flat.size) if same else x.view(flat.size)
    return flat.view(x), scale.view(-1, 1), shift.view(-1, 1)


def lif(
        x: torch.Tensor,
        tau: float = 0.25,
        v_threshold: float = 0.5,
        v_reset: Optional[float] = 0.,
        detach_reset: bool = False,
        v_init: Optional[float] = None,
        gain: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Leaky integrate-and-fire neuron over T timesteps, Eq. 2, 3 and 21 of the SSCL paper.

        U_t,pre = tau * U_{t-1} + X_t
        O_t     = 1 if U_t,pre >= v_threshold else 0
        U_t     = U_t,pre * (1 - O_t) + v_reset * O_t        hard reset, U_0 = v_reset
        U_t     = U_t,pre - v_threshold * O_t                soft reset (v_reset=None), U_0 = 0
        dO/dU   = 1 if 0 <= U_t,pre <= 2 * v_threshold else 0

    There is no state between calls: every call starts with U_0. Half precision input is integrated in float32. Large
    tensors run through torch.compile if a compiler works, at about the cost of a ReLU; see `lif_backend`.

    Args:
        x: Input current, shape (T, ...), T >= 1, floating point, any strides.
        tau: Decay factor in [0, 1] (not a time constant); 1 is the integrate-and-fire neuron.
        v_threshold: Firing threshold.
        v_reset: Potential after a spike; None subtracts the threshold instead.
        detach_reset: Whether the gradient ignores the reset, i.e. treats its spike as a constant.
        v_init: Initial potential U_0, if it is not as above. With half the threshold, an integrate-and-fire neuron's
            spike count is rounded to nearest instead of down.
        gain: Factor on x that broadcasts against a timestep, without a gradient of its own.

    Returns:
        Spikes, 0 or 1, of x's shape, dtype and memory format.

    Raises:
        ValueError: x has no timesteps or is not floating point, or a setting is out of range.
    """
    return _apply(x, gain, Neuron.of(tau, v_threshold, v_reset, detach_reset, v_init), None)


def _apply(x: torch.Tensor, gain: Optional[torch.Tensor], neuron: Neuron, source: Optional[Source]) -> torch.Tensor:
    """Run the neuron after checking settings and input.

    Args:
        x: Input current, (T, ...).
        gain: Factor on x.
        neuron: Settings.
        source: Terms from which the input can be recomputed, if known.
    """
    check_neuron(neuron.tau, neuron.v_threshold, neuron.v_reset, neuron.v_init)
    if x.ndim == 0 or x.shape[0] < 1:
        raise ValueError(f'x has shape {tuple(x.shape)}: lif needs (T, ...) with at least one time step.')
    if not x.is_floating_point():
        raise ValueError(f'x has dtype {x.dtype}: lif integrates floating point currents.')
    if torch.jit.is_tracing():
        return traced(x, gain, x.shape[0], neuron)
    return _LIF.apply(x, gain, neuron, torch.is_grad_enabled() and x.requires_grad, source)


@register_neuron('lif')
class LIF(SpikingNeuron):
    """`lif` on a time-folded batch: (T * B, ...) in, spikes of the same shape out, time-major.

        out = scale * lif(gain * x)

    Gain and scale are None (1) unless a calibration or the conversion of an ANN sets them (`set_gain`). They broadcast
    against a sample: 0-d, or (C, 1, 1) for channels of NCHW maps and (C,) for channels of tokens. They are not trained.
    The buffers spiking_gain and spiking_scale hold them: always in a converted model, otherwise once a factor was set.
    A factor of 1 costs no multiplication.

    A neuron with `part_of_model`, which a conversion sets, runs only inside a call of its model.
    A neuron with `encodes` takes a current (B, ...) that is the same at every timestep, and returns (T * B, ...).

    Args:
        timesteps: Number of timesteps T in the first axis of the input.
        tau: Decay factor.
        v_threshold: Firing threshold.
        v_reset: Potential after a spike; None is the soft reset.
        detach_reset: Whether the gradient ignores the reset.
        v_init: Initial potential; None is v_reset, or 0 for the soft reset.
        surrogate: `surrogate` and `surrogate_kwargs`: name of the surrogate gradient (the rectangle has its own
            kernel), and its options as a mapping.
    """
    elementwise = True

    @dataclass(frozen=True)
    class Settings(NeuronSettings):
        """Settings of a LIF; defaults are the paper's."""
        tau: float = knob(0.25, 'decay factor of the membrane')
        v_threshold: float = knob(0.5, 'firing threshold')
        v_reset: Optional[float] = knob(0., 'reset potential, or soft', words=RESETS)
        detach_reset: bool = knob(False, 'no gradient through the reset')
        v_init: Optional[float] = knob(None, 'initial potential (the reset potential; 0 for the soft reset)')

        def check(self) -> None:
            check_neuron(self.tau, self.v_threshold, self.v_reset, self.v_init)

    def __init__(
            self,
            timesteps: int,
            tau: float = Settings.tau,
            v_threshold: float = Settings.v_threshold,
            v_reset: Optional[float] = Settings.v_reset,
            detach_reset: bool = Settings.detach_reset,
            v_init: Optional[float] = Settings.v_init,
            **surrogate: Any,
    ):
        super().__init__(timesteps, tau=tau, v_threshold=v_threshold, v_reset=v_reset, detach_reset=detach_reset,
                         v_init=v_init, **surrogate)

    tau = _setting('tau')
    v_threshold = _setting('v_threshold')
    v_reset = _setting('v_reset')
    detach_reset = _setting('detach_reset')
    v_init = _setting('v_init')

    def start(self, x: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        return (torch.full_like(x, _kernel_settings(self.settings).v_init),)

    @staticmethod
    def step(
            x: torch.Tensor,
            state: Tuple[torch.Tensor, ...],
            constants: Tuple[torch.Tensor, ...],
            t: int,
            settings: Settings,
    ) -> Tuple[torch.Tensor, Tuple[torch.Tensor, ...]]:
        u = state[0] * settings.tau + x
        spikes = settings.spike(u, settings.v_threshold)
        return spikes, (reset(u, spikes.detach() if settings.detach_reset else spikes, _kernel_settings(settings)),)

    def _runs_own_step(self) -> bool:
        """Return whether the kernels of the LIF compute what this class's step does."""
        return all(getattr(type(self), name) is getattr(LIF, name) for name in ('step', 'start', 'constants'))

    def as_lif(self) -> Optional[Neuron]:
        unchanged = type(self).run is LIF.run and type(self)._over_time is SpikingNeuron._over_time
        return _kernel_settings(self.settings) if unchanged and self._runs_own_step() else None

    def run(self, x: torch.Tensor, folded: torch.Tensor) -> torch.Tensor:
        if self.settings.surrogate_function is not rectangle_window or not self._runs_own_step():
            return super().run(x, folded)
        return _apply(x, self.gain, _kernel_settings(self.settings), find_source(folded))

    def run_as(self, x: torch.Tensor, folded: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if type(self).run is not LIF.run or not self._runs_own_step():  # other spikes, such as MPBN's
            return super().run_as(x, folded, dtype)
        flat = Flat.of(x, self.gain)
        return flat.restore(run_fire_as(flat.view(x), flat.gain, len(x), _kernel_settings(self.settings), dtype))

    def __setstate__(self, state: Dict[str, Any]) -> None:
        super().__setstate__(state)
        if 'settings' not in self.__dict__:  # a pickle of version 0.1.0
            names = [field.name for field in fields(self.Settings) if field.name in self.__dict__]
            self.settings = self.Settings(**{name: self.__dict__.pop(name) for name in names})
