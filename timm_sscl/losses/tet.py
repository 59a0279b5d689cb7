"""Temporal efficient training: cross-entropy at every timestep."""
import torch
import torch.nn as nn
import torch.nn.functional as F

from .registry import register_loss
from .inputs import TrainStep

__all__ = ['TETLoss', 'tet_loss']


def tet_loss(
        step_logits: torch.Tensor,
        target: torch.Tensor,
        mse_share: float = 0.05,
        smoothing: float = 0.,
        level: float = 1.,
) -> torch.Tensor:
    """Return the loss of temporal efficient training (TET, Deng 2022), in which every timestep is classified
    separately.

        loss = (1 - l) * mean_t CE(o_t, y) + l * mean (o - level)^2

    Args:
        step_logits: Logits of every timestep o, (T, B, K).
        target: Labels (B,) or soft targets (B, K), e.g. from mixup.
        mse_share: l, the share of the term that keeps all outputs near one level; 0 gives the mean cross-entropy of the
            timesteps. TET uses 0.05 for CIFAR and 0.001 for CIFAR10-DVS.
        smoothing: Label smoothing of labels; soft targets are not smoothed.
        level: Level of the outputs, TET's firing threshold.

    Returns:
        0-d tensor, at least float32, the mean over the batch.

    Raises:
        ValueError: step_logits is not (T, B, K), or target is neither (B,) nor (B, K).
    """
    if step_logits.ndim != 3 or target.shape not in (step_logits.shape[1:2], step_logits.shape[1:]):
        raise ValueError(f'step_logits {tuple(step_logits.shape)} must be (T, B, K), and target '
                         f'{tuple(target.shape)} labels (B,) or soft targets (B, K).')
    step_logits = step_logits.to(torch.promote_types(step_logits.dtype, torch.float32))
    timesteps = step_logits.shape[0]
    target = target.repeat(timesteps, *(1,) * (target.ndim - 1))
    smoothing = 0. if target.ndim > 1 else smoothing
    cross_entropy = F.cross_entropy(step_logits.flatten(0, 1), target, label_smoothing=smoothing)
    if mse_share == 0:
        return cross_entropy
    return (1 - mse_share) * cross_entropy + mse_share * (step_logits - level).square().mean()


@register_loss('tet')
class TETLoss(nn.Module):
    """`tet_loss` of the student's logits at every timestep. It classifies by itself; use it with --task-loss-weight 0.

    Args:
        mse_share: Share of the term on the outputs' level, in [0, 1].
        smoothing: Label smoothing of labels, in [0, 1).

    Raises:
        ValueError: An option is out of range.
    """

    def __init__(self, mse_share: float = 0.05, smoothing: float = 0.):
        super().__init__()
        if not 0 <= mse_share <= 1:
            raise ValueError(f'mse_share={mse_share}: must lie in [0, 1].')
        if not 0 <= smoothing < 1:
            raise ValueError(f'smoothing={smoothing}: must lie in [0, 1).')
        self.mse_share = mse_share
        self.smoothing = smoothing

    def forward(self, step: TrainStep) -> torch.Tensor:
        return tet_loss(step.step_logits, step.target, self.mse_share, self.smoothing)
