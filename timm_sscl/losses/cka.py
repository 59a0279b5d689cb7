"""Similarity of two representations: HSIC, CKA and its running mini-batch form (Kornblith 2019, Nguyen 2020)."""
import math
from typing import Optional, Sequence, Tuple

import torch
import torch.distributed as dist
import torch.nn as nn

from timm_sscl.distributed import batch_counts, blocks_in_turn, world_size

__all__ = ['hsic', 'cka', 'gram_matrix', 'hsic_terms', 'RunningCKA', 'CKA_SCOPES']

CKA_SCOPES = ('process', 'global')


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
        x = _centred(x)
        return torch.bmm(x, x.mT).sum(0)


def _as_float(x: torch.Tensor, name: str) -> torch.Tensor:
    """The tensor as float32 at least: spikes may be bool or uint8."""
    if x.is_complex():
        raise ValueError(f'{name} is complex; HSIC and CKA take real features.')
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _flat(x: torch.Tensor) -> torch.Tensor:
    """(T, n, ...) as (T, n, p), float32 at least."""
    return _as_float(x.flatten(2) if x.ndim > 2 else x.unsqueeze(2), 'a feature')


def _centred(x: torch.Tensor) -> torch.Tensor:
    """(T, n, ...) as (T, n, p) less its mean over the samples, a tensor of its own."""
    x = _flat(x)
    x = x - x[:, :1]  # exact zeros for a constant feature, which the mean alone does not promise
    return x.sub_(x.mean(1, keepdim=True))  # on the difference just made: no second copy


def _largest(x: torch.Tensor) -> torch.Tensor:
    """Largest absolute value, 0-d, without a gradient."""
    return torch.linalg.vector_norm(x.detach(), math.inf) if x.numel() else x.new_zeros(())


def _exponent(largest: torch.Tensor) -> torch.Tensor:
    """Whole e, as a float, with 2^e near `largest`; 0 for 0."""
    return torch.where(largest > 0, largest.log2().floor(), torch.zeros_like(largest))


