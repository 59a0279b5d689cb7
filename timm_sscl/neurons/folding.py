"""Track which converted model has folded time into the batch around the running call."""
import sys
import threading
from types import FrameType
from typing import Any, Optional

import torch
import torch.fx

__all__ = ['enter_fold', 'leave_fold', 'folding_model', 'require_fold']


class _Current(threading.local):
    """The running model of each thread: nn.DataParallel and servers run one model in several threads."""

    def __init__(self) -> None:
        self.model: Optional[Any] = None  # on the instance: torch.compile guards on the keys of its __dict__


_current = _Current()


def enter_fold(model: Any) -> Optional[Any]:
    """Mark a converted model as running. Return the previous model, for `leave_fold`.

    torch.compile traces try and finally around this pair, but not every context manager.
    """
    before, _current.model = _current.model, model
    return before


def leave_fold(before: Optional[Any]) -> None:
    """End the call that `enter_fold` started."""
    _current.model = before


def folding_model() -> Optional[Any]:
    """Return the converted model whose call is running in this thread, or None."""
    return _current.model


def require_fold(kind: str, timesteps: Optional[int] = None) -> None:
    """Raise an error if a part of a converted model runs outside a call of the model, so that time is not folded.

    It would treat samples as timesteps. A backward may run it, since gradient checkpointing recomputes a forward there.

    Args:
        kind: Name of the part, for the message.
        timesteps: T of the part.

    Raises:
        RuntimeError: Neither a converted model nor its torch.fx graph is running in this thread, and no backward.
    """
    if _current.model is None and torch._C._current_graph_task_id() == -1 and not _folded_by_graph(kind, timesteps):
        raise RuntimeError(
            f'{kind} is part of a converted model and was called outside of it, where nothing folds time into the '
            f'batch: it would take samples for time steps. Call the model or its forward_features, '
            f'forward_intermediates or forward_head; convert the part itself; or give it a (timesteps * batch, ...) '
            f'tensor inside `with model.time_folded():`.')


def _folded_by_graph(kind: str, timesteps: Optional[int]) -> bool:
    """Return whether a torch.fx graph of a converted model is running. Its first node folds time."""
    if torch.compiler.is_compiling():
        return False
    frame: Optional[FrameType] = sys._getframe(2)
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
