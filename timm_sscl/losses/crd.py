"""CRD: contrast every sample's feature with the other network's features of other samples, from memory (Tian 2020)."""
import math
from typing import Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from timm_sscl.distributed import batch_counts, from_first, gather_rows

from .inputs import TrainStep
from .logits import as_float, check_positive, check_share, hard_labels
from .maps import check_features, time_mean
from .registry import register_loss

__all__ = ['CRDLoss', 'crd_side']


def crd_side(
        positive: torch.Tensor,
        negative: torch.Tensor,
        valid: torch.Tensor,
        log_scale: torch.Tensor,
) -> torch.Tensor:
    """Return one side of CRD, the mean over the batch of -ln h(positive) - sum_k ln(1 - h(negative_k)).

    h(x) = P / (P + K / n) with P = exp(x) / (n * scale) is the probability that a score belongs to a pair. If all
    scores are equal and scale is their exponential, the value is ln(K + 1) + K ln((K + 1) / K), 10.704 for K = 16384.

    Args:
        positive: Scores of the pairs, (B,).
        negative: Scores of K negatives per sample, (B, K).
        valid: Which of them are negatives, (B, K) bool. The sum over the others is extrapolated to K.
        log_scale: Logarithm of the scale, 0-d.
    """
    num = negative.shape[1]
    offset = log_scale + math.log(num)
    weights = valid.to(negative.dtype)
    weights = weights * (num / weights.sum(1, keepdim=True).clamp(min=1))
    return -(F.logsigmoid(positive - offset) + (weights * F.logsigmoid(offset - negative)).sum(1)).mean()


@register_loss(
    'crd', needs_features=True, needs_index=True, global_batch=True, needs_labels=lambda options: options['exact'])
class CRDLoss(nn.Module):
    """Sum of two `crd_side`: student against stored teacher features, and teacher against stored student features.

    The features of the last tap, averaged over time and space, are mapped to unit vectors of `dim` numbers by a trained
    linear map per network. Two banks hold such a vector for every training sample. After a training step, the vectors
    of its samples move to (momentum * old + (1 - momentum) * new), normalised. The scale is the mean exponential score
    of the first training step and stays.

    The authors draw negatives for every sample. Here one draw of `num_negatives` stored samples, on the device from
    torch's generator, serves the whole batch, and its own sample is left out. With exact negatives, those of the same
    class are left out, too; the loss then needs hard labels, and learns those of the stored samples as they come. Their
    weight of the loss is 0.8. The banks are part of a checkpoint, 8 * dim bytes per training sample.

    Args:
        dim: Length of the vectors.
        num_negatives: Number of negatives K.
        temperature: Temperature of the scores.
        momentum: Share of the old vector.
        exact: Whether negatives are of other classes only.

    Raises:
        ValueError: An option is out of its range.
    """

    def __init__(
            self,
            names: Sequence[str],
            student_channels: Sequence[int],
            teacher_channels: Sequence[int],
            num_samples: int,
            dim: int = 128,
            num_negatives: int = 16384,
            temperature: float = 0.07,
            momentum: float = 0.5,
            exact: bool = True,
    ):
        super().__init__()
        check_positive(dim=dim, num_negatives=num_negatives, temperature=temperature)
        check_share(momentum=momentum)
        self.num_samples, self.num_negatives = num_samples, num_negatives
        self.temperature, self.momentum, self.exact = temperature, momentum, exact
        with torch.random.fork_rng(devices=[]):  # does not change other random numbers of the run
            self.embed_student = nn.Linear(student_channels[-1], dim)
            self.embed_teacher = nn.Linear(teacher_channels[-1], dim)
            student_bank, teacher_bank = (torch.rand(2, num_samples, dim) * 2 - 1) * math.sqrt(3 / dim)
        self.register_buffer('student_bank', student_bank.contiguous())
        self.register_buffer('teacher_bank', teacher_bank.contiguous())
        self.register_buffer('log_scale', torch.full((2,), torch.nan))  # nan before the first step
        if exact:
            self.register_buffer('labels', torch.full((num_samples,), -1))  # -1: not seen yet

    def forward(self, step: TrainStep) -> torch.Tensor:
        counts = batch_counts(len(step.index), step.index.device)
        index = gather_rows(step.index, counts)
        student, teacher = check_features(step.student_features, step.teacher_features)[-1]
        student = gather_rows(_unit_rows(self.embed_student, student), counts)
        teacher = gather_rows(_unit_rows(self.embed_teacher, teacher), counts)
        drawn = from_first(torch.randint(self.num_samples, (self.num_negatives,), device=index.device))
        valid = drawn != index.unsqueeze(1)
        if self.exact:
            target = gather_rows(hard_labels(step.target, step.step_logits, 'crd'), counts)
            valid = valid & (self.labels[drawn] != target.unsqueeze(1))
        scores = [self._scores(*pair, index, drawn) for pair in (
            (student, self.teacher_bank), (teacher, self.student_bank))]
        log_scale = self._scale([_log_mean_exp(*pair, valid) for pair in scores])
        loss = torch.stack([crd_side(*pair, valid, scale) for pair, scale in zip(scores, log_scale)]).sum()
        if self.training:
            self._store(self.student_bank, index, student)
            self._store(self.teacher_bank, index, teacher)
            if self.exact:
                self.labels.index_copy_(0, index, target)
        return loss

    def _scores(
            self,
            rows: torch.Tensor,
            bank: torch.Tensor,
            index: torch.Tensor,
            drawn: torch.Tensor,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Return the scores of rows (B, dim) with their own stored vectors, (B,), and with those drawn, (B, K)."""
        with torch.autocast(rows.device.type, enabled=False):
            own, others = (bank[places].to(rows.dtype) for places in (index, drawn))
            return (rows * own).sum(1) / self.temperature, rows @ others.T / self.temperature

    @torch.no_grad()
    def _scale(self, newest: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the logarithms of both scales, (2,): those of the first training step."""
        first = torch.stack(list(newest)).to(self.log_scale.dtype)
        scale = torch.where(self.log_scale.isnan(), first, self.log_scale)
        if self.training:
            self.log_scale.copy_(scale)
        return scale

    @torch.no_grad()
    def _store(self, bank: torch.Tensor, index: torch.Tensor, rows: torch.Tensor) -> None:
        moved = self.momentum * bank[index] + (1 - self.momentum) * rows.to(bank.dtype)
        bank.index_copy_(0, index, F.normalize(moved, dim=1))


def _unit_rows(embed: nn.Linear, feature: torch.Tensor) -> torch.Tensor:
    """Return the unit vectors (B, dim), at least float32, of a feature (T, B, C, ...)."""
    pooled = time_mean(feature)
    pooled = pooled.flatten(2).mean(2) if pooled.ndim > 2 else pooled
    return F.normalize(as_float(embed(pooled.to(embed.weight.dtype))), dim=1)


def _log_mean_exp(positive: torch.Tensor, negative: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Return the logarithm of the mean exponential score of pairs and valid negatives, 0-d, without a gradient."""
    scores = torch.cat([positive.detach().unsqueeze(1), negative.detach().masked_fill(~valid, -math.inf)], 1)
    return scores.flatten().logsumexp(0) - (valid.sum() + len(positive)).to(scores.dtype).log()
