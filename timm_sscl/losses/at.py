"""Attention transfer: compare where feature maps are active (Zagoruyko 2017)."""
import torch

from .inputs import TrainStep
from .maps import check_features, same_size, time_mean
from .registry import register_loss

__all__ = ['attention_map', 'attention_transfer']


def attention_map(x: torch.Tensor) -> torch.Tensor:
    """Return the attention map of a feature map (B, C, ...): the mean of x^2 over the channels, (B, positions),
    normalised per sample to unit length.
    """
    x = x.square().mean(1).flatten(1)
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x / torch.where(norm > 0, norm, torch.ones_like(norm))  # a silent map stays 0


@register_loss('at', needs_features=True, minimum='teacher')
def attention_transfer(step: TrainStep) -> torch.Tensor:
    """Return the sum over the taps of the mean squared difference of the attention maps. The paper weights it by 1000.

    The student's map is computed from its feature averaged over time. With the mean of squares over time, the map of
    spikes would be their firing rate. Taps without spatial positions, such as the pooled feature, contribute nothing.

    Raises:
        ValueError: No tap has spatial positions, or the taps do not fit.
    """
    pairs = check_features(step.student_features, step.teacher_features)
    maps = [same_size(time_mean(s), time_mean(a)) for s, a in pairs if s.ndim > 3]
    if not maps:
        raise ValueError("loss 'at' compares feature maps (T, B, C, H, W); no tap has one.")
    return torch.stack([(attention_map(s) - attention_map(a)).square().mean() for s, a in maps]).sum()
