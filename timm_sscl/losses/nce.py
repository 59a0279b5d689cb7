"""Contrastive critics: each returns a loss to minimise for one pair of projected features."""
import math
from typing import Optional

import torch
import torch.nn.functional as F

__all__ = ['nce_loss', 'info_nce_loss', 'mi_lower_bound']


def _scores(s: torch.Tensor, a: torch.Tensor, temperature: float) -> torch.Tensor:
    """s_i . a_j / temperature of the L2-normalised rows, (N, N), float32 at least; a zero row stays zero."""
    if s.ndim != 2 or s.shape != a.shape or s.shape[0] < 1:
        raise ValueError(f's {tuple(s.shape)} and a {tuple(a.shape)} must both be (N, d), row i of one image.')
    if not temperature > 0:
        raise ValueError(f'temperature={temperature}: must be positive.')
    with torch.autocast(s.device.type, enabled=False):
        s, a = (x.float() if x.dtype in (torch.float16, torch.bfloat16) else x for x in (s, a))
        return _unit_rows(s) @ _unit_rows(a).mT / temperature


def _unit_rows(x: torch.Tensor) -> torch.Tensor:
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    # F.normalize would give a zero row (a silent sample) a gradient of 1e12
    return x / torch.where(norm > 0, norm, torch.ones_like(norm))


def _need_negatives(n: int, what: str) -> None:
    if n < 2:
        raise ValueError(f'the {what} critic needs a batch of at least 2 samples (1 negative), got {n}.')


def _log_mean_negative(scores: torch.Tensor) -> torch.Tensor:
    """log of the mean of e^score over all off-diagonal pairs, without a gradient."""
    n = scores.shape[0]
    negatives = scores.detach().masked_fill(torch.eye(n, dtype=torch.bool, device=scores.device), -math.inf)
    return negatives.flatten().logsumexp(0) - math.log(n * (n - 1))


def nce_loss(
        s: torch.Tensor,
        a: torch.Tensor,
        temperature: float = 0.1,
        num_pairs: Optional[float] = None,
        normalize: bool = True,
) -> torch.Tensor:
    """Noise-contrastive loss -L_NCE between student and teacher features, Eq. 17 with the critic of Eq. 19.

        loss = -(1/N) sum_i [ log h_ii + sum_{j != i} log(1 - h_ij) ],   h = sigmoid(logit)

        literal     logit = s.a/t - log(N / num_pairs)                    Eq. 19 to the letter
        normalised  logit = s.a/t - log K - log m,   K = N - 1            the critic's source, CRD (Tian 2019)

    with m the mean of e^{s.a/t} over all negatives, taken without a gradient; the data set's size cancels in it.

    Args:
        s: Projected student features, shape (N, d); rows are L2-normalised here.
        a: Projected teacher features, shape (N, d), row i of the same image as s's row i.
        temperature: t.
        num_pairs: M of Eq. 19, "the total number of possible pairs"; N * N by default. Literal critic only.
        normalize: The normalised critic, or the literal one.

    Returns:
        0-d tensor, to be minimised.

    Raises:
        ValueError: The shapes differ, temperature or num_pairs is not positive, num_pairs is given to the normalised
            critic, or the normalised critic has no negatives (N = 1).
    """
    scores = _scores(s, a, temperature)
    n = scores.shape[0]
    if normalize:
        if num_pairs is not None:
            raise ValueError(f'num_pairs={num_pairs}: the normalised critic has no M; use normalize=False with it.')
        _need_negatives(n, 'normalised')
        logits = scores - math.log(n - 1) - _log_mean_negative(scores)
    else:
        num_pairs = n * n if num_pairs is None else num_pairs
        if not num_pairs > 0:
            raise ValueError(f'num_pairs={num_pairs}: must be positive.')
        logits = scores - math.log(n / num_pairs)
    positive = torch.eye(n, dtype=torch.bool, device=logits.device)
    return -F.logsigmoid(torch.where(positive, logits, -logits)).sum() / n


def info_nce_loss(s: torch.Tensor, a: torch.Tensor, temperature: float = 0.1) -> torch.Tensor:
    """InfoNCE: softmax cross-entropy over the row, the mean of both directions (student to teacher and back).

    Args:
        s: Projected student features, shape (N, d); rows are L2-normalised here.
        a: Projected teacher features, shape (N, d).
        temperature: Temperature of the softmax.

    Returns:
        0-d tensor, to be minimised.

    Raises:
        ValueError: The shapes differ, temperature is not positive, or N = 1.
    """
    scores = _scores(s, a, temperature)
    _need_negatives(scores.shape[0], 'InfoNCE')
    target = torch.arange(scores.shape[0], device=scores.device)
    return (F.cross_entropy(scores, target) + F.cross_entropy(scores.mT, target)) / 2


def mi_lower_bound(loss: torch.Tensor, num_samples: int, info_nce: bool = False) -> torch.Tensor:
    """Lower bound on the mutual information I(S; A) that a contrastive loss gives, Eq. 16, in nats.

    Args:
        loss: Value of `nce_loss` (bound log K - loss) or, with info_nce, of `info_nce_loss` (bound log(K + 1) - loss).
        num_samples: Batch N of the loss; K = N - 1 negatives.
        info_nce: Which of the two losses it is.

    Returns:
        0-d tensor; an estimate where the critic's mean comes from the same batch.
    """
    return math.log(num_samples if info_nce else max(num_samples - 1, 1)) - loss
