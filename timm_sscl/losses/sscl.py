"""Similarity-sensitive contrastive loss on features: projections, critic and CKA weights, Eq. 17-20."""
import logging
from functools import partial
from typing import Any, Dict, List, Literal, Optional, Sequence, Union

import torch
import torch.nn as nn

from timm_sscl.distributed import batch_counts, gather_rows, world_size
from timm_sscl.host_copy import HostCopy, can_copy

from .cka import RunningCKA
from .inputs import TrainStep
from .pair_critics import Critic
from .projections import Projection
from .registry import loss_spec, register_loss
from .sscl_parts import create_critic, create_projection, create_weighting
from .weightings import Weighting

__all__ = ['SSCLCriterion']

_logger = logging.getLogger(__name__)

# setting -> the part that it belongs to, if the part is given by name
_PART_OF = dict(dim='projection', temperature='critic', queue_size='critic', cka_floor='weighting',
                layer_weights='weighting')


class SSCLCriterion(nn.Module):
    """sum_l lambda_l * (-L_NCE_l) over pairs of student and teacher features, lambda_l = 1 / CKA_l (Eq. 17-20).

    For each layer, the projection condenses both features, g_S and g_A map them to a common dimension, and the critic
    compares the rows of all processes. The weighting computes the weights of the layers from their CKA. CKA is computed
    from the whole features, as a running mini-batch CKA. The weights carry no gradient.

    Args:
        names: Name of every layer, for the statistics.
        student_channels: Channels of the student's feature per layer.
        teacher_channels: Channels of the teacher's feature per layer.
        critic: `InfoNCECritic`, `NCECritic`, or one of these in a `QueuedCritic`; or a name.
        weighting: A `Weighting`, or a name.
        projection: `PooledProjection` or `FlattenedProjection`; or a name.
        cka_momentum: Share of the newest batch in the running CKA; 1 uses only this batch.
        cka_scope: With several processes, 'process' averages the CKA's terms over the processes' own batches. 'global'
            computes them from the global batch, for which features are sent between the processes.
        student_shapes: (T, C, ...) of the student's feature per layer; required if it is flattened.
        teacher_shapes: (T', C', ...) of the teacher's feature per layer; required if it is flattened.
        **settings: Settings of the parts that are given by name: dim, temperature, queue_size, cka_floor,
            layer_weights. Defaults are those of the loss 'sscl'.

    Raises:
        ValueError: An option is out of range, the numbers of layers differ, or a setting is given for a part that is an
            object.

    Examples:
        ```python
        criterion = SSCLCriterion(
            ['stage3', 'stage4'], [64, 128], [64, 128],
            critic=QueuedCritic(InfoNCECritic(temperature=0.07), size=4096), weighting=UniformWeighting(),
            projection=PooledProjection(dim=64))
        ```
    """

    def __init__(
            self,
            names: Sequence[str],
            student_channels: Sequence[int],
            teacher_channels: Sequence[int],
            *,
            critic: Union[str, Critic] = 'infonce',
            weighting: Union[str, Weighting] = 'cka',
            projection: Union[str, Projection] = 'pooled',
            cka_momentum: float = 0.1,
            cka_scope: str = 'process',
            student_shapes: Optional[Sequence[Sequence[int]]] = None,
            teacher_shapes: Optional[Sequence[Sequence[int]]] = None,
            **settings: Any,
    ):
        super().__init__()
        if not len(names) == len(student_channels) == len(teacher_channels) >= 1:
            raise ValueError(f'{len(student_channels)} student and {len(teacher_channels)} teacher features for '
                             f'{len(names)} layers; there must be one of each per layer.')
        parts = dict(critic=critic, weighting=weighting, projection=projection)
        of_part = _settings_of_parts(parts, settings)
        critic = create_critic(critic, **of_part['critic'])
        weighting = create_weighting(weighting, **of_part['weighting'])
        self.projection = create_projection(projection, **of_part['projection'])
        self.names = _unique(names)
        self.cka_scope = cka_scope
        self.student_shapes = self.projection.shapes(student_channels, student_shapes, 'student')
        self.teacher_shapes = self.projection.shapes(teacher_channels, teacher_shapes, 'teacher')
        with torch.random.fork_rng(devices=[]):  # so that other random numbers of a run do not depend on this loss
            self.g_student = nn.ModuleList(map(self.projection.create, self.student_shapes))
            self.g_teacher = nn.ModuleList(map(self.projection.create, self.teacher_shapes))
        self.running_cka = nn.ModuleList(RunningCKA(cka_momentum, cka_scope) for _ in names)
        critic.bind(len(names), self.projection.dim)
        weighting.bind(len(names))
        self.critic, self.weighting = critic, weighting
        self._stats: Dict[str, Dict[str, torch.Tensor]] = {}
        self._floored: set = set()
        self._used_cka: Optional[HostCopy] = None

    @property
    def queue(self) -> Optional[torch.Tensor]:
        """Past teacher rows (layers, rows, dim), the newest first; None without a queue."""
        return getattr(self.critic, 'queue', None)

    @property
    def queue_filled(self) -> Optional[torch.Tensor]:
        """Number of filled rows of the queue, 0-d; None without a queue."""
        return getattr(self.critic, 'queue_filled', None)

    @property
    def device_stats(self) -> Dict[str, Dict[str, torch.Tensor]]:
        """The values of `stats` as 0-d tensors, without waiting for the device."""
        return {name: {k: value.float() for k, value in values.items()} for name, values in self._stats.items()}

    @property
    def stats(self) -> Dict[str, Dict[str, float]]:
        """Statistics of the last call per layer: cka (this batch), cka_running, weight, nce and mi_bound (nats)."""
        keys = [(name, k) for name, values in self._stats.items() for k in values]
        if not keys:
            return {}
        # one transfer from the device
        numbers = torch.stack([self._stats[name][k].float() for name, k in keys]).tolist()
        stats: Dict[str, Dict[str, float]] = {name: {} for name in self._stats}
        for (name, k), number in zip(keys, numbers):
            stats[name][k] = number
        return stats

    def forward(
            self,
            student_features: Sequence[torch.Tensor],
            teacher_features: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """Return the weighted loss, without waiting for the device.

        Args:
            student_features: Per layer (T, B, C, ...).
            teacher_features: Per layer (T', B, C', ...), T' = 1 for an ANN.

        Returns:
            0-d tensor.

        Raises:
            ValueError: A feature does not fit its layer, or the batch is smaller than 4 with weights from CKA.
        """
        self._check(student_features, teacher_features)
        counts = batch_counts(student_features[0].shape[1], student_features[0].device)
        samples = sum(counts) if self.cka_scope == 'global' else student_features[0].shape[1]
        self._check_samples(samples)
        losses, layers, rows = [], [], []
        for i, (s, a) in enumerate(zip(student_features, teacher_features)):
            # the projections keep their dtype if the models have another one
            s_rows, a_rows = (gather_rows(g(self.projection.condense(x).to(g.weight.dtype)), counts)
                              for g, x in ((self.g_student[i], s), (self.g_teacher[i], a)))
            nce, bound = self.critic(s_rows, a_rows, i)
            stats = dict(nce=nce.detach(), mi_bound=bound)
            # with uniform weights, a smaller batch is allowed and has no such statistic
            if samples >= 4 or world_size() > 1:
                stats['cka'], stats['cka_running'] = self.running_cka[i](s.detach(), a.detach(), counts)
            losses.append(nce)
            layers.append(stats)
            rows.append(a_rows)
        if self.training:
            self.critic.push(rows)
        weights = self._weights(layers)
        for stats, weight in zip(layers, weights):
            stats['weight'] = weight
        self._stats = dict(zip(self.names, layers))
        if self.weighting.uses_cka and can_copy(losses[0]):
            self._warn_floored(layers)
        loss = torch.stack([weight * nce for weight, nce in zip(weights, losses)]).sum()
        penalty = self.weighting.penalty(torch.stack(losses))
        return loss if penalty is None else loss + penalty

    def _weights(self, layers: Sequence[Dict[str, torch.Tensor]]) -> Sequence[torch.Tensor]:
        """Return the weight of every layer, 0-d, without a gradient."""
        if self.weighting.uses_cka:
            return self.weighting(torch.stack([_known_cka(stats) for stats in layers])).unbind()
        return self.weighting(torch.stack([torch.full_like(stats['nce'], torch.nan) for stats in layers])).unbind()

    def _check(self, student_features: Sequence[torch.Tensor], teacher_features: Sequence[torch.Tensor]) -> None:
        if not len(student_features) == len(teacher_features) == len(self.names):
            raise ValueError(f'{len(student_features)} student and {len(teacher_features)} teacher features for '
                             f'{len(self.names)} layers ({", ".join(self.names)}).')
        for i, (name, s, a) in enumerate(zip(self.names, student_features, teacher_features)):
            self.projection.check(f"student feature '{name}'", s, self.student_shapes[i])
            self.projection.check(f"teacher feature '{name}'", a, self.teacher_shapes[i])
            if s.shape[1] != a.shape[1]:
                raise ValueError(f"'{name}': the student's feature holds {s.shape[1]} samples, "
                                 f"the teacher's {a.shape[1]}.")

    def _check_samples(self, samples: int) -> None:
        if self.weighting.uses_cka and samples < 4:
            raise ValueError(f'a batch of {samples} is too small for CKA weights: the unbiased HSIC needs at least 4 '
                             f"samples. Use a larger batch (drop_last=True), or weighting='uniform'.")

    def _warn_floored(self, layers: Sequence[Dict[str, torch.Tensor]]) -> None:
        """Log a layer when its CKA falls below the floor, as soon as the value has arrived on the host."""
        if self._used_cka is None:
            self._used_cka = HostCopy(torch.stack([_known_cka(stats) for stats in layers]))
        if not self._used_cka.ready:
            return  # checked again at the next step
        used, self._used_cka = self._used_cka.read(), None
        floor = self.weighting.floor
        for name, value in zip(self.names, used):
            if value >= floor:
                self._floored.discard(name)
            elif name not in self._floored:
                self._floored.add(name)
                undefined = 'is undefined: a side is the same for all images (a silent tap?)'
                what = undefined if value != value else f'is {value:.3g}'
                _logger.warning(f"CKA of '{name}' {what}; taken as the floor, {floor}.")

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        for name in ('queue', 'queue_filled'):  # a checkpoint of version 0.1.0
            if prefix + name in state_dict:
                state_dict[f'{prefix}critic.{name}'] = state_dict.pop(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __getstate__(self) -> Dict[str, Any]:
        return {**self.__dict__, '_used_cka': None}  # it belongs to a stream of the device

    def __setstate__(self, state: Dict[str, Any]) -> None:
        super().__setstate__(state)
        if 'cka_floor' in state:  # a pickle of version 0.1.0
            self._parts_of_0_1_0(self.__dict__)
        self._used_cka = None

    def _parts_of_0_1_0(self, state: Dict[str, Any]) -> None:
        """Create the parts from the attributes of version 0.1.0."""
        queue, filled = (self._buffers.pop(name, None) for name in ('queue', 'queue_filled'))
        critic = create_critic(state.pop('critic'), state.pop('temperature'), 0 if queue is None else queue.shape[1])
        weighting = create_weighting(state.pop('weighting'), state.pop('cka_floor'))
        self.projection = create_projection(state.pop('projection'), self.g_student[0].out_features)
        critic.bind(len(self.names), self.projection.dim)
        weighting.bind(len(self.names))
        if queue is not None:
            critic.queue, critic.queue_filled = queue, filled
        self.critic, self.weighting = critic, weighting


def _settings_of_parts(parts: Dict[str, Any], settings: Dict[str, Any]) -> Dict[str, Dict[str, Any]]:
    """Return the settings by the part that they belong to.

    Raises:
        TypeError: A setting is unknown.
        ValueError: A setting differs from its default, but its part is an object with its own settings.
    """
    known = loss_spec('sscl').options
    of_part: Dict[str, Dict[str, Any]] = {part: {} for part in parts}
    for name, value in settings.items():
        if name not in _PART_OF:
            raise TypeError(f"SSCLCriterion got an unexpected keyword argument '{name}'.")
        part = parts[_PART_OF[name]]
        if isinstance(part, str):
            of_part[_PART_OF[name]][name] = value
        elif value != known[name].default:
            raise ValueError(f'{name}={value}: {_PART_OF[name]} is given as {type(part).__name__}, which has its own '
                             f'settings.')
    return of_part


def _unique(names: Sequence[str]) -> List[str]:
    """Number repeated names, since statistics are stored by name."""
    seen: Dict[str, int] = {}
    unique = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        unique.append(name if seen[name] == 1 else f'{name} ({seen[name]})')
    return unique


def _known_cka(stats: Dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the running CKA, or this batch's before the first training step."""
    return torch.where(stats['cka_running'].isnan(), stats['cka'], stats['cka_running'])


class _SSCL(SSCLCriterion):
    """`SSCLCriterion` on a TrainStep, with parts given by names and numbers.

    Args:
        dim: Common dimension of g_S and g_A.
        temperature: Temperature of the critic.
        critic: Contrastive loss of a layer: `info_nce_loss`, or `nce_loss` in its normalised or its literal form.
        weighting: Weights of the layers: 1 / CKA; 1; 1 / CKA scaled to mean 1; the mean of 1 / CKA for each; or, scaled
            to the total of 1 / CKA: CKA (reverse), layer_weights (fixed), 1 / CKA of another layer (shuffled), learned
            by uncertainty.
        cka_floor: Lower bound of CKA in the weights, so that no weight exceeds 1 / cka_floor.
        cka_momentum: Share of the newest batch in the running CKA; 1 uses only this batch.
        projection: Input of g_S and g_A: the feature pooled over space and time, or flattened to T * C * H * W numbers
            (25 M weights per layer at ImageNet size).
        cka_scope: With several processes, whether the CKA's terms are averaged over the processes' own batches, or
            computed from the global batch, for which features are sent between the processes.
        queue_size: Number of past teacher rows, as projected at their time, that are further negatives of every student
            row. With gradient accumulation over k micro-batches of n images, (k - 1) * n rows give a micro-batch as
            many negatives as the whole batch has. These have no gradient. If the queue is almost as long as the data
            set, a row may be of an image that is in the batch, too.
        layer_weights: Weights of the layers with weighting fixed, one per tap.
    """

    def __init__(
            self,
            names: Sequence[str],
            student_channels: Sequence[int],
            teacher_channels: Sequence[int],
            student_shapes: Optional[Sequence[Sequence[int]]] = None,
            teacher_shapes: Optional[Sequence[Sequence[int]]] = None,
            dim: int = 128,
            temperature: float = 0.2,
            critic: Literal['infonce', 'normalized', 'literal'] = 'infonce',
            weighting: Literal['cka', 'uniform', 'cka_mean1', 'uniform_matched', 'reverse', 'fixed', 'shuffled',
                               'uncertainty'] = 'cka',
            cka_floor: float = 0.1,
            cka_momentum: float = 0.1,
            projection: Literal['pooled', 'flattened'] = 'pooled',
            cka_scope: Literal['process', 'global'] = 'process',
            queue_size: int = 0,
            layer_weights: Optional[Sequence[float]] = None,
    ):
        super().__init__(
            names, student_channels, teacher_channels, student_shapes=student_shapes, teacher_shapes=teacher_shapes,
            dim=dim, temperature=temperature, critic=critic, weighting=weighting, cka_floor=cka_floor,
            cka_momentum=cka_momentum, projection=projection, cka_scope=cka_scope, queue_size=queue_size,
            layer_weights=layer_weights)

    def forward(self, step: TrainStep) -> torch.Tensor:  # type: ignore[override]  # called as every registered loss
        return super().forward(step.student_features, step.teacher_features)


_of_features: Dict[str, Any] = dict(needs_features=True, needs_shapes=True, global_batch=True)
register_loss('sscl', **_of_features)(_SSCL)
register_loss('contrastive', **_of_features)(partial(_SSCL, weighting='uniform'))
