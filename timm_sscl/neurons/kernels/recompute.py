"""Run a step that treats every element by itself, with a gradient that is computed from the input alone."""
from typing import Any, Callable, Hashable, NamedTuple, Optional, Sequence, Tuple

import torch

from timm_sscl.neurons.contract import check_output

from .backend import run
from .first_order import first_order
from .memory_layout import Flat

__all__ = ['Kernel', 'recompute_applies', 'run_recomputed']

State = Tuple[torch.Tensor, ...]


class Kernel(NamedTuple):
    """The recursion of a neuron.

    Args:
        function: Function (x, gain, state, constants, progress, timesteps, *settings, gradient=True) of the output. It
            computes no surrogate with gradient=False.
        settings: Constant settings.
        owner: Owner of the compiled code.
    """
    function: Callable[..., torch.Tensor]
    settings: Tuple[Any, ...]
    owner: Hashable


def recompute_applies(x: torch.Tensor, state: Sequence[torch.Tensor], constants: Sequence[torch.Tensor]) -> bool:
    """Return whether an input has its own values at every timestep, and state and constants are scalars, the state
    without a gradient.
    """
    scalars = all(value.ndim == 0 for value in (*state, *constants))
    return scalars and x.stride(0) != 0 and not any(value.requires_grad for value in state)


def run_recomputed(
        kernel: Kernel,
        x: torch.Tensor,
        gain: Optional[torch.Tensor],
        state: State,
        constants: State,
        progress: Optional[torch.Tensor],
) -> torch.Tensor:
    """Run a kernel. For the backward, only its input is saved.

    Autograd would save several tensors per timestep, which takes more time and memory than computing them again. The
    kernel sees the elements of a timestep as one row, in the order of memory.

    Args:
        kernel: The recursion, elementwise.
        x: Input current, (T, ...), in any memory format.
        gain: Factor on x that broadcasts against a timestep; None is 1.
        state: Initial state, 0-d.
        constants: Constants, 0-d, including learnable ones.
        progress: Fraction of the training that is done, 0-d; None if the surrogate does not depend on it.

    Returns:
        Output, (T, ...), in x's memory format.
    """
    return _Recomputed.apply(x, gain, progress, kernel, state, *constants)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gain, progress, kernel, state, *constants):
        flat = Flat.of(x, gain)
        ctx.save_for_backward(x, progress, *state, *constants)
        ctx.settings = flat, kernel, x.shape[0], len(state)
        tensors = flat.view(x), flat.gain, state, constants, progress
        out = run(kernel.function, tensors, x.shape[0], *kernel.settings, False, owner=kernel.owner)
        check_output(getattr(kernel.owner, '__qualname__', repr(kernel.owner)), out, flat.view(x))
        return flat.restore(out)

    @staticmethod
    @first_order
    def backward(ctx, grad):
        flat, kernel, timesteps, states = ctx.settings
        x, progress, *rest = ctx.saved_tensors
        state, constants = tuple(rest[:states]), tuple(rest[states:])
        learnt = tuple(i for i in range(len(constants)) if ctx.needs_input_grad[5 + i])
        tensors = flat.view(grad), flat.view(x), flat.gain, state, constants, progress
        grad_x, *grads = run(_backward, tensors, timesteps, kernel, learnt, owner=kernel.owner)
        by_constant = dict(zip(learnt, grads))
        return flat.restore(grad_x), None, None, None, None, *(by_constant.get(i) for i in range(len(constants)))


def _backward(
        grad: torch.Tensor,
        x: torch.Tensor,
        gain: Optional[torch.Tensor],
        state: State,
        constants: State,
        progress: Optional[torch.Tensor],
        timesteps: int,
        kernel: Kernel,
        learnt: Tuple[int, ...],
) -> Tuple[torch.Tensor, ...]:
    """Return the gradients by the input and by the learnable constants, whose indices are `learnt`.

    The gradient by the output is (T, ...), or (1, ...) if all timesteps are equal.
    """
    def forward(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        by_index = dict(zip(learnt, values))
        all_constants = tuple(by_index.get(i, c) for i, c in enumerate(constants))
        return kernel.function(x, gain, state, all_constants, progress, timesteps, *kernel.settings)

    # one constant per element, so that its gradient is summed over the timesteps first and then by a single reduction
    out, vjp, *_ = torch.func.vjp(forward, x, *(constants[i].expand(x.shape[1:]) for i in learnt))
    grad_x, *grads = vjp(grad.expand(out.shape))
    return grad_x, *(g.sum() for g in grads)
