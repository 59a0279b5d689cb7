"""The LIF recursion and its gradient as plain tensor code, for eager mode and for the compiler."""
from typing import Any, Iterator, List, NamedTuple, Optional, Tuple, Union

import torch

from timm_sscl.neurons.surrogate import rectangle_window

__all__ = ['BYTE', 'Neuron', 'fire', 'fire_as', 'backward_from_input', 'backward_from_sources', 'backward_from_bits',
           'traced', 'unpack_bits', 'membrane_dtype', 'reset']

# the potential before a chunk of the timesteps, and the gradient by the potential after it
Chunk = Optional[Tuple[torch.Tensor, torch.Tensor]]
Gradients = Tuple[torch.Tensor, Optional[torch.Tensor]]  # by the current, and by the potential before the chunk

BYTE = 8


class Neuron(NamedTuple):
    """Resolved settings of `lif`."""
    tau: float
    v_threshold: float
    v_reset: Optional[float]
    detach_reset: bool
    v_init: float

    @classmethod
    def of(
            cls,
            tau: float,
            v_threshold: float,
            v_reset: Optional[float],
            detach_reset: bool,
            v_init: Optional[float],
    ) -> 'Neuron':
        """Resolve the initial potential: v_init, or by default the reset potential."""
        return cls(tau, v_threshold, v_reset, detach_reset, (v_reset or 0.) if v_init is None else v_init)


def membrane_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which potentials are integrated: float32 for half precision."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _at(x: torch.Tensor, t: int) -> torch.Tensor:
    """Return timestep t of (T, ...), or of (1, ...) if all timesteps are equal (a static current, the gradient of a
    mean).
    """
    return x[0 if x.shape[0] == 1 else t]


def _steps(
        x: torch.Tensor,
        gain: Optional[torch.Tensor],
        timesteps: int,
        neuron: Neuron,
        v: Optional[torch.Tensor] = None,
) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
    """Yield (potential before the reset, spikes as 0 and 1) for every timestep, from the potential v or v_init on."""
    dtype = membrane_dtype(x.dtype)
    before: Union[float, torch.Tensor] = neuron.v_init if v is None else v
    for t in range(timesteps):
        x_t = _at(x, t).to(dtype)
        u = before * neuron.tau + (x_t if gain is None else x_t * gain.to(dtype))
        o = (u >= neuron.v_threshold).to(dtype)
        yield u, o
        before = reset(u, o, neuron)


# Products with 0 and 1 instead of torch.where, which takes ten times as long in eager mode and as long when compiled.

def reset(u: torch.Tensor, o: torch.Tensor, neuron: Neuron) -> torch.Tensor:
    """Return the potential after the reset, from the potential u before it and the spikes o."""
    if neuron.v_reset is None:
        return u - neuron.v_threshold * o
    v = u - u * o
    return v + neuron.v_reset * o if neuron.v_reset else v


def fire(
        x: torch.Tensor,
        gain: Optional[torch.Tensor],
        v: Optional[torch.Tensor],
        timesteps: int,
        neuron: Neuron,
        fired_bits: bool,
        window_bits: bool,
) -> Tuple[torch.Tensor, Optional[torch.Tensor], Optional[torch.Tensor], Optional[torch.Tensor]]:
    """Return spikes and, if asked for, bits of spikes and of the surrogate's window.

    Args:
        x: Input current (T, ...), or (1, ...) if it is the same at every timestep.
        gain: Factor on x, broadcast against a timestep; None is 1.
        v: Initial potential of a chunk of the timesteps, (...); None is v_init, for all of them.
        timesteps: T, a constant for the compiler.
        neuron: Settings.
        fired_bits: Whether to return the spikes as bits, too.
        window_bits: Whether to return the window as bits.

    Returns:
        Spikes (T, ...); two uint8 tensors (ceil(T / 8), ...) or None, where bit t % 8 of byte t // 8 is timestep t; and
        the last potential of a chunk, else None.
    """
    steps = list(_steps(x, gain, timesteps, neuron, v))
    fired = [o for _, o in steps]
    spikes = torch.stack([o.to(x.dtype) for o in fired])
    windows = _pack_bits([_window(u, neuron) for u, _ in steps]) if window_bits else None
    return spikes, _pack_bits(fired) if fired_bits else None, windows, _last_potential(steps, v, neuron)


