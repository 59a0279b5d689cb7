"""Leaky integrate-and-fire neuron: the function, its explicit backward, and the module that holds its settings."""
from dataclasses import dataclass, fields
from typing import Any, Dict, Optional, Tuple

import torch
from torch.autograd.function import once_differentiable

from timm_sscl.knobs import knob

from .base import SpikingNeuron
from .kernels.backend import run
from .kernels.batch_norm_recompute import NormSource
from .kernels.memory_layout import Flat
from .kernels.packing import active_packing
from .kernels.recursion import (
    Neuron, backward_from_bits, backward_from_input, backward_from_norm, fire, reset, traced)
from .registry import register_neuron
from .settings import NeuronSettings, check_decay, check_reset
from .surrogate import rectangle_window

__all__ = ['lif', 'LIF', 'check_neuron']


def check_neuron(tau: float, v_threshold: float, v_reset: Optional[float], v_init: Optional[float] = None) -> None:
    """Raise ValueError, naming the argument, where the neuron's settings make no neuron."""
    check_decay(tau)
    check_reset(v_threshold, v_reset)
    if v_init is not None and not v_init < v_threshold:
        raise ValueError(f'v_init={v_init}: the initial potential must lie below v_threshold={v_threshold}.')


def _setting(name: str) -> property:
    """A setting as an attribute of the neuron."""
    def get(neuron: SpikingNeuron) -> Any:
        return getattr(neuron.settings, name)

    def set_(neuron: SpikingNeuron, value: Any) -> None:
        neuron.configure(neuron.timesteps, **{name: value})

    return property(get, set_)


def _kernel_settings(settings: Any) -> Neuron:
    """A LIF's settings, as the recursion takes them."""
    return Neuron.of(settings.tau, settings.v_threshold, settings.v_reset, settings.detach_reset, settings.v_init)


class _LIF(torch.autograd.Function):
    """The recursion of `lif` with its backward written out.

    Kept for the backward are two bits per element: whether it fired, and whether it lay in the surrogate's window. A
    hard reset that passes gradients needs the potentials besides. They are computed again from what the batch norm
    before the neuron keeps; elsewhere the input is kept, and nothing else.
    """

    @staticmethod
    def forward(ctx, x, gain, neuron, keep, norm):
        timesteps, flat = x.shape[0], Flat.of(x, gain)
        packing = active_packing() if keep else None
        ctx.needs_potential = neuron.v_reset is not None and not neuron.detach_reset and timesteps > 1
        norm = norm if flat.by_channel() is not None else None
        two_bits = keep and (norm is not None or not ctx.needs_potential)
        spikes, fired, window = run(
            fire, (flat.view(x), flat.gain), timesteps, neuron, two_bits or packing is not None, two_bits)
        spikes = flat.restore(spikes)
        if packing is not None:
            packing.add(spikes, fired.flatten(1), timesteps)
        if two_bits:
            ctx.save_for_backward(fired, window, norm.bias if norm is not None else None)
        elif keep:
            ctx.save_for_backward(x)
        ctx.settings = flat, neuron, timesteps, norm
        return spikes

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        flat, neuron, timesteps, norm = ctx.settings
        if not ctx.needs_potential:
            fired, window, _ = ctx.saved_tensors
            grad_x = run(backward_from_bits, (flat.view(grad), fired, window, flat.gain), timesteps, neuron)
        elif norm is None:
            x, = ctx.saved_tensors
            grad_x = run(backward_from_input, (flat.view(grad), flat.view(x), flat.gain), timesteps, neuron)
        else:
            fired, window, bias = ctx.saved_tensors
            x, scale, shift = norm.affine(bias)
            flat = flat.by_channel()
            x = x.expand(flat.size) if x.shape == flat.size[1:] else x.view(flat.size)  # once for all steps, or folded
            bits = (b.view(-1, *flat.shape[1:]) for b in (fired, window))
            affine = scale.view(-1, 1), shift.view(-1, 1)
            grad_x = run(
                backward_from_norm, (flat.view(grad), *bits, flat.view(x), *affine, flat.gain), timesteps, neuron)
        return flat.restore(grad_x), None, None, None, None


