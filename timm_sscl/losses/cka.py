"""Similarity of two representations: HSIC, CKA and its running mini-batch form (Kornblith 2019, Nguyen 2020)."""
import math
from typing import Optional, Sequence, Tuple

import torch
import torch.distributed as dist
import torch.nn as nn

from timm_sscl.distributed import batch_counts, blocks_in_turn, world_size

__all__ = ['hsic', 'cka', 'gram_matrix', 'hsic_matrix', 'hsic_terms', 'RunningCKA', 'CKA_SCOPES']

CKA_SCOPES = ('process', 'global')


def gram_matrix(x: torch.Tensor) -> torch.Tensor:
    """Return the Gram matrix of features flattened per sample and centred over the batch, summed over the timesteps.

    Summing over T equals flattening time into the features, without the copy that this needs. Centring does not change
    the unbiased HSIC; without it, float32 would lose two digits on non-negative features. A feature that is equal for
    all samples gives exact zeros.

    Args:
        x: Features, shape (T, n, ...); T = 1 for a network without time.

    Returns:
        Symmetric matrix, shape (n, n), at least float32, also under autocast.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = _centred(x)
        return torch.bmm(x, x.mT).sum(0)


def _as_float(x: torch.Tensor, name: str) -> torch.Tensor:
    """Convert a tensor to at least float32, since spikes may be bool or uint8."""
    if x.is_complex():
        raise ValueError(f'{name} is complex; HSIC and CKA take real features.')
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _flat(x: torch.Tensor) -> torch.Tensor:
    """Reshape (T, n, ...) to (T, n, p), at least float32."""
    return _as_float(x.flatten(2) if x.ndim > 2 else x.unsqueeze(2), 'a feature')


def _centred(x: torch.Tensor) -> torch.Tensor:
    """Reshape (T, n, ...) to (T, n, p) and subtract the mean over the samples. Returns a new tensor."""
    x = _flat(x)
    x = x - x[:, :1]  # gives exact zeros for a constant feature, which subtracting the mean does not
    return x.sub_(x.mean(1, keepdim=True))  # in place, to avoid a second copy


def _largest(x: torch.Tensor) -> torch.Tensor:
    """Return the largest absolute value, 0-d, without a gradient."""
    return torch.linalg.vector_norm(x.detach(), math.inf) if x.numel() else x.new_zeros(())


def _exponent(largest: torch.Tensor) -> torch.Tensor:
    """Return a whole number e, as a float, with 2^e near `largest`; 0 for 0."""
    return torch.where(largest > 0, largest.log2().floor(), torch.zeros_like(largest))


def _scaled_gram(x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return (K, e): `gram_matrix` of the features divided by 2^e, whose largest value is then near 1.

    HSIC(K, K) contains the fourth power of a feature's scale, which would exceed the range of float32. Dividing by a
    power of two does not round.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = _centred(x)
        exponent = _exponent(_largest(x))
        x.div_(exponent.exp2())
        return torch.bmm(x, x.mT).sum(0), exponent


def _unscaled(terms: torch.Tensor, exponent_x: torch.Tensor, exponent_y: torch.Tensor) -> torch.Tensor:
    """Convert HSIC terms of features divided by 2^e to those of the features; float64, for its range, if the device has
    it.
    """
    dtype = torch.float32 if terms.device.type == 'mps' else torch.float64
    x, y = exponent_x.to(dtype), exponent_y.to(dtype)
    return terms.to(dtype) * torch.stack([2 * x + 2 * y, 4 * x, 4 * y]).exp2()


def hsic(K: torch.Tensor, L: torch.Tensor, unbiased: bool = True) -> torch.Tensor:
    """Return the Hilbert-Schmidt independence criterion of two Gram matrices, in at least float32.

    Args:
        K: Gram matrix, shape (n, n), of any real dtype.
        L: Gram matrix, shape (n, n).
        unbiased: Whether to use the unbiased estimator HSIC_1 (Eq. 9, Song 2012), which may be negative and needs n >=
            4; otherwise tr(K H L H) / (n - 1)^2 (Gretton 2005), which needs n >= 2.

    Returns:
        0-d tensor.

    Raises:
        ValueError: K and L are not square matrices of equal size, one is complex, or the batch is too small.
    """
    K, L = _as_float(K, 'K'), _as_float(L, 'L')
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
    cross = (K.sum(0) * rows_l).sum()  # not a matmul, which autocast would round
    return _unbiased_hsic((K * L.mT).sum(), rows_k.sum(), rows_l.sum(), cross, n)


def _unbiased_hsic(trace, total_k, total_l, cross, n: int) -> torch.Tensor:
    """Evaluate Eq. 9 from sums over matrices without their diagonals: tr(K L), 1'K 1, 1'L 1 and 1'K L 1."""
    return (trace + total_k * total_l / ((n - 1) * (n - 2)) - 2 / (n - 2) * cross) / (n * (n - 3))


