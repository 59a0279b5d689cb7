"""Similarity-preserving distillation: match which samples of a batch are similar (Tung 2019)."""
import torch

from timm_sscl.distributed import gather_rows

from .inputs import TrainStep
from .maps import check_features, time_mean
from .registry import register_loss

__all__ = ['similarity_loss', 'similarity_preserving']


def similarity_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return the mean squared difference of the row-normalised Gram matrices of two features, (N, p) and (N, q)."""
    student, teacher = (_normalised_gram(x) for x in (student, teacher))
    return (student - teacher).square().mean()


def _normalised_gram(x: torch.Tensor) -> torch.Tensor:
    gram = x @ x.mT
    norm = torch.linalg.vector_norm(gram, dim=1, keepdim=True)
    return gram / torch.where(norm > 0, norm, torch.ones_like(norm))


@register_loss('sp', needs_features=True, global_batch=True, minimum='teacher')
def similarity_preserving(step: TrainStep) -> torch.Tensor:
    """Return the sum over the taps of `similarity_loss` of the features averaged over time. The paper weights it by
    3000.

    With several processes, the features of the global batch are sent to all of them.

    Raises:
        ValueError: The taps do not fit.
    """
    terms = []
    for s, a in check_features(step.student_features, step.teacher_features):
        with torch.autocast(s.device.type, enabled=False):
            rows = [gather_rows(time_mean(x).flatten(1)) for x in (s, a)]
            terms.append(similarity_loss(*rows))
    return torch.stack(terms).sum()
