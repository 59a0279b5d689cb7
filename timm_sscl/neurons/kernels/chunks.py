"""Run the LIF's kernels over many timesteps in chunks, so that each is compiled with few of them.

A kernel is unrolled over its timesteps. Over 16 of them, compiling takes long and the code is slow. Chunks have 16
timesteps, the last one what is left. The potential after a chunk starts the next one; the gradient by it goes the other
way. The results are those of one kernel over all timesteps.
"""
from typing import Any, List, Optional, Sequence, Tuple

import torch
from torch.utils.dlpack import from_dlpack

from .backend import MAX_UNROLLED, compiles, run
from .recursion import BYTE, Neuron, fire, fire_as, membrane_dtype, unpack_bits

__all__ = ['run_backward', 'run_fire', 'run_fire_as', 'run_unpack']


def run_fire(
        x: torch.Tensor,
        gain: Optional[torch.Tensor],
        timesteps: int,
        neuron: Neuron,
        *bits: bool,
) -> Tuple[Tuple[Optional[torch.Tensor], ...], List[torch.Tensor]]:
    """Return what `fire` returns, but for the last potential, and the potentials before the second and later chunks."""
    parts, starts = _run_chunks(fire, x, gain, timesteps, neuron, *bits)
    return tuple(_joined(values) for values in zip(*parts)), starts


def run_fire_as(
        x: torch.Tensor,
        gain: Optional[torch.Tensor],
        timesteps: int,
        neuron: Neuron,
        dtype: torch.dtype,
) -> torch.Tensor:
    """Return the spikes of `fire_as`."""
    parts, _ = _run_chunks(fire_as, x, gain, timesteps, neuron, dtype)
    return _joined([spikes for spikes, in parts])


def run_backward(
        kernel: Any,
        grad: torch.Tensor,
        saved: Tuple[Any, ...],
        gain: Optional[torch.Tensor],
        starts: Sequence[torch.Tensor],
        timesteps: int,
        neuron: Neuron,
) -> torch.Tensor:
    """Return the gradient by the current.

    Args:
        kernel: One of the `backward_...` functions.
        grad: Gradient by the spikes, (T, ...) or (1, ...).
        saved: The kernel's tensors after the gradient: bits, currents (T, ...) or (1, ...), or terms of the current.
        gain: Factor on the current.
        starts: Potentials before the second and later chunks, as `run_fire` returned them.
        timesteps: T.
        neuron: Settings.
    """
    if not starts:
        return run(kernel, (grad, *saved, gain, None), timesteps, neuron)[0]
    starts = [torch.full_like(starts[0], neuron.v_init), *starts]
    grads, grad_v = [], torch.zeros_like(starts[0])
    for (first, count), v in reversed([*zip(_chunks(timesteps), starts)]):
        rows = [_rows(value, first, count) for value in (grad, *saved)]
        grad_x, grad_v = run(kernel, (*rows, gain, (v, grad_v)), count, neuron)
        grads.append(grad_x)
    return torch.cat(grads[::-1])


def run_unpack(bits: torch.Tensor, timesteps: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the spikes of `unpack_bits`."""
    parts = [run(unpack_bits, (_rows(bits, first, count),), count, dtype) for first, count in _chunks(timesteps)]
    return _joined(parts)


def _run_chunks(
        kernel: Any,
        x: torch.Tensor,
        gain: Optional[torch.Tensor],
        timesteps: int,
        neuron: Neuron,
        *settings: Any,
) -> Tuple[List[Any], List[torch.Tensor]]:
    """Return what a forward kernel returns for every chunk, but for the last potential, and the potentials before the
    second and later ones.
    """
    if timesteps <= MAX_UNROLLED or not compiles(x, MAX_UNROLLED, None):
        *outputs, _ = run(kernel, (x, gain, None), timesteps, neuron, *settings)
        return [outputs], []
    v = torch.full(x.shape[1:], neuron.v_init, dtype=membrane_dtype(x.dtype), device=x.device)
    parts, starts = [], []
    for first, count in _chunks(timesteps):
        starts.append(v)
        *outputs, v = run(kernel, (_rows(x, first, count), gain, v), count, neuron, *settings)
        parts.append(outputs)
    return parts, starts[1:]


def _chunks(timesteps: int) -> List[Tuple[int, int]]:
    """Return (first timestep, number of timesteps) of the chunks."""
    return [(first, min(MAX_UNROLLED, timesteps - first)) for first in range(0, timesteps, MAX_UNROLLED)]


def _rows(value: Any, first: int, count: int) -> Any:
    """Return a chunk of a tensor (T, ...), of bits (ceil(T / 8), ...) as uint8, or of terms (x, scale, shift)."""
    if isinstance(value, tuple):
        return tuple((_rows(x, first, count), *affine) for x, *affine in value)
    if len(value) == 1:  # all timesteps are equal
        return value
    last = first + count
    rows = value[first // BYTE:-(-last // BYTE)] if value.dtype == torch.uint8 else value[first:last]
    # no view and no offset in a storage: the compiler would guard on the base, and compile again for another offset
    plain = rows.is_contiguous() and rows.device.type in ('cpu', 'cuda')  # DLPack does not know every device
    return from_dlpack(rows.detach()) if plain else rows


def _joined(values: Any) -> Any:
    """Return the chunks of an output as one tensor; None if the kernel does not compute it."""
    return None if values[0] is None else values[0] if len(values) == 1 else torch.cat(values)
