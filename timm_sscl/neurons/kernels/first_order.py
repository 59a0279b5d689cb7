"""Backward functions that have no derivative, with an error that says so."""
from functools import wraps
from typing import Any, Callable

import torch

__all__ = ['first_order']


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate the backward of an autograd.Function. With `create_graph=True`, its gradients cannot be differentiated.

    Differentiating them raises RuntimeError. torch's once_differentiable treats them as constants without an error if
    the gradient by the output is one.
    """
    @wraps(backward)
    def wrapper(ctx: Any, *grads: torch.Tensor) -> Any:
        with torch.no_grad():
            outputs = backward(ctx, *grads)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return outputs
        return tuple(_NoSecondOrder.apply(g.detach().requires_grad_()) if g is not None else None for g in outputs)
    return wrapper


class _NoSecondOrder(torch.autograd.Function):
    """Identity whose backward raises."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError(
            'the gradient of a spiking neuron cannot be differentiated again: its surrogate gradient has no second '
            'order. Second-order gradients (create_graph=True for a gradient penalty or a Hessian) are not supported '
            'through spiking neurons; differentiate once, or let the penalty act on parts before the first neuron.')
