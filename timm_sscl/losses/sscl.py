"""Similarity-sensitive contrastive loss on features: projections, critic and CKA weights, Eq. 17-20."""
import logging
import math
from functools import partial
from typing import Dict, List, Literal, Optional, Sequence, Tuple

import torch
import torch.nn as nn

from timm_sscl.distributed import batch_counts, gather_rows, world_size
from .cka import RunningCKA

from .registry import register_loss
from .critics import info_nce_loss, mi_lower_bound, nce_loss
from .inputs import TrainStep

__all__ = ['SSCLCriterion', 'CRITICS', 'WEIGHTINGS', 'PROJECTIONS']

_logger = logging.getLogger(__name__)

CRITICS = ('normalized', 'literal', 'infonce')
WEIGHTINGS = ('cka', 'uniform', 'cka_mean1', 'uniform_matched')
PROJECTIONS = ('pooled', 'flattened')


class SSCLCriterion(nn.Module):
    """sum_l lambda_l * (-L_NCE_l) over pairs of student and teacher features, lambda_l = 1 / CKA_l (Eq. 17-20).

    Per layer: both features are pooled over space and averaged over time, mapped by g_S and g_A to a common dimension,
    L2-normalised and compared by the critic, over the rows of all processes. The weight 1 / CKA is taken from the whole
    features, as a running mini-batch CKA clamped from below, and carries no gradient.

    To tell what 1 / CKA does from what its larger total weight does there are two weightings between it and the uniform
    one: 'cka_mean1' scales 1 / CKA so that the layers' mean is 1, the total of 'uniform'; 'uniform_matched' gives every
    layer the mean of 1 / CKA over the layers, the total of 'cka'.

    Args:
        names: Name of every layer, for the statistics.
        student_channels: Channels of the student's feature per layer.
        teacher_channels: Channels of the teacher's feature per layer.
        dim: Common dimension of g_S and g_A.
        temperature: Temperature t of the critic.
        critic: Contrastive loss of a layer: `info_nce_loss`, or `nce_loss` in its normalised or its literal form.
        weighting: Weights of the layers: 1 / CKA, 1, 1 / CKA scaled to mean 1, or the mean of 1 / CKA for each.
        cka_floor: CKA is not taken below this, so that no weight exceeds 1 / cka_floor.
        cka_momentum: Share of the newest batch in the running CKA; 1 uses this batch only.
        projection: What g_S and g_A see: the feature 'pooled' over space and time, or 'flattened', the whole of it,
            T * C * H * W numbers (25 M weights a layer at ImageNet size).
        student_shapes: (T, C, ...) of the student's feature per layer; needed where it is flattened.
        teacher_shapes: (T', C', ...) of the teacher's feature per layer; likewise.
        cka_scope: With several processes, whether the CKA's terms are averaged over every 'process' and its own batch,
            or those of the 'global' batch, for which features travel between the processes.
        queue_size: Number of past teacher rows, projected as they were then, that are further negatives of every
            student row. With gradient accumulation over k micro-batches of n images, (k - 1) * n rows give a
            micro-batch as many negatives as the whole batch has: those of the micro-batches before it, without a
            gradient. A row may be of an image in the batch again, where the queue comes near the data set's size.

    Raises:
        ValueError: An option is out of range, or the numbers of layers differ.
    """

    def __init__(
            self,
            names: Sequence[str],
            student_channels: Sequence[int],
            teacher_channels: Sequence[int],
            dim: int = 128,
            temperature: float = 0.2,
            critic: Literal['infonce', 'normalized', 'literal'] = 'infonce',
            weighting: Literal['cka', 'uniform', 'cka_mean1', 'uniform_matched'] = 'cka',
            cka_floor: float = 0.1,
            cka_momentum: float = 0.1,
            projection: Literal['pooled', 'flattened'] = 'pooled',
            student_shapes: Optional[Sequence[Sequence[int]]] = None,
            teacher_shapes: Optional[Sequence[Sequence[int]]] = None,
            cka_scope: Literal['process', 'global'] = 'process',
            queue_size: int = 0,
    ):
        super().__init__()
        if not len(names) == len(student_channels) == len(teacher_channels) >= 1:
            raise ValueError(f'{len(student_channels)} student and {len(teacher_channels)} teacher features for '
                             f'{len(names)} layers; there must be one of each per layer.')
        if critic not in CRITICS:
            raise ValueError(f"critic='{critic}': must be one of {', '.join(CRITICS)}.")
        if weighting not in WEIGHTINGS:
            raise ValueError(f"weighting='{weighting}': must be one of {', '.join(WEIGHTINGS)}.")
        if projection not in PROJECTIONS:
            raise ValueError(f"projection='{projection}': must be one of {', '.join(PROJECTIONS)}.")
        if not 0 < cka_floor <= 1:
            raise ValueError(f'cka_floor={cka_floor}: must lie in (0, 1].')
        if not temperature > 0:
            raise ValueError(f'temperature={temperature}: must be positive.')
        if dim < 1:
            raise ValueError(f'dim={dim}: the projections need at least one dimension.')
        if queue_size != int(queue_size) or queue_size < 0:
            raise ValueError(f'queue_size={queue_size}: must be a whole number of rows, 0 for no queue.')
        self.names = _unique(names)
        self.temperature = temperature
        self.critic = critic
        self.weighting = weighting
        self.cka_floor = cka_floor
        self.projection = projection
        self.cka_scope = cka_scope
        self.student_shapes = _input_shapes(projection, student_channels, student_shapes, 'student')
        self.teacher_shapes = _input_shapes(projection, teacher_channels, teacher_shapes, 'teacher')
        with torch.random.fork_rng(devices=[]):  # a run's other random numbers do not depend on this loss
            self.g_student = nn.ModuleList(nn.Linear(math.prod(shape), dim) for shape in self.student_shapes)
            self.g_teacher = nn.ModuleList(nn.Linear(math.prod(shape), dim) for shape in self.teacher_shapes)
        self.running_cka = nn.ModuleList(RunningCKA(cka_momentum, cka_scope) for _ in names)
        # buffers, so that a run resumes with the negatives it had; newest first
        self.register_buffer('queue', torch.zeros(len(names), queue_size, dim) if queue_size else None)
        self.register_buffer('queue_filled', torch.zeros((), dtype=torch.int64) if queue_size else None)
        self._stats: Dict[str, Dict[str, torch.Tensor]] = {}
        self._floored: set = set()

    @property
    def stats(self) -> Dict[str, Dict[str, float]]:
        """Of the last call, per layer: cka (this batch), cka_running, weight, nce and mi_bound (nats)."""
        keys = [(name, k) for name, values in self._stats.items() for k in values]
        if not keys:
            return {}
        numbers = torch.stack([self._stats[name][k].float() for name, k in keys]).tolist()  # one transfer
        stats: Dict[str, Dict[str, float]] = {name: {} for name in self._stats}
        for (name, k), number in zip(keys, numbers):
            stats[name][k] = number
        return stats

    def forward(
            self,
            student_features: Sequence[torch.Tensor],
            teacher_features: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """The weighted loss.

        Args:
            student_features: Per layer (T, B, C, ...).
            teacher_features: Per layer (T', B, C', ...), T' = 1 for an ANN.

        Returns:
            0-d tensor.

        Raises:
            ValueError: A feature does not fit its layer, or the batch is smaller than 4 with CKA weights.
        """
        self._check(student_features, teacher_features)
        counts = batch_counts(student_features[0].shape[1], student_features[0].device)
        samples = sum(counts) if self.cka_scope == 'global' else student_features[0].shape[1]
        self._check_samples(samples)
        layers, rows = [], []
        for i, (s, a) in enumerate(zip(student_features, teacher_features)):
            # the projections keep their own dtype where the models have another one
            s_rows, a_rows = (gather_rows(g(self._condense(x).to(g.weight.dtype)), counts)
                              for g, x in ((self.g_student[i], s), (self.g_teacher[i], a)))
            nce, stats = self._nce(i, s_rows, a_rows)
            if samples >= 4 or world_size() > 1:  # with uniform weights a tiny batch goes without this statistic
                stats['cka'], stats['cka_running'] = self.running_cka[i](s.detach(), a.detach(), counts)
            layers.append((nce, stats))
            rows.append(a_rows)
        if self.queue is not None and self.training:
            self._enqueue(rows)
        weights = self._weights([stats for _, stats in layers])
        for (_, stats), weight in zip(layers, weights):
            stats['weight'] = weight
        self._stats = dict(zip(self.names, (stats for _, stats in layers)))
        if self.weighting != 'uniform' and not torch.compiler.is_compiling():
            self._warn_floored()
        return torch.stack([weight * nce for weight, (nce, _) in zip(weights, layers)]).sum()

    def _condense(self, x: torch.Tensor) -> torch.Tensor:
        """What the projections take of a feature."""
        return _pooled(x) if self.projection == 'pooled' else _flattened(x)

    def _nce(self, i: int, s: torch.Tensor, a: torch.Tensor) -> Tuple[torch.Tensor, Dict[str, torch.Tensor]]:
        """Unweighted loss of a layer's projected rows, and its statistics."""
        n, rivals, queue = s.shape[0], s.shape[0], {}
        if self.queue is not None:
            mask = torch.arange(self.queue.shape[1], device=s.device) < self.queue_filled  # no size depends on it
            queue, rivals = dict(queue=self.queue[i], queue_mask=mask), n + self.queue_filled
        if self.critic == 'infonce':
            nce = info_nce_loss(s, a, self.temperature, **queue)
            rivals = (n * rivals) ** 0.5  # log of it is the mean of both directions' logs
        else:
            nce = nce_loss(s, a, self.temperature, normalize=self.critic == 'normalized', **queue)
        bound = mi_lower_bound(nce.detach(), rivals, self.critic == 'infonce')
        return nce, dict(nce=nce.detach(), mi_bound=bound)

    @torch.no_grad()
    def _enqueue(self, rows: Sequence[torch.Tensor]) -> None:
        """Take in the teacher rows of all processes, the same on each; the oldest go."""
        newest = torch.stack([row.to(self.queue.dtype) for row in rows])
        size = self.queue.shape[1]
        self.queue.copy_(torch.cat([newest, self.queue], 1)[:, :size])
        self.queue_filled.add_(newest.shape[1]).clamp_(max=size)

    def _weights(self, layers: Sequence[Dict[str, torch.Tensor]]) -> List[torch.Tensor]:
        """Weight of every layer, 0-d, without a gradient."""
        if self.weighting == 'uniform':
            return [torch.ones_like(stats['nce']) for stats in layers]
        used = [torch.nan_to_num(_known_cka(stats), nan=self.cka_floor) for stats in layers]
        inverse = [1 / value.clamp(min=self.cka_floor) for value in used]
        if self.weighting == 'cka':
            return inverse
        mean = torch.stack(inverse).mean()
        return [weight / mean if self.weighting == 'cka_mean1' else mean for weight in inverse]

    def _check(self, student_features: Sequence[torch.Tensor], teacher_features: Sequence[torch.Tensor]) -> None:
        if not len(student_features) == len(teacher_features) == len(self.names):
            raise ValueError(f'{len(student_features)} student and {len(teacher_features)} teacher features for '
                             f'{len(self.names)} layers ({", ".join(self.names)}).')
        for i, (name, s, a) in enumerate(zip(self.names, student_features, teacher_features)):
            for whose, x, shape in (('student', s, self.student_shapes[i]), ('teacher', a, self.teacher_shapes[i])):
                if self.projection == 'pooled' and (x.ndim < 3 or x.shape[2] != shape[0]):
                    raise ValueError(f"{whose} feature '{name}' has shape {tuple(x.shape)}, expected "
                                     f"(T, B, {shape[0]}, ...).")
                if self.projection == 'flattened' and (*x.shape[:1], *x.shape[2:]) != shape:
                    raise ValueError(f"{whose} feature '{name}' has shape {tuple(x.shape)}, but its flattened "
                                     f'projection was built for (T, C, ...) = {shape}: the time steps and the input '
                                     f"size must be the probe's (input_size=...); projection='pooled' takes any.")
            if s.shape[1] != a.shape[1]:
                raise ValueError(f"'{name}': the student's feature holds {s.shape[1]} samples, "
                                 f"the teacher's {a.shape[1]}.")

    def _check_samples(self, samples: int) -> None:
        if self.weighting != 'uniform' and samples < 4:
            raise ValueError(f'a batch of {samples} is too small for CKA weights: the unbiased HSIC needs at least 4 '
                             f"samples. Use a larger batch (drop_last=True), or weighting='uniform'.")

    def _warn_floored(self) -> None:
        # one transfer for all layers; a layer is named when it falls under the floor, not at every step
        used = torch.stack([_known_cka(stats) for stats in self._stats.values()]).tolist()
        for name, value in zip(self.names, used):
            if value >= self.cka_floor:
                self._floored.discard(name)
            elif name not in self._floored:
                self._floored.add(name)
                undefined = 'is undefined: a side is the same for all images (a silent tap?)'
                what = undefined if value != value else f'is {value:.3g}'
                _logger.warning(f"CKA of '{name}' {what}; taken as the floor, {self.cka_floor}.")


def _unique(names: Sequence[str]) -> List[str]:
    """Names of layers that are compared twice are numbered: statistics are kept by them."""
    seen: Dict[str, int] = {}
    unique = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        unique.append(name if seen[name] == 1 else f'{name} ({seen[name]})')
    return unique


def _known_cka(stats: Dict[str, torch.Tensor]) -> torch.Tensor:
    """The running CKA, or this batch's where there is none yet: in evaluation before the first training step."""
    return torch.where(stats['cka_running'].isnan(), stats['cka'], stats['cka_running'])


def _pooled(x: torch.Tensor) -> torch.Tensor:
    """(T, B, C, ...) -> (B, C): the mean over time and space."""
    return x.flatten(3).mean((0, 3)) if x.ndim > 3 else x.mean(0)


def _flattened(x: torch.Tensor) -> torch.Tensor:
    """(T, B, C, ...) -> (B, T * C * ...), the whole feature."""
    return x.transpose(0, 1).flatten(1)


def _input_shapes(
        projection: str,
        channels: Sequence[int],
        shapes: Optional[Sequence[Sequence[int]]],
        whose: str,
) -> List[Tuple[int, ...]]:
    """Shape per sample of what the projections take: (C,), or (T, C, ...) where the feature is flattened."""
    if projection == 'pooled':
        return [(c,) for c in channels]
    if shapes is None:
        raise ValueError(f"projection='flattened' needs {whose}_shapes, (T, C, ...) of every layer's feature.")
    shapes = [tuple(shape) for shape in shapes]
    if [shape[1] for shape in shapes] != list(channels):
        raise ValueError(f'{whose}_shapes={shapes}: must be (T, C, ...) per layer, with C = {list(channels)}.')
    return shapes


class _SSCL(SSCLCriterion):
    def forward(self, step: TrainStep) -> torch.Tensor:
        return super().forward(step.student_features, step.teacher_features)


_of_features = dict(needs_features=True, needs_shapes=True, global_batch=True)
register_loss('sscl', **_of_features)(_SSCL)
register_loss('contrastive', **_of_features)(partial(_SSCL, weighting='uniform'))