def hsic_matrix(K: torch.Tensor, L: torch.Tensor) -> torch.Tensor:
    """Return the unbiased HSIC of every pair of two stacks of Gram matrices of the same n samples.

    Args:
        K: Gram matrices, shape (S, n, n), n >= 4.
        L: Gram matrices, shape (A, n, n).

    Returns:
        Tensor of shape (S, A).
    """
    n = K.shape[-1]
    K, L = (M - torch.diag_embed(M.diagonal(dim1=1, dim2=2)) for M in (K, L))
    rows_k, rows_l = K.sum(2), L.sum(2)
    traces = K.flatten(1) @ L.mT.flatten(1).T
    return _unbiased_hsic(traces, rows_k.sum(1, keepdim=True), rows_l.sum(1), K.sum(1) @ rows_l.T, n)


def hsic_terms(K: torch.Tensor, L: torch.Tensor, unbiased: bool = True) -> torch.Tensor:
    """Return the three terms of a CKA, HSIC(K, L), HSIC(K, K) and HSIC(L, L), as one tensor of shape (3,).

    A self term that is within the rounding error of its Gram matrix is set to 0. In exact arithmetic it is 0 for a
    silent tap, or if a single sample is active.
    """
    self_terms = [_above_noise(hsic(M, M, unbiased), M.abs().max()) for M in (K, L)]
    return torch.stack([hsic(K, L, unbiased), *self_terms])