def _scaled_gram(x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """(K, e): `gram_matrix` of the features over 2^e, whose largest value is then near 1.

    The fourth power of a feature's scale, which HSIC(K, K) holds, would leave float32. A power of two rounds nothing.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = _centred(x)
        exponent = _exponent(_largest(x))
        x.div_(exponent.exp2())
        return torch.bmm(x, x.mT).sum(0), exponent


def _unscaled(terms: torch.Tensor, exponent_x: torch.Tensor, exponent_y: torch.Tensor) -> torch.Tensor:
    """HSIC terms of features over 2^e as those of the features; float64, which holds them, where the device has it."""
    dtype = torch.float32 if terms.device.type == 'mps' else torch.float64
    x, y = exponent_x.to(dtype), exponent_y.to(dtype)
    return terms.to(dtype) * torch.stack([2 * x + 2 * y, 4 * x, 4 * y]).exp2()


def hsic(K: torch.Tensor, L: torch.Tensor, unbiased: bool = True) -> torch.Tensor:
    """Hilbert-Schmidt independence criterion of two Gram matrices, in float32 at least.

    Args:
        K: Gram matrix, shape (n, n), of any real dtype.
        L: Gram matrix, shape (n, n).
        unbiased: The unbiased estimator HSIC_1 (Eq. 9, Song 2012), which may be negative and needs n >= 4; otherwise
            tr(K H L H) / (n - 1)^2 (Gretton 2005), which needs n >= 2.

    Returns:
        0-d tensor.

    Raises:
        ValueError: K and L are not square matrices of one size, one is complex, or the batch is too small.
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
    cross = (K.sum(0) * rows_l).sum()  # no matmul: autocast would round it
    return _unbiased_hsic((K * L.mT).sum(), rows_k.sum(), rows_l.sum(), cross, n)


def _unbiased_hsic(trace, total_k, total_l, cross, n: int) -> torch.Tensor:
    """Eq. 9 from its sums over matrices without their diagonals: tr(K L), 1'K 1, 1'L 1 and 1'K L 1."""
    return (trace + total_k * total_l / ((n - 1) * (n - 2)) - 2 / (n - 2) * cross) / (n * (n - 3))


def hsic_terms(K: torch.Tensor, L: torch.Tensor, unbiased: bool = True) -> torch.Tensor:
    """The three terms of a CKA, HSIC(K, L), HSIC(K, K) and HSIC(L, L), as one tensor of shape (3,).

    A self term that is no more than round-off of its Gram matrix is 0: a silent tap, or one where a single sample is
    active, leaves exactly 0 in exact arithmetic.
    """
    self_terms = [_above_noise(hsic(M, M, unbiased), M.abs().max()) for M in (K, L)]
    return torch.stack([hsic(K, L, unbiased), *self_terms])


def _above_noise(term: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    # entries carry an error of some eps * max|K|; p random features leave max|K|^2 / p, which is far above
    noise = 64 * torch.finfo(largest.dtype).eps * largest
    return torch.where(term > noise * noise, term, torch.zeros_like(term))


def global_hsic_terms(x: torch.Tensor, y: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """`hsic_terms`, unbiased, of the samples of all processes together, the same on every process.

    Every process has its rows of the Gram matrices, block by block, as the others' features come by one process at a
    time; only sums over the rows are exchanged besides. Neither all features nor a whole Gram matrix are ever held.

    Args:
        x: This process's features, shape (T, n, ...).
        y: Likewise, shape (T', n, ...).
        counts: n of every process, by rank; their sum N must be at least 4.

    Returns:
        Tensor of shape (3,), float64 where the device has it.
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
    """(T, n, p) less the mean over the samples of all processes, by way of one sample as in `gram_matrix`."""
    first = x[:, :1].clone(memory_format=torch.contiguous_format)  # written to: not a view of the features
    dist.broadcast(first, 0)
    x = x - first
    mean = x.sum(1, keepdim=True)
    dist.all_reduce(mean)
    return x.sub_(mean / sum(counts))


def _ratio(terms: torch.Tensor) -> torch.Tensor:
    # the square roots apart: the product of two small HSICs would underflow in float32
    scale = terms[1].clamp(min=0).sqrt() * terms[2].clamp(min=0).sqrt()
    return torch.where(scale > 0, terms[0] / scale, torch.full_like(scale, torch.nan))


def cka(x: torch.Tensor, y: torch.Tensor, unbiased: bool = True) -> torch.Tensor:
    """Centred kernel alignment of two sets of features with a linear kernel, Eq. 8 with the root of its source.

        CKA = HSIC(K, L) / sqrt(HSIC(K, K) * HSIC(L, L)),   K = x x^T, L = y y^T

    The scale of x and of y does not matter, nor does it to the gradient beyond its own factor.

    Args:
        x: Features of n samples, shape (n, ...), flattened per sample; of any real dtype, spikes as bool or uint8 too.
        y: Features of the same n samples, shape (n, ...); the sizes behind n may differ from x's.
        unbiased: Whether to use the unbiased HSIC (n >= 4, the value may be negative) or the biased one.

    Returns:
        0-d tensor, float32 at least: the plain ratio, 1 for x against itself, nan where a side's own HSIC is 0 (all
        samples alike).

    Raises:
        ValueError: The batches differ, a side is complex, or n is too small.
    """
    if x.ndim < 1 or y.ndim < 1 or x.shape[0] != y.shape[0]:
        raise ValueError(f'x {tuple(x.shape)} and y {tuple(y.shape)} must hold the same number of samples.')
    (K, _), (L, _) = _scaled_gram(x.unsqueeze(0)), _scaled_gram(y.unsqueeze(0))
    return _ratio(hsic_terms(K, L, unbiased))


def _mean_over_processes(terms: torch.Tensor) -> torch.Tensor:
    """Mean of the terms over the processes that have some (not nan); every process takes part."""
    if world_size() == 1:
        return terms
    known = ~torch.isnan(terms).any()
    sums = torch.cat([torch.nan_to_num(terms), known.to(terms.dtype).view(1)])
    dist.all_reduce(sums)
    return sums[:3] / sums[3]


def _batch_terms(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The three HSIC terms of one process's batch."""
    (K, exponent_k), (L, exponent_l) = _scaled_gram(student), _scaled_gram(teacher)
    return _unscaled(hsic_terms(K, L), exponent_k, exponent_l)


class RunningCKA(nn.Module):
    """CKA across mini-batches (Nguyen 2020): exponential means of the three HSIC terms, divided after averaging.

    The means are bias-corrected, buffers (so in the checkpoint), and move in training mode only. Where a process group
    is running, each term is averaged over the processes' own batches first, or taken of the global batch, exactly. A
    batch whose terms do not fit the buffers (float32: features of 1e9, or of 1e-9) has a CKA but is not taken in.

    Args:
        momentum: Share of the newest batch in the means, in (0, 1]; 1 uses this batch only.
        scope: 'process', or 'global', where every process's features travel to all others.

    Raises:
        ValueError: An argument is out of its range.
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
        """Bias-corrected means of HSIC(K, L), HSIC(K, K), HSIC(L, L), shape (3,); nan before the first batch."""
        return self.mean_terms / self.mean_weight

    @property
    def value(self) -> torch.Tensor:
        """Running CKA, the ratio of the means; nan before the first batch or where a side never varied."""
        return _ratio(self.terms)

    @torch.no_grad()
    def forward(
            self,
            student: torch.Tensor,
            teacher: torch.Tensor,
            counts: Optional[Sequence[int]] = None,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Take in one batch.

        Args:
            student: Student features, shape (T, n, ...).
            teacher: Teacher features, shape (T', n, ...).
            counts: n of every process, where it is known (`batch_counts`).

        Returns:
            CKA of this batch and running CKA (in evaluation mode the running value as training left it), 0-d each.

        Raises:
            ValueError: Fewer than 4 samples. One of several processes may have fewer, and leaves it to the others; a
                global batch of fewer gives nan and is not taken in.
        """
        terms = self._terms_of(student, teacher, counts)
        if self.training:
            newest = terms.to(self.mean_terms.dtype)
            # no branch on it: it would break a compiled graph
            known = newest.isfinite().all() & ((newest > 0) == (terms > 0))[1:].all()
            share = self.momentum * known.to(self.mean_terms.dtype)
            self.mean_terms.lerp_(newest.nan_to_num(posinf=0., neginf=0.), share)
            self.mean_weight.lerp_(torch.ones_like(self.mean_weight), share)
        return _ratio(terms).to(torch.promote_types(student.dtype, torch.float32)), self.value

    def _terms_of(self, student: torch.Tensor, teacher: torch.Tensor, counts: Optional[Sequence[int]]) -> torch.Tensor:
        """The three terms of this batch, the same on every process."""
        if world_size() == 1:
            return _batch_terms(student, teacher)
        nothing = _unscaled(torch.full((3,), torch.nan, device=student.device), *torch.zeros(2, device=student.device))
        if self.scope == 'global':
            counts = batch_counts(student.shape[1], student.device) if counts is None else counts
            return global_hsic_terms(student, teacher, counts) if sum(counts) >= 4 else nothing
        # too small for the unbiased HSIC, but others' batch may not be
        small = student.shape[1] < 4
        return _mean_over_processes(nothing if small else _batch_terms(student, teacher))

    def extra_repr(self) -> str:
        return f'momentum={self.momentum}, scope={self.scope}'
