"""Contrastive critics: each returns a loss to minimise for one pair of projected features."""
import math
from typing import Optional, Union

import torch
import torch.nn.functional as F

__all__ = ['nce_loss', 'info_nce_loss', 'mi_lower_bound']


def _scores(
        s: torch.Tensor,
        a: torch.Tensor,
        temperature: float,
        queue: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Return s_i . a_j / temperature of the L2-normalised rows, at least float32. A zero row stays zero.

    The shape is (N, N), or (N, N + Q) with the rows of a queue appended to a.
    """
    if s.ndim != 2 or s.shape != a.shape or s.shape[0] < 1:
        raise ValueError(f's {tuple(s.shape)} and a {tuple(a.shape)} must both be (N, d), row i of one image.')
    if queue is not None and (queue.ndim != 2 or queue.shape[1] != a.shape[1]):
        raise ValueError(f'queue {tuple(queue.shape)} must be (Q, d) with the d of a {tuple(a.shape)}.')
    if not temperature > 0:
        raise ValueError(f'temperature={temperature}: must be positive.')
    with torch.autocast(s.device.type, enabled=False):
        a = a if queue is None else torch.cat([a, queue.to(a.dtype)])
        s, a = (x.float() if x.dtype in (torch.float16, torch.bfloat16) else x for x in (s, a))
        return _unit_rows(s) @ _unit_rows(a).mT / temperature


def _unit_rows(x: torch.Tensor) -> torch.Tensor:
    """Normalise rows to unit length; zero rows stay zero and get no gradient."""
    # divide by the row's largest value first, since its square may exceed the range of float32
    largest = torch.linalg.vector_norm(x.detach(), math.inf, dim=1, keepdim=True)
    x = x / torch.where(largest > 0, largest, torch.ones_like(largest))
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    # F.normalize would give a zero row (a silent sample) a gradient of 1e12
    return x / torch.where(norm > 0, norm, torch.ones_like(norm))


def _need_negatives(n: int, what: str) -> None:
    """Raise ValueError for a batch of one sample, which has no negatives."""
    if n < 2:
        raise ValueError(f'the {what} critic needs a batch of at least 2 samples (1 negative), got {n}.')


def _log(x: Union[float, torch.Tensor]) -> Union[float, torch.Tensor]:
    return x.log() if isinstance(x, torch.Tensor) else math.log(x)


def _log_mean(scores: torch.Tensor, of: torch.Tensor, count: Union[int, torch.Tensor]) -> torch.Tensor:
    """Return the log of the mean of e^score over the `count` pairs where `of` is True, without a gradient."""
    return scores.detach().masked_fill(~of, -math.inf).flatten().logsumexp(0) - _log(count)


def _counted(scores: torch.Tensor, queue_mask: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
    """Return which columns of the scores count, (N + Q,); None if all do."""
    if queue_mask is None:
        return None
    n = scores.shape[0]
    if queue_mask.shape != (scores.shape[1] - n,):
        raise ValueError(f'queue_mask {tuple(queue_mask.shape)} must be ({scores.shape[1] - n},), one entry per row of '
                         f'the queue.')
    return torch.cat([queue_mask.new_ones(n), queue_mask])


def nce_loss(
        s: torch.Tensor,
        a: torch.Tensor,
        temperature: float = 0.1,
        num_pairs: Optional[float] = None,
        normalize: bool = True,
        queue: Optional[torch.Tensor] = None,
        queue_mask: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Return the noise-contrastive loss -L_NCE between student and teacher features, Eq. 17 with the critic of Eq. 19.

        loss = -(1/N) sum_i [ log h_ii + sum_{j != i} log(1 - h_ij) ],   h = sigmoid(logit)

        literal     logit = s.a/t - log(N / num_pairs)                    Eq. 19 as printed
        normalised  logit = s.a/t - log K - log m,   K = N - 1            the critic's source, CRD (Tian 2019)

    m is the mean of e^{s.a/t} over all negatives, without a gradient; the data set's size cancels in it. A queue of Q
    teacher rows adds Q negatives to every row: the sum includes them, K = N - 1 + Q, and N in Eq. 19 becomes N + Q.

    Args:
        s: Projected student features, shape (N, d). Rows are L2-normalised here.
        a: Projected teacher features, shape (N, d). Row i is of the same image as row i of s.
        temperature: t.
        num_pairs: M of Eq. 19, "the total number of possible pairs"; N * (N + Q) by default. Literal critic only.
        normalize: Whether to use the normalised critic instead of the literal one.
        queue: Further negatives, projected teacher features of other images, shape (Q, d).
        queue_mask: Which rows of the queue count, boolean, shape (Q,); all by default.

    Returns:
        0-d tensor, to be minimised.

    Raises:
        ValueError: The shapes differ, temperature or num_pairs is not positive, num_pairs is given with the normalised
            critic, or the normalised critic has no negatives (N = 1).
    """
    scores = _scores(s, a, temperature, queue)
    n, columns = scores.shape
    positive = torch.eye(n, columns, dtype=torch.bool, device=scores.device)
    counted = _counted(scores, queue_mask)
    num_candidates = columns if counted is None else counted.sum().to(scores.dtype)  # per row
    if normalize:
        if num_pairs is not None:
            raise ValueError(f'num_pairs={num_pairs}: the normalised critic has no M; use normalize=False with it.')
        _need_negatives(n, 'normalised')
        negative = ~positive if counted is None else ~positive & counted
        logits = scores - _log(num_candidates - 1) - _log_mean(scores, negative, n * (num_candidates - 1))
    else:
        pairs = n * num_candidates if num_pairs is None else num_pairs
        if not pairs > 0:
            raise ValueError(f'num_pairs={pairs}: must be positive.')
        logits = scores - _log(num_candidates / pairs)
    terms = F.logsigmoid(torch.where(positive, logits, -logits))
    terms = terms if counted is None else terms.masked_fill(~counted, 0.)
    return -terms.sum() / n


def info_nce_loss(
        s: torch.Tensor,
        a: torch.Tensor,
        temperature: float = 0.1,
        queue: Optional[torch.Tensor] = None,
        queue_mask: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Return InfoNCE: softmax cross-entropy over each row, averaged over both directions (student to teacher and back).

        loss = -1/(2N) sum_i [ log(e^z_ii / sum_j e^z_ij) + log(e^z_ii / sum_j e^z_ji) ],   z_ij = s_i.a_j / temperature

    The rows of a queue are negatives for the student's rows. The direction from teacher to student has only the batch.

    Args:
        s: Projected student features, shape (N, d). Rows are L2-normalised here.
        a: Projected teacher features, shape (N, d).
        temperature: Temperature of the softmax.
        queue: Further negatives, projected teacher features of other images, shape (Q, d).
        queue_mask: Which rows of the queue count, boolean, shape (Q,); all by default.

    Returns:
        0-d tensor, to be minimised.

    Raises:
        ValueError: The shapes differ, temperature is not positive, or N = 1.
    """
    scores = _scores(s, a, temperature, queue)
    n = scores.shape[0]
    _need_negatives(n, 'InfoNCE')
    counted = _counted(scores, queue_mask)
    forth = scores if counted is None else scores.masked_fill(~counted, -math.inf)
    target = torch.arange(n, device=scores.device)
    return (F.cross_entropy(forth, target) + F.cross_entropy(scores[:, :n].mT, target)) / 2


def mi_lower_bound(
        loss: torch.Tensor,
        num_samples: Union[float, torch.Tensor],
        info_nce: bool = False,
) -> torch.Tensor:
    """Return the lower bound on the mutual information I(S; A) that a contrastive loss implies, Eq. 16, in nats.

    Args:
        loss: Value of `nce_loss` (bound log K - loss) or, with info_nce, of `info_nce_loss` (bound log(K + 1) - loss).
        num_samples: Batch size N of the loss, with a queue N + Q; K = num_samples - 1.
        info_nce: Whether the loss is `info_nce_loss`.

    Returns:
        0-d tensor; only an estimate if the critic's mean is taken from the same batch.
    """
    k = num_samples if info_nce else num_samples - 1
    return _log(k.clamp(min=1) if isinstance(k, torch.Tensor) else max(k, 1)) - loss
