"""Similarity of two representations: HSIC, CKA and its running mini-batch form (Kornblith 2019, Nguyen 2020)."""
from typing import Tuple

import torch
import torch.distributed as dist
import torch.nn as nn

from .distributed import world_size

__all__ = ['hsic', 'cka', 'gram_matrix', 'hsic_terms', 'RunningCKA']


def gram_matrix(x: torch.Tensor) -> torch.Tensor:
    """Gram matrix of features flattened per sample and centred over the batch, summed over the time steps.

    Summing over T equals flattening time into the features, without the copy that would need. Centring does not change
    the unbiased HSIC, and float32 would lose two digits without it on non-negative features. A feature that is the same
    for all samples gives exact zeros.

    Args:
        x: Features, shape (T, n, ...); T = 1 for a network without time.

    Returns:
        Symmetric matrix, shape (n, n), float32 at least, autocast or not.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = x.flatten(2) if x.ndim > 2 else x.unsqueeze(2)
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        x = x - x[:, :1]  # exact zeros for a constant feature, which the mean alone does not promise
        x.sub_(x.mean(1, keepdim=True))  # on the difference just made: no second copy
        return torch.bmm(x, x.mT).sum(0)


def hsic(K: torch.Tensor, L: torch.Tensor, unbiased: bool = True) -> torch.Tensor:
    """Hilbert-Schmidt independence criterion of two Gram matrices.

    Args:
        K: Gram matrix, shape (n, n).
        L: Gram matrix, shape (n, n).
        unbiased: The unbiased estimator HSIC_1 (Eq. 9, Song 2012), which may be negative and needs n >= 4; otherwise
            tr(K H L H) / (n - 1)^2 (Gretton 2005), which needs n >= 2.

    Returns:
        0-d tensor.

    Raises:
        ValueError: K and L are not square matrices of one size, or the batch is too small.
    """
    if K.ndim != 2 or K.shape[0] != K.shape[1] or K.shape != L.shape:
        raise ValueError(f'K {tuple(K.shape)} and L {tuple(L.shape)} must be Gram matrices of the same n samples.')
    n = K.shape[0]
    if n < (4 if unbiased else 2):
        raise ValueError(f'the {"unbiased" if unbiased else "biased"} HSIC needs a batch of at least '
                         f'{4 if unbiased else 2} samples, got {n}.')
    if not unbiased:
        K = K - K.mean(0, keepdim=True)
        L = L - L.mean(0, keepdim=True)
        return (K * L.mT).sum() / (n - 1) ** 2
    K = K - torch.diag(K.diagonal())
    L = L - torch.diag(L.diagonal())
    rows_k, rows_l = K.sum(1), L.sum(1)
    trace = (K * L.mT).sum()
    totals = rows_k.sum() * rows_l.sum() / ((n - 1) * (n - 2))
    cross = 2 / (n - 2) * (K.sum(0) * rows_l).sum()  # no matmul: autocast would round it
    return (trace + totals - cross) / (n * (n - 3))


def hsic_terms(K: torch.Tensor, L: torch.Tensor, unbiased: bool = True) -> torch.Tensor:
    """The three terms of a CKA, HSIC(K, L), HSIC(K, K) and HSIC(L, L), as one tensor of shape (3,).

    A self term that is no more than round-off of its Gram matrix is 0: a silent tap, or one where a single sample is
    active, leaves exactly 0 in exact arithmetic.
    """
    return torch.stack([hsic(K, L, unbiased), _self_term(K, unbiased), _self_term(L, unbiased)])


def _self_term(K: torch.Tensor, unbiased: bool) -> torch.Tensor:
    term = hsic(K, K, unbiased)
    # entries carry an error of some eps * max|K|; p random features leave max|K|^2 / p, which is far above
    noise = 64 * torch.finfo(K.dtype).eps * K.abs().max()
    return torch.where(term > noise * noise, term, torch.zeros_like(term))


def _ratio(terms: torch.Tensor) -> torch.Tensor:
    # the square roots apart: the product of two small HSICs would underflow in float32
    scale = terms[1].clamp(min=0).sqrt() * terms[2].clamp(min=0).sqrt()
    return torch.where(scale > 0, terms[0] / scale, torch.full_like(scale, torch.nan))


def cka(x: torch.Tensor, y: torch.Tensor, unbiased: bool = True) -> torch.Tensor:
    """Centred kernel alignment of two sets of features with a linear kernel, Eq. 8 with the root of its source.

        CKA = HSIC(K, L) / sqrt(HSIC(K, K) * HSIC(L, L)),   K = x x^T, L = y y^T

    Args:
        x: Features of n samples, shape (n, ...), flattened per sample.
        y: Features of the same n samples, shape (n, ...); the sizes behind n may differ from x's.
        unbiased: Whether to use the unbiased HSIC (n >= 4, the value may be negative) or the biased one.

    Returns:
        0-d tensor: the plain ratio, 1 for x against itself, nan where a side's own HSIC is 0 (all samples alike).

    Raises:
        ValueError: The batches differ, or n is too small.
    """
    if x.ndim < 1 or y.ndim < 1 or x.shape[0] != y.shape[0]:
        raise ValueError(f'x {tuple(x.shape)} and y {tuple(y.shape)} must hold the same number of samples.')
    return _ratio(hsic_terms(gram_matrix(x.unsqueeze(0)), gram_matrix(y.unsqueeze(0)), unbiased))


def _mean_over_processes(terms: torch.Tensor) -> torch.Tensor:
    """Mean of the terms over the processes that have some (not nan); every process takes part."""
    if world_size() == 1:
        return terms
    known = ~torch.isnan(terms).any()
    sums = torch.cat([torch.nan_to_num(terms), known.to(terms.dtype).view(1)]).float()
    dist.all_reduce(sums)
    return sums[:3] / sums[3]


class RunningCKA(nn.Module):
    """CKA across mini-batches (Nguyen 2020): exponential means of the three HSIC terms, divided after averaging.

    The means are bias-corrected, buffers (so in the checkpoint), and move in training mode only. Where a process group
    is running, each term is averaged over the processes' own batches first.

    Args:
        momentum: Share of the newest batch in the means, in (0, 1]; 1 uses this batch only.
    """

    def __init__(self, momentum: float = 0.1):
        super().__init__()
        if not 0 < momentum <= 1:
            raise ValueError(f'momentum={momentum}: the share of the newest batch must lie in (0, 1].')
        self.momentum = momentum
        self.register_buffer('mean_terms', torch.zeros(3))
        self.register_buffer('mean_weight', torch.zeros(()))

    @property
    def terms(self) -> torch.Tensor:
        """Bias-corrected means of HSIC(K, L), HSIC(K, K), HSIC(L, L), shape (3,); nan before the first batch."""
        return self.mean_terms / self.mean_weight

    @property
    def value(self) -> torch.Tensor:
        """Running CKA, the ratio of the means; nan before the first batch or where a side never varied."""
        return _ratio(self.terms)

    @torch.no_grad()
    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Take in one batch.

        Args:
            student: Student features, shape (T, n, ...).
            teacher: Teacher features, shape (T', n, ...).

        Returns:
            CKA of this batch and running CKA (in evaluation mode the running value as training left it), 0-d each.

        Raises:
            ValueError: Fewer than 4 samples; one of several processes may have fewer, and leaves it to the others.
        """
        if student.shape[1] < 4 and world_size() > 1:  # too small for the unbiased HSIC, but others' batch may not be
            terms = torch.full((3,), torch.nan, device=student.device)
        else:
            terms = hsic_terms(gram_matrix(student), gram_matrix(teacher))
        terms = _mean_over_processes(terms)
        if self.training:
            known = ~torch.isnan(terms).any()  # no branch on it: it would break a compiled graph
            share = self.momentum * known.to(self.mean_terms.dtype)
            self.mean_terms.lerp_(terms.nan_to_num().to(self.mean_terms.dtype), share)
            self.mean_weight.lerp_(torch.ones_like(self.mean_weight), share)
        return _ratio(terms), self.value

    def extra_repr(self) -> str:
        return f'momentum={self.momentum}'