def _above_noise(term: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """Return a self term, or 0 if it is within the rounding error of a Gram matrix with this largest entry."""
    # the error of an entry is some eps * max|K|; p random features give max|K|^2 / p, which is far larger
    noise = 64 * torch.finfo(largest.dtype).eps * largest
    return torch.where(term > noise * noise, term, torch.zeros_like(term))


def global_hsic_terms(x: torch.Tensor, y: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Return the unbiased `hsic_terms` of the samples of all processes together, equal on every process.

    Every process computes its rows of the Gram matrices block by block, while the features of one other process at a
    time are sent to it. Otherwise only sums over rows are exchanged. No process holds all features or a whole Gram
    matrix.

    Args:
        x: This process's features, shape (T, n, ...).
        y: This process's features of the other network, shape (T', n, ...).
        counts: n of every process, by rank; their sum N must be at least 4.

    Returns:
        Tensor of shape (3,), float64 if the device has it.
    """
    with torch.autocast(x.device.type, enabled=False):
        x, y = _globally_centred(_flat(x), counts), _globally_centred(_flat(y), counts)
        scales = torch.stack([_largest(x), _largest(y)])
        dist.all_reduce(scales, dist.ReduceOp.MAX)
        exponents = _exponent(scales)
        x, y = (z.div_(exponent.exp2().to(z.dtype)) for z, exponent in zip((x, y), exponents))
        traces, rows, largest = x.new_zeros(3), x.new_zeros(2, x.shape[1]), x.new_zeros(2)
        for rank, (x_block, y_block) in enumerate(zip(blocks_in_turn(x, counts), blocks_in_turn(y, counts))):
            K, L = (torch.bmm(own, other.mT).sum(0) for own, other in ((x, x_block), (y, y_block)))
            largest = torch.maximum(largest, torch.stack([K.abs().max(), L.abs().max()]))
            if rank == dist.get_rank():
                K.fill_diagonal_(0)
                L.fill_diagonal_(0)
            traces += torch.stack([(K * L).sum(), (K * K).sum(), (L * L).sum()])
            rows += torch.stack([K.sum(1), L.sum(1)])
        k, l = rows
        sums = torch.cat([traces, rows.sum(1), torch.stack([(k * l).sum(), (k * k).sum(), (l * l).sum()])])
    dist.all_reduce(sums)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    kl, kk, ll, total_k, total_l, cross_kl, cross_kk, cross_ll = sums
    n = sum(counts)
    return _unscaled(torch.stack([
        _unbiased_hsic(kl, total_k, total_l, cross_kl, n),
        _above_noise(_unbiased_hsic(kk, total_k, total_k, cross_kk, n), largest[0]),
        _above_noise(_unbiased_hsic(ll, total_l, total_l, cross_ll, n), largest[1]),
    ]), *exponents)


def _globally_centred(x: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Subtract the mean over the samples of all processes from (T, n, p), after subtracting one sample as in
    `_centred`.
    """
    first = x[:, :1].clone(memory_format=torch.contiguous_format)  # a copy, since broadcast writes to it
    dist.broadcast(first, 0)
    x = x - first
    mean = x.sum(1, keepdim=True)
    dist.all_reduce(mean)
    return x.sub_(mean / sum(counts))


def _ratio(terms: torch.Tensor) -> torch.Tensor:
    """Return CKA from its three terms; nan if a self term is not positive."""
    # take the square roots separately: the product of two small HSICs would underflow in float32
    scale = terms[1].clamp(min=0).sqrt() * terms[2].clamp(min=0).sqrt()
    return torch.where(scale > 0, terms[0] / scale, torch.full_like(scale, torch.nan))


def cka(x: torch.Tensor, y: torch.Tensor, unbiased: bool = True) -> torch.Tensor:
    """Return the centred kernel alignment of two sets of features with a linear kernel.

        CKA = HSIC(K, L) / sqrt(HSIC(K, K) * HSIC(L, L)),   K = x x^T, L = y y^T

    This is Eq. 8 of the paper with the square root of its source. Scaling x or y changes neither the value nor, apart
    from the factor itself, the gradient.

    Args:
        x: Features of n samples, shape (n, ...), flattened per sample; any real dtype, including spikes as bool or
            uint8.
        y: Features of the same n samples, shape (n, ...); further sizes may differ from x's.
        unbiased: Whether to use the unbiased HSIC (n >= 4, the value may be negative) or the biased one.

    Returns:
        0-d tensor, at least float32; 1 for x with itself, nan if a side's own HSIC is 0 (all samples equal).

    Raises:
        ValueError: The batches differ, a side is complex, or n is too small.
    """
    if x.ndim < 1 or y.ndim < 1 or x.shape[0] != y.shape[0]:
        raise ValueError(f'x {tuple(x.shape)} and y {tuple(y.shape)} must hold the same number of samples.')
    (K, _), (L, _) = _scaled_gram(x.unsqueeze(0)), _scaled_gram(y.unsqueeze(0))
    return _ratio(hsic_terms(K, L, unbiased))


def _mean_over_processes(terms: torch.Tensor) -> torch.Tensor:
    """Return the mean of the terms over the processes whose terms are not nan. Every process must call this."""
    if world_size() == 1:
        return terms
    known = ~torch.isnan(terms).any()
    sums = torch.cat([torch.nan_to_num(terms), known.to(terms.dtype).view(1)])
    dist.all_reduce(sums)
    return sums[:3] / sums[3]


def _batch_terms(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return the three HSIC terms of one process's batch."""
    (K, exponent_k), (L, exponent_l) = _scaled_gram(student), _scaled_gram(teacher)
    return _unscaled(hsic_terms(K, L), exponent_k, exponent_l)


class RunningCKA(nn.Module):
    """CKA across mini-batches (Nguyen 2020): the ratio of exponential moving averages of the three HSIC terms.

    The averages are bias-corrected buffers (so in the checkpoint) and are updated in training mode only. With several
    processes, each term is first averaged over the processes' own batches, or is that of the global batch. A batch
    whose terms exceed the range of the buffers (float32: features of 1e9 or 1e-9) has a CKA but does not update the
    averages.

    Args:
        momentum: Share of the newest batch in the averages, in (0, 1]; 1 uses only this batch.
        scope: 'process', or 'global', for which every process's features are sent to all others.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(self, momentum: float = 0.1, scope: str = 'process'):
        super().__init__()
        if not 0 < momentum <= 1:
            raise ValueError(f'momentum={momentum}: the share of the newest batch must lie in (0, 1].')
        if scope not in CKA_SCOPES:
            raise ValueError(f"scope='{scope}': must be one of {', '.join(CKA_SCOPES)}.")
        self.scope = scope
        self.momentum = momentum
        self.register_buffer('mean_terms', torch.zeros(3))
        self.register_buffer('mean_weight', torch.zeros(()))

    @property
    def terms(self) -> torch.Tensor:
        """Bias-corrected averages of HSIC(K, L), HSIC(K, K), HSIC(L, L), shape (3,); nan before the first batch."""
        return self.mean_terms / self.mean_weight

    @property
    def value(self) -> torch.Tensor:
        """Running CKA, the ratio of the averages; nan before the first batch or if a side never varied."""
        return _ratio(self.terms)

    @torch.no_grad()
    def forward(
            self,
            student: torch.Tensor,
            teacher: torch.Tensor,
            counts: Optional[Sequence[int]] = None,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Add one batch.

        Args:
            student: Student features, shape (T, n, ...).
            teacher: Teacher features, shape (T', n, ...).
            counts: n of every process, if known (`batch_counts`).

        Returns:
            CKA of this batch and running CKA, 0-d each. In evaluation mode the running CKA does not change.

        Raises:
            ValueError: There are fewer than 4 samples. With several processes, one with fewer does not contribute; a
                global batch with fewer gives nan and does not update the averages.
        """
        terms = self._terms_of(student, teacher, counts)
        if self.training:
            newest = terms.to(self.mean_terms.dtype)
            # a branch on this value would break a compiled graph
            known = newest.isfinite().all() & ((newest > 0) == (terms > 0))[1:].all()
            share = self.momentum * known.to(self.mean_terms.dtype)
            self.mean_terms.lerp_(newest.nan_to_num(posinf=0., neginf=0.), share)
            weight = self.mean_weight.view(1)  # torch 2.11 loses what compiled code writes to a 0-d float64 tensor
            weight.lerp_(torch.ones_like(weight), share)
        return _ratio(terms).to(torch.promote_types(student.dtype, torch.float32)), self.value

    def _terms_of(self, student: torch.Tensor, teacher: torch.Tensor, counts: Optional[Sequence[int]]) -> torch.Tensor:
        """Return the three terms of this batch, equal on every process."""
        if world_size() == 1:
            return _batch_terms(student, teacher)
        nothing = _unscaled(torch.full((3,), torch.nan, device=student.device), *torch.zeros(2, device=student.device))
        if self.scope == 'global':
            counts = batch_counts(student.shape[1], student.device) if counts is None else counts
            return global_hsic_terms(student, teacher, counts) if sum(counts) >= 4 else nothing
        # this batch is too small for the unbiased HSIC, but the others' may not be
        small = student.shape[1] < 4
        return _mean_over_processes(nothing if small else _batch_terms(student, teacher))

    def extra_repr(self) -> str:
        return f'momentum={self.momentum}, scope={self.scope}'
