"""Which converted model has folded time into the batch around the call that is running now."""
import sys
import threading
from typing import Any, Optional

import torch
import torch.fx

__all__ = ['enter_fold', 'leave_fold', 'folding_model', 'require_fold']


class _Current(threading.local):
    model: Optional[Any] = None  # per thread: nn.DataParallel and servers run one model in several


_current = _Current()


def enter_fold(model: Any) -> Optional[Any]:
    """Note that a converted model runs from now on; returns what leave_fold takes. (A pair, as torch.compile traces
    try and finally, and not every context manager.)"""
    before, _current.model = _current.model, model
    return before


def leave_fold(before: Optional[Any]) -> None:
    """Note that the call which enter_fold began has ended."""
    _current.model = before


def folding_model() -> Optional[Any]:
    """The converted model whose call is running in this thread, or None."""
    return _current.model


def require_fold(kind: str, timesteps: Optional[int] = None) -> None:
    """Raise where a part of a converted model runs on a tensor that nothing folded over time.

    Such a part would take samples for time steps. A backward may run it: gradient checkpointing computes a forward
    again there.

    Args:
        kind: What runs, for the message.
        timesteps: T that it takes the tensor for.

    Raises:
        RuntimeError: No converted model is running in this thread, no graph that torch.fx traced of one, and no
            backward.
    """
    if _current.model is None and torch._C._current_graph_task_id() == -1 and not _folded_by_graph(kind, timesteps):
        raise RuntimeError(
            f'{kind} is part of a converted model and was called outside of it, where nothing folds time into the '
            f'batch: it would take samples for time steps. Call the model or its forward_features, '
            f'forward_intermediates or forward_head; convert the part itself; or give it a (timesteps * batch, ...) '
            f'tensor inside `with model.time_folded():`.')


def _folded_by_graph(kind: str, timesteps: Optional[int]) -> bool:
    """Whether a graph that torch.fx traced of a converted model is running: it folds as its first node."""
    if torch.compiler.is_compiling():
        return False
    frame = sys._getframe(2)
    while frame is not None:
        graph = frame.f_locals.get('self')
        if isinstance(graph, torch.fx.GraphModule):
            folds = [node.args[1] for node in graph.graph.nodes if getattr(node.target, 'folds_time', False)]
            if folds and timesteps not in (None, folds[0]):
                raise RuntimeError(f'{kind} runs timesteps={timesteps} in a graph that was traced with '
                                   f'timesteps={folds[0]}; trace the model again after set_timesteps.')
            return bool(folds)
        frame = frame.f_back
    return False
