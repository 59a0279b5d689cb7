"""CKA as a loss: features should be equal up to rotation and scale (Kornblith 2019)."""
import torch

from timm_sscl.distributed import gather_rows

from .cka import _scaled_gram, hsic_terms
from .inputs import TrainStep
from .maps import check_features
from .registry import register_loss

__all__ = ['cka_loss', 'cka_of_taps']


def cka_loss(student: torch.Tensor, teacher: torch.Tensor, unbiased: bool = True) -> torch.Tensor:
    """Return 1 - CKA of two features, each flattened over its timesteps.

    If a side is equal for all samples, for example a silent tap, CKA counts as 0 and has no gradient.

    Args:
        student: Student feature, (T, N, ...).
        teacher: Teacher feature, (T', N, ...).
        unbiased: Whether to use the unbiased HSIC, which needs N >= 4 and may be negative.

    Returns:
        0-d tensor, at least float32; 0 if the features are equal up to rotation and scale.

    Raises:
        ValueError: N is too small.
    """
    (K, _), (L, _) = _scaled_gram(student), _scaled_gram(teacher)
    between, own_k, own_l = hsic_terms(K, L, unbiased)
    known = (own_k > 0) & (own_l > 0)
    one = torch.ones_like(own_k)
    scale = torch.where(known, own_k, one).sqrt() * torch.where(known, own_l, one).sqrt()
    return 1 - torch.where(known, between, torch.zeros_like(between)) / scale


@register_loss('cka', needs_features=True, global_batch=True, minimum='teacher')
def cka_of_taps(step: TrainStep, unbiased: bool = True) -> torch.Tensor:
    """Return the mean of `cka_loss` over the taps, on the whole features of the global batch.

    With several processes, the features are sent to all of them.

    Args:
        step: Training step.
        unbiased: Whether to use the unbiased HSIC, which needs a batch of 4. The biased CKA tends to 1 if a feature has
            many more numbers than the batch has samples.

    Raises:
        ValueError: The taps do not fit, or the batch is too small.
    """
    terms = []
    for s, a in check_features(step.student_features, step.teacher_features):
        s, a = (gather_rows(x.transpose(0, 1)).transpose(0, 1) for x in (s, a))
        terms.append(cka_loss(s, a, unbiased))
    return torch.stack(terms).mean()