def lif(
        x: torch.Tensor,
        tau: float = 0.25,
        v_threshold: float = 0.5,
        v_reset: Optional[float] = 0.,
        detach_reset: bool = False,
        v_init: Optional[float] = None,
        gain: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Leaky integrate-and-fire neuron over T time steps, Eq. 2, 3 and 21 of the SSCL paper.

        U_t,pre = tau * U_{t-1} + X_t
        O_t     = 1 if U_t,pre >= v_threshold else 0
        U_t     = U_t,pre * (1 - O_t) + v_reset * O_t        hard reset, U_0 = v_reset
        U_t     = U_t,pre - v_threshold * O_t                soft reset (v_reset=None), U_0 = 0
        dO/dU   = 1 if 0 <= U_t,pre <= 2 * v_threshold else 0

    The call holds no state: every call starts from U_0. Half precision input is integrated in float32. Large tensors
    run through torch.compile where a compiler works, at about the cost of a ReLU; see `lif_backend`.

    Args:
        x: Input current, shape (T, ...), T >= 1, floating point, any strides.
        tau: Decay factor in [0, 1] (not a time constant); 1 is the integrate-and-fire neuron.
        v_threshold: Firing threshold.
        v_reset: Potential after a spike; None subtracts the threshold instead.
        detach_reset: Whether the gradient skips the reset, taking the spike in it as a constant.
        v_init: Initial potential U_0, where it is not the above; half the threshold rounds an integrate-and-fire
            neuron's spike count to the nearest instead of down.
        gain: Factor on x that broadcasts against a step, without a gradient of its own.

    Returns:
        Spikes, 0 or 1, of x's shape, dtype and memory format.

    Raises:
        ValueError: x has no time steps or is not floating point, or a setting is out of its range.
    """
    return _apply(x, gain, Neuron.of(tau, v_threshold, v_reset, detach_reset, v_init), None)


def _apply(x: torch.Tensor, gain: Optional[torch.Tensor], neuron: Neuron, norm: Optional[NormSource]) -> torch.Tensor:
    """The neuron on checked input; norm is what the input comes from, where that is known."""
    check_neuron(neuron.tau, neuron.v_threshold, neuron.v_reset, neuron.v_init)
    if x.ndim == 0 or x.shape[0] < 1:
        raise ValueError(f'x has shape {tuple(x.shape)}: lif needs (T, ...) with at least one time step.')
    if not x.is_floating_point():
        raise ValueError(f'x has dtype {x.dtype}: lif integrates floating point currents.')
    if torch.jit.is_tracing():
        return traced(x, gain, x.shape[0], neuron)
    return _LIF.apply(x, gain, neuron, torch.is_grad_enabled() and x.requires_grad, norm)


@register_neuron('lif')
class LIF(SpikingNeuron):
    """`lif` on a time-folded batch: (T * B, ...) in, spikes of the same shape out, time-major.

        out = scale * lif(gain * x)

    Gain and scale are None (1) unless a calibration or an ANN's conversion sets them (`set_gain`); they broadcast
    against a sample: 0-d, or (C, 1, 1) for channels of NCHW maps and (C,) for channels of tokens. They are not trained.
    The buffers spiking_gain and spiking_scale hold them; a converted model's neurons have these always, a neuron by
    itself once a factor was set. A factor that is 1 costs no multiplication.
    A neuron that is `part_of_model`, as a conversion makes it, runs only inside a call of its model.
    A neuron that `encodes` takes a current (B, ...) that is the same at every step, and returns (T * B, ...).

    Args:
        timesteps: Number of time steps T that the first axis of the input holds.
        tau: Decay factor.
        v_threshold: Firing threshold.
        v_reset: Potential after a spike; None is the soft reset.
        detach_reset: Whether the gradient skips the reset.
        v_init: Initial potential; None is v_reset, or 0 for the soft reset.
        surrogate: `surrogate` and `surrogate_kwargs`: surrogate gradient by name (the rectangle has its own kernel),
            and its options as a mapping.
    """

    @dataclass(frozen=True)
    class Settings(NeuronSettings):
        """Settings of a LIF; defaults are the paper's."""
        tau: float = knob(0.25, 'decay factor of the membrane')
        v_threshold: float = knob(0.5, 'firing threshold')
        v_reset: Optional[float] = knob(0., 'reset potential, or soft')
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

    def run(self, x: torch.Tensor, folded: torch.Tensor) -> torch.Tensor:
        if self.settings.surrogate_function is not rectangle_window:
            return super().run(x, folded)
        return _apply(x, self.gain, _kernel_settings(self.settings), NormSource.of(folded))

    def __setstate__(self, state: Dict[str, Any]) -> None:
        super().__setstate__(state)
        if 'settings' not in self.__dict__:  # a pickle of version 0.1.0
            names = [field.name for field in fields(self.Settings) if field.name in self.__dict__]
            self.settings = self.Settings(**{name: self.__dict__.pop(name) for name in names})