def _last_potential(
        steps: List[Tuple[torch.Tensor, torch.Tensor]],
        v: Optional[torch.Tensor],
        neuron: Neuron,
) -> Optional[torch.Tensor]:
    """Return the potential after a chunk's last step; None if the steps are no chunk."""
    return None if v is None else reset(*steps[-1], neuron)


def fire_as(
        x: torch.Tensor,
        gain: Optional[torch.Tensor],
        v: Optional[torch.Tensor],
        timesteps: int,
        neuron: Neuron,
        dtype: torch.dtype,
) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
    """Return the spikes of `fire` in another dtype, such as uint8, and the last potential of a chunk, else None."""
    steps = list(_steps(x, gain, timesteps, neuron, v))
    # the spikes are floats first: the compiler does not vectorise the way from a comparison to uint8
    return torch.stack([o.to(dtype) for _, o in steps]), _last_potential(steps, v, neuron)


def traced(x: torch.Tensor, gain: Optional[torch.Tensor], timesteps: int, neuron: Neuron) -> torch.Tensor:
    """Return spikes (T, ...) by operations that torch.jit.trace can record; autograd's gradient equals the explicit
    backward.

    A spike is its value plus the window times (u - u), which is 0 and has the surrogate's gradient.
    """
    dtype, spikes = membrane_dtype(x.dtype), []
    v: Union[float, torch.Tensor] = neuron.v_init
    for t in range(timesteps):
        x_t = _at(x, t).to(dtype)
        u = v * neuron.tau + (x_t if gain is None else x_t * gain.to(dtype))
        passed = u.detach()
        o = (passed >= neuron.v_threshold).to(dtype) + _window(passed, neuron) * (u - passed)
        spikes.append(o.to(x.dtype))
        v = reset(u, o.detach() if neuron.detach_reset else o, neuron)
    return torch.stack(spikes)


def backward_from_input(
        grad: torch.Tensor,
        x: torch.Tensor,
        gain: Optional[torch.Tensor],
        chunk: Chunk,
        timesteps: int,
        neuron: Neuron,
) -> Gradients:
    """Return the gradient by the current at every timestep, (T, ...), from the gradient by the spikes and the current.

    Both are (T, ...), or (1, ...) if all timesteps are equal. The potentials are recomputed from x. In a chunk, the
    gradient by the potential before it is returned, too, else None.
    """
    steps = list(_steps(x, gain, timesteps, neuron, None if chunk is None else chunk[0]))
    windows = [_window(u, neuron) for u, _ in steps]
    return _backward(grad, windows, [o for _, o in steps], [u for u, _ in steps], gain, chunk, neuron)


def backward_from_bits(
        grad: torch.Tensor,
        fired_bits: torch.Tensor,
        window_bits: torch.Tensor,
        gain: Optional[torch.Tensor],
        chunk: Chunk,
        timesteps: int,
        neuron: Neuron,
) -> Gradients:
    """Return the gradients from two bits per element. They suffice for a soft or a detached reset."""
    dtype = membrane_dtype(grad.dtype)
    windows, fired = (_unpack(bits, timesteps, dtype) for bits in (window_bits, fired_bits))
    return _backward(grad, windows, fired, [], gain, chunk, neuron)


