"""Similarity-sensitive contrastive loss on features: projections, critic and CKA weights, Eq. 17-20."""
import logging
from typing import Dict, Sequence, Tuple

import torch
import torch.nn as nn

from timm_sscl.distributed import gather_rows, world_size
from timm_sscl.similarity import RunningCKA

from .factory import register_loss
from .nce import info_nce_loss, mi_lower_bound, nce_loss
from .step import TrainStep

__all__ = ['SSCLCriterion', 'CRITICS', 'WEIGHTINGS']

_logger = logging.getLogger(__name__)

CRITICS = ('normalized', 'literal', 'infonce')
WEIGHTINGS = ('cka', 'uniform')


class SSCLCriterion(nn.Module):
    """sum_l lambda_l * (-L_NCE_l) over pairs of student and teacher features, lambda_l = 1 / CKA_l (Eq. 17-20).

    Per layer: both features are pooled over space and averaged over time, mapped by g_S and g_A to a common dimension,
    L2-normalised and compared by the critic, over the rows of all processes. The weight 1 / CKA is taken from the whole
    features, as a running mini-batch CKA clamped from below, and carries no gradient.

    Args:
        names: Name of every layer, for the statistics.
        student_channels: Channels of the student's feature per layer.
        teacher_channels: Channels of the teacher's feature per layer.
        dim: Common dimension of g_S and g_A.
        temperature: Temperature t of the critic.
        critic: 'normalized' or 'literal' (`nce_loss`), or 'infonce' (`info_nce_loss`).
        weighting: 'cka' for 1 / CKA, 'uniform' for 1.
        cka_floor: CKA is not taken below this, so that no weight exceeds 1 / cka_floor.
        cka_momentum: Share of the newest batch in the running CKA; 1 uses this batch only.

    Raises:
        ValueError: An option is out of range, or the numbers of layers differ.
    """

    def __init__(
            self,
            names: Sequence[str],
            student_channels: Sequence[int],
            teacher_channels: Sequence[int],
            dim: int = 128,
            temperature: float = 0.1,
            critic: str = 'normalized',
            weighting: str = 'cka',
            cka_floor: float = 0.1,
            cka_momentum: float = 0.1,
    ):
        super().__init__()
        if not len(names) == len(student_channels) == len(teacher_channels) >= 1:
            raise ValueError(f'{len(student_channels)} student and {len(teacher_channels)} teacher features for '
                             f'{len(names)} layers; there must be one of each per layer.')
        if critic not in CRITICS:
            raise ValueError(f"critic='{critic}': must be one of {', '.join(CRITICS)}.")
        if weighting not in WEIGHTINGS:
            raise ValueError(f"weighting='{weighting}': must be one of {', '.join(WEIGHTINGS)}.")
        if not 0 < cka_floor <= 1:
            raise ValueError(f'cka_floor={cka_floor}: must lie in (0, 1].')
        if not temperature > 0:
            raise ValueError(f'temperature={temperature}: must be positive.')
        if dim < 1:
            raise ValueError(f'dim={dim}: the projections need at least one dimension.')
        self.names = list(names)
        self.temperature = temperature
        self.critic = critic
        self.weighting = weighting
        self.cka_floor = cka_floor
        with torch.random.fork_rng(devices=[]):  # a run's other random numbers do not depend on this loss
            self.g_student = nn.ModuleList(nn.Linear(c, dim) for c in student_channels)
            self.g_teacher = nn.ModuleList(nn.Linear(c, dim) for c in teacher_channels)
        self.running_cka = nn.ModuleList(RunningCKA(cka_momentum) for _ in names)
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
        layers = [self._layer(i, s, a) for i, (s, a) in enumerate(zip(student_features, teacher_features))]
        self._stats = dict(zip(self.names, (stats for _, stats in layers)))
        if self.weighting == 'cka' and not torch.compiler.is_compiling():
            self._warn_floored()
        return torch.stack([loss for loss, _ in layers]).sum()

    def _layer(self, i: int, s: torch.Tensor, a: torch.Tensor) -> Tuple[torch.Tensor, Dict[str, torch.Tensor]]:
        pairs = (self.g_student[i], s), (self.g_teacher[i], a)
        projected = [gather_rows(g(_pooled(x).to(g.weight.dtype))) for g, x in pairs]  # --model-dtype is the models'
        if self.critic == 'infonce':
            nce = info_nce_loss(*projected, temperature=self.temperature)
        else:
            nce = nce_loss(*projected, temperature=self.temperature, normalize=self.critic == 'normalized')
        stats = dict(nce=nce.detach(),
                     mi_bound=mi_lower_bound(nce.detach(), projected[0].shape[0], self.critic == 'infonce'))
        weight = torch.ones_like(nce.detach())
        if s.shape[1] >= 4 or world_size() > 1:  # with uniform weights a tiny batch goes without this statistic
            cka, running = self.running_cka[i](s.detach(), a.detach())
            stats.update(cka=cka, cka_running=running)
            if self.weighting == 'cka':
                weight = 1 / torch.nan_to_num(running, nan=self.cka_floor).clamp(min=self.cka_floor)
        stats['weight'] = weight
        return weight * nce, stats

    def _check(self, student_features: Sequence[torch.Tensor], teacher_features: Sequence[torch.Tensor]) -> None:
        if not len(student_features) == len(teacher_features) == len(self.names):
            raise ValueError(f'{len(student_features)} student and {len(teacher_features)} teacher features for '
                             f'{len(self.names)} layers ({", ".join(self.names)}).')
        for i, (name, s, a) in enumerate(zip(self.names, student_features, teacher_features)):
            for whose, x, g in (('student', s, self.g_student[i]), ('teacher', a, self.g_teacher[i])):
                if x.ndim < 3 or x.shape[2] != g.in_features:
                    raise ValueError(f"{whose} feature '{name}' has shape {tuple(x.shape)}, expected "
                                     f"(T, B, {g.in_features}, ...).")
            if s.shape[1] != a.shape[1]:
                raise ValueError(f"'{name}': the student's feature holds {s.shape[1]} samples, "
                                 f"the teacher's {a.shape[1]}.")
        batch = student_features[0].shape[1]
        if self.weighting == 'cka' and batch < 4:
            raise ValueError(f'a batch of {batch} is too small for CKA weights: the unbiased HSIC needs at least 4 '
                             f"samples. Use a larger batch (drop_last=True), or weighting='uniform'.")

    def _warn_floored(self) -> None:
        # one transfer for all layers; a layer is named when it falls under the floor, not at every step
        running = torch.stack([stats['cka_running'] for stats in self._stats.values()]).tolist()
        for name, value in zip(self.names, running):
            if value >= self.cka_floor:
                self._floored.discard(name)
            elif name not in self._floored:
                self._floored.add(name)
                undefined = 'is undefined: a side is the same for all images (a silent tap?)'
                what = undefined if value != value else f'is {value:.3g}'
                _logger.warning(f"CKA of '{name}' {what}; taken as the floor, {self.cka_floor}.")


def _pooled(x: torch.Tensor) -> torch.Tensor:
    """(T, B, C, ...) -> (B, C): the mean over time and space."""
    return x.flatten(3).mean((0, 3)) if x.ndim > 3 else x.mean(0)


class _RegisteredSSCL(SSCLCriterion):
    def forward(self, step: TrainStep) -> torch.Tensor:
        return super().forward(step.student_features, step.teacher_features)


@register_loss('sscl', needs_features=True)
class _SSCL(_RegisteredSSCL):
    """SSCLCriterion with the weights 1 / CKA."""


@register_loss('contrastive', needs_features=True)
class _Contrastive(_RegisteredSSCL):
    """SSCLCriterion with uniform weights."""

    def __init__(self, **options):
        super().__init__(weighting='uniform', **options)
