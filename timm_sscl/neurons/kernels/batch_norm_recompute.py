"""Recompute the neuron's input from the batch norm's saved tensors instead of saving a copy."""
from typing import Any, NamedTuple, Optional, Tuple

import torch

from .packing import only_packing_hooks

__all__ = ['Affine', 'NormSource']

Affine = Tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # x, and scale and shift per channel

# training nodes that save input, weight, mean (result1) and inverse standard deviation (result2): torch's own, which
# also serves CUDA for some dtypes and shapes, and cuDNN's
_NODES = 'NativeBatchNormBackward0', 'CudnnBatchNormBackward0'


class NormSource(NamedTuple):
    """The batch norm that computed a current, as autograd represents it."""
    node: Any  # an autograd Node, which does not declare its saved tensors
    bias: Optional[torch.Tensor]

    @classmethod
    def of(cls, x: torch.Tensor) -> Optional['NormSource']:
        """Return the source of x; None if it is not a batch norm in training mode, if x was changed in place since, or
        if the saved tensors are not accessible.

        With hooks on saved tensors, as in checkpointing, a tensor can be unpacked only once.
        """
        if torch.compiler.is_compiling() or not only_packing_hooks():
            return None
        source = cls.of_node(x.grad_fn)
        return source if source is None or x._version == 0 else None

    @classmethod
    def of_node(cls, node: Any) -> Optional['NormSource']:
        """Return the source whose autograd node this is, or None as in `of`."""
        if type(node).__name__ not in _NODES or not node._saved_training:
            return None
        bias, _ = node.next_functions[2]
        if node._saved_weight is None and bias is None:
            return cls(node, None)
        bias = getattr(bias, 'variable', None)  # the leaf's bias; the node itself does not hold it
        return None if bias is None or node._saved_weight is None else cls(node, bias)

    def affine(self, bias: Optional[torch.Tensor]) -> Affine:
        """Return the norm's input, and scale and shift per channel that reproduce its output up to rounding.

        Args:
            bias: The norm's bias, as autograd saved it.
        """
        node = self.node
        scale = node._saved_result2 if bias is None else node._saved_result2 * node._saved_weight
        shift = -node._saved_result1 * scale
        return node._saved_input, scale, shift if bias is None else shift + bias