def backward_from_sources(
        grad: torch.Tensor,
        fired_bits: torch.Tensor,
        window_bits: torch.Tensor,
        sources: Tuple[Tuple[torch.Tensor, torch.Tensor, torch.Tensor], ...],
        gain: Optional[torch.Tensor],
        chunk: Chunk,
        timesteps: int,
        neuron: Neuron,
) -> Gradients:
    """Return the gradients, with the current recomputed as the sum of scale * x + shift over sources (x,
    scale, shift), such as a batch norm's saved input and its affine map.

    The result is equal up to rounding. Rounding could move a potential across the threshold or an end of the window, so
    spikes and window are taken from the bits.
    """
    dtype = membrane_dtype(grad.dtype)
    windows, fired = (_unpack(bits, timesteps, dtype) for bits in (window_bits, fired_bits))
    affine = [(x, scale.to(dtype), shift.to(dtype)) for x, scale, shift in sources]
    potentials: List[torch.Tensor] = []
    v: Union[float, torch.Tensor] = neuron.v_init if chunk is None else chunk[0]
    for t, o in enumerate(fired):
        terms = [_at(x, t).to(dtype) * scale + shift for x, scale, shift in affine]
        current = terms[0]
        for term in terms[1:]:
            current = current + term
        potentials.append(v * neuron.tau + (current if gain is None else current * gain.to(dtype)))
        v = reset(potentials[-1], o, neuron)
    return _backward(grad, windows, fired, potentials, gain, chunk, neuron)


def _backward(
        grad: torch.Tensor,
        windows: List[torch.Tensor],
        fired: List[torch.Tensor],
        potentials: List[torch.Tensor],
        gain: Optional[torch.Tensor],
        chunk: Chunk,
        neuron: Neuron,
) -> Gradients:
    """Run the backward recursion over the timesteps.

    Args:
        grad: Gradient by the spikes, (T, ...) or (1, ...).
        windows: Surrogate window, 0 and 1, per timestep.
        fired: Spikes per timestep.
        potentials: Potential before the reset per timestep; empty if the reset passes no gradient that needs it.
        gain: Factor on the current.
        chunk: The chunk of timesteps, if it is one.
        neuron: Settings.
    """
    tau, v_threshold, v_reset, detach_reset, _ = neuron
    dtype = membrane_dtype(grad.dtype)
    grads: List[torch.Tensor] = []
    grad_v = None if chunk is None else chunk[1]  # gradient of the loss by V_t, the potential after the reset
    for t in range(len(fired) - 1, -1, -1):
        grad_o = _at(grad, t).to(dtype)
        if grad_v is None:
            grad_u = windows[t] * grad_o
        else:
            if not detach_reset:  # dV/dO = r - U_pre (hard) or -U_th (soft)
                grad_o = grad_o + grad_v * (-v_threshold if v_reset is None else v_reset - potentials[t])
            through_v = grad_v if v_reset is None else grad_v - grad_v * fired[t]
            grad_u = through_v + windows[t] * grad_o
        grads.append((grad_u if gain is None else grad_u * gain.to(dtype)).to(grad.dtype))
        grad_v = tau * grad_u
    return torch.stack(grads[::-1]), None if chunk is None else grad_v


def _window(u: torch.Tensor, neuron: Neuron) -> torch.Tensor:
    """Return the surrogate's rectangle as 0 and 1."""
    return rectangle_window(u, neuron.v_threshold).to(u.dtype)


def _pack_bits(flags: List[torch.Tensor]) -> torch.Tensor:
    """Pack flags of 0 and 1, one tensor per timestep, to uint8 tensors of 8 timesteps each."""
    bytes_: List[Any] = [sum(flag * float(1 << bit) for bit, flag in enumerate(flags[i:i + BYTE]))
              for i in range(0, len(flags), BYTE)]
    return torch.stack([b.to(torch.uint8) for b in bytes_])


def _unpack(bits: torch.Tensor, timesteps: int, dtype: torch.dtype) -> List[torch.Tensor]:
    """Return one tensor of 0 and 1 per timestep, by float arithmetic, since inductor processes bytes element by
    element.
    """
    flags = []
    for i, byte in enumerate(bits.unbind(0)):
        rest, of_byte = byte.to(dtype), []
        for bit in reversed(range(min(BYTE, timesteps - i * BYTE))):
            of_byte.append((rest >= float(1 << bit)).to(dtype))
            rest = rest - of_byte[-1] * float(1 << bit)
        flags += of_byte[::-1]
    return flags


def unpack_bits(bits: torch.Tensor, timesteps: int, dtype: torch.dtype) -> torch.Tensor:
    """Return spikes (T, ...) of a dtype from their bits."""
    return torch.stack([o.to(dtype) for o in _unpack(bits, timesteps, membrane_dtype(dtype))])
