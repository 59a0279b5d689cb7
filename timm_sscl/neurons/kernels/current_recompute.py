"""Recompute a neuron's current, a batch norm's output or a residual sum, from what other layers save."""
from typing import Any, NamedTuple, Optional, Tuple, Union

import torch

from .batch_norm_recompute import Affine, NormSource
from .packing import only_packing_hooks

__all__ = ['Source', 'find_source']

_LONGEST_BRANCH = 32  # autograd nodes between a residual sum and the first convolution of its branch


class _KeptInput(NamedTuple):
    """The shortcut of a residual sum, which the first convolution of the branch saves as its input."""
    node: Any  # the convolution's autograd node
    bias: None = None

    def affine(self, bias: None) -> Affine:
        """Return the tensor, and scale and shift that do not change it."""
        x = self.node._saved_input
        ones = x.new_ones(x.shape[1])
        return x, ones, torch.zeros_like(ones)


Source = Tuple[Union[NormSource, _KeptInput], ...]  # terms whose sum is the current


def find_source(x: torch.Tensor) -> Optional[Source]:
    """Return the terms of a current, (T * B, ...), as autograd represents it, or None if it is something else.

    It is the output of a batch norm in training mode, or the sum of one and a shortcut. The shortcut is another such
    norm or the input of the branch. Autograd reports an error if what is read again was modified after the forward.
    """
    norm = NormSource.of(x)
    if norm is not None:
        return norm,
    if torch.compiler.is_compiling():  # dynamo traces no autograd nodes
        return None
    node: Any = x.grad_fn
    # a sum in place counts as a version; a further one would be a change without a gradient
    if type(node).__name__ != 'AddBackward0' or x._version > 1:
        return None
    if not only_packing_hooks() or node._saved_alpha != 1:
        return None
    for branch, shortcut in (node.next_functions, node.next_functions[::-1]):
        norm = NormSource.of_node(branch[0])
        if norm is not None and all(_shape(edge) == x.shape for edge in (branch, shortcut)):
            other = NormSource.of_node(shortcut[0]) or _kept_input(norm.node, shortcut)
            if other is not None:
                return norm, other
    return None


def _shape(edge: Tuple[Any, int]) -> Optional[torch.Size]:
    """Return the shape of the tensor of an autograd edge; None for a constant."""
    node, output = edge
    return None if node is None else torch.Size(node._input_metadata[output].shape)


def _kept_input(node: Any, edge: Tuple[Any, int]) -> Optional[_KeptInput]:
    """Return the convolution before a node, along first inputs, whose input is the tensor of an autograd edge."""
    for _ in range(_LONGEST_BRANCH):
        if node is None or not node.next_functions:
            return None
        if type(node).__name__ == 'ConvolutionBackward0' and node.next_functions[0] == edge:
            return _KeptInput(node) if node.next_functions[1][0] is not None else None  # a frozen one may not save it
        node = node.next_functions[0][0]
    return None
