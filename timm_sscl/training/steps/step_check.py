"""Keep values that are not finite out of the weights, without making a step wait for the device."""
import math
from typing import Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.distributed as dist
import torch.nn as nn

from timm_sscl.distributed import world_size
from timm_sscl.host_copy import HostCopy

from ..saving.checkpoint import Position

__all__ = ['StepCheck', 'BadStep']

_SHOWN = 3  # number of parameters that a message names


class BadStep(NamedTuple):
    """A step whose loss or gradients are not finite."""
    place: Position
    loss: bool  # whether the loss is the reason, on any process
    mine: bool  # whether a value of this process is
    total: float  # the loss
    terms: Dict[str, float]  # its terms
    gradients: Tuple[str, ...]  # parameters whose gradients are not finite

    def reason(self, names: Mapping[str, str]) -> str:
        """Return what was not finite: 'task_loss is nan'. `names` holds better names of terms."""
        if not self.loss:
            more = len(self.gradients) - _SHOWN
            shown = ', '.join(f"'{name}'" for name in self.gradients[:_SHOWN])
            return f'the gradients of {shown}' + (f' and {more} more parameters' if more > 0 else '')
        bad = [f'{names.get(k, k)} is {v}' for k, v in self.terms.items() if not math.isfinite(v)]
        return ', '.join(bad) or f'the sum of its terms is {self.total}'


class _Pending(NamedTuple):
    """Answer for one step that is on its way to the host: two flags, the loss, the terms, and norms of gradients."""
    place: Position
    answer: HostCopy
    terms: Tuple[str, ...]
    parameters: Tuple[str, ...]


class StepCheck:
    """Check of the loss and the gradients of every step of a training.

    `start` decides on the device whether a step is good. If not, it sets the gradients to 0 there, so that an optimizer
    moves the weights by its momentum and weight decay at most. `read` says so one step later.

    Attributes:
        ok: Whether loss and gradients of the last step are finite on all processes, 0-d; None before the first.
    """

    def __init__(self) -> None:
        self.ok: Optional[torch.Tensor] = None
        self._pending: Optional[_Pending] = None

    @torch.no_grad()
    def start(
            self,
            place: Position,
            loss: torch.Tensor,
            terms: Mapping[str, torch.Tensor],
            parameters: Sequence[Tuple[str, nn.Parameter]] = (),
            scale: Optional[torch.Tensor] = None,
    ) -> None:
        """Check a step on the device. All processes must call this.

        Args:
            place: Epoch and step.
            loss: Loss, 0-d.
            terms: Its terms, 0-d, for the message.
            parameters: Parameters by name if their gradients are complete, those of an update.
            scale: Scale of the loss if the gradients were scaled: the scaler skips a step with infinite gradients and
                makes its scale smaller, which is no failure until the scale is 1.
        """
        graded = [(name, p.grad) for name, p in parameters if p.grad is not None and p.grad.numel()]
        norms = torch.stack([norm.to(loss.device, torch.float32) for norm in _largest([g for _, g in graded])]
                            ) if graded else loss.new_zeros(0, dtype=torch.float32)
        finite = torch.stack([loss.isfinite(), norms.isfinite().all()]).float()
        if world_size() > 1:
            dist.all_reduce(finite, dist.ReduceOp.MIN)
        self.ok = finite.min() > 0
        bad = ~self.ok
        for _, gradient in graded:
            gradient.masked_fill_(bad.to(gradient.device), 0.)
        if scale is not None:
            finite[1:] = torch.maximum(finite[1:], (scale.view(1) > 1).float())
        values = [finite, torch.stack([loss, *terms.values()]).float(), norms]
        self._pending = _Pending(place, HostCopy(torch.cat(values)), tuple(terms), tuple(name for name, _ in graded))

    def read(self) -> Optional[BadStep]:
        """Return the last step if it was bad; None if it was good or is read already."""
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        loss_ok, gradients_ok, loss, *values = pending.answer.read()
        if loss_ok and gradients_ok:
            return None
        terms = dict(zip(pending.terms, values))
        norms = values[len(terms):]
        bad = tuple(name for name, norm in zip(pending.parameters, norms) if not math.isfinite(norm))
        mine = not math.isfinite(loss) if not loss_ok else bool(bad)
        return BadStep(pending.place, not loss_ok, mine, loss, terms, bad)


def _largest(tensors: List[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Return the largest absolute value of every tensor, 0-d: infinite only if a value is, unlike a sum of squares."""
    return torch._foreach_norm(tensors, math.inf)
