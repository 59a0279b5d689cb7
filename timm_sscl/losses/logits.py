"""Common parts of losses on logits: argument checks, and the KL divergence of log-probabilities."""
from typing import Any

import torch

__all__ = ['as_float', 'check_logits', 'check_positive', 'check_share', 'hard_labels', 'kl']


def as_float(x: torch.Tensor) -> torch.Tensor:
    """Convert a tensor to at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_logits(logits: torch.Tensor, teacher_logits: torch.Tensor) -> None:
    """Raise ValueError unless both are (B, K) with equal samples and classes."""
    if logits.ndim != 2 or logits.shape != teacher_logits.shape:
        raise ValueError(f'student logits {tuple(logits.shape)} and teacher logits {tuple(teacher_logits.shape)} must '
                         f'be (B, K), of the same samples and classes.')


def check_positive(**values: float) -> None:
    """Raise ValueError, naming the argument, unless all values are positive."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f'{name}={value}: must be positive.')


def check_share(**values: float) -> None:
    """Raise ValueError, naming the argument, unless all values are in [0, 1]."""
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f'{name}={value}: must lie in [0, 1].')


def hard_labels(target: torch.Tensor, logits: torch.Tensor, loss: Any) -> torch.Tensor:
    """Return labels (B,), or raise an error for soft targets.

    Args:
        target: Labels.
        logits: Logits of the same samples, (..., B, K).
        loss: Name of the loss, for the message.

    Raises:
        ValueError: target is not a vector of whole numbers, one per sample.
    """
    if target.shape != logits.shape[-2:-1] or target.is_floating_point():
        raise ValueError(f"loss '{loss}' needs one label per sample, (B,) whole numbers, got {tuple(target.shape)} "
                         f'{target.dtype}: mixup and cutmix, which make soft targets, do not go with it.')
    return target


def kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Return KL(p || q) over the last axis, from log-probabilities."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)
