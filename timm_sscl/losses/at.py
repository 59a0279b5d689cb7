"""Attention transfer: where a feature map is active (Zagoruyko 2017)."""
import torch

from .inputs import TrainStep
from .maps import check_features, same_size, time_mean
from .registry import register_loss

__all__ = ['attention_map', 'attention_transfer']


def attention_map(x: torch.Tensor) -> torch.Tensor:
    """Return the mean of x^2 over the channels of a map (B, C, ...), (B, places), of length 1 per sample."""
    x = x.square().mean(1).flatten(1)
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x / torch.where(norm > 0, norm, torch.ones_like(norm))  # a silent map stays 0


@register_loss('at', needs_features=True, minimum='teacher')
def attention_transfer(step: TrainStep) -> torch.Tensor:
    """Sum over the taps of the mean squared difference of the attention maps; its source weighs it with 1000.

    The student's map is that of its mean over time: the mean of the squares over time would be, for spikes, the firing
    rate. Taps without places, as the pooled feature, count nothing.

    Raises:
        ValueError: No tap has places, or the taps do not fit.
    """
    pairs = check_features(step.student_features, step.teacher_features)
    maps = [same_size(time_mean(s), time_mean(a)) for s, a in pairs if s.ndim > 3]
    if not maps:
        raise ValueError("loss 'at' compares feature maps (T, B, C, H, W); no tap has one.")
    return torch.stack([(attention_map(s) - attention_map(a)).square().mean() for s, a in maps]).sum()
