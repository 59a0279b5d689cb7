"""Create the parts of the SSCL sum by name: critics, weightings and projections."""
from functools import partial
from typing import Callable, Dict, Optional, Sequence, TypeVar, Union

from .pair_critics import Critic, InfoNCECritic, NCECritic, QueuedCritic
from .projections import FlattenedProjection, PooledProjection, Projection
from .weightings import (
    CKAWeighting, FixedWeighting, InverseCKAWeighting, ShuffledWeighting, UncertaintyWeighting, UniformWeighting,
    Weighting)

__all__ = ['CRITICS', 'WEIGHTINGS', 'PROJECTIONS', 'create_critic', 'create_weighting', 'create_projection']

T = TypeVar('T')

CRITICS: Dict[str, Callable[..., Critic]] = {
    'normalized': NCECritic, 'literal': partial(NCECritic, normalize=False), 'infonce': InfoNCECritic}
WEIGHTINGS: Dict[str, Callable[..., Weighting]] = {
    'cka': InverseCKAWeighting,
    'uniform': UniformWeighting,
    'cka_mean1': partial(InverseCKAWeighting, total='layers'),
    'uniform_matched': partial(UniformWeighting, total='inverse_cka'),
    'reverse': CKAWeighting,
    'fixed': FixedWeighting,
    'shuffled': ShuffledWeighting,
    'uncertainty': UncertaintyWeighting,
}
PROJECTIONS: Dict[str, Callable[..., Projection]] = {'pooled': PooledProjection, 'flattened': FlattenedProjection}


def _named(argument: str, name: str, table: Dict[str, T]) -> T:
    if name not in table:
        raise ValueError(f"{argument}='{name}': must be one of {', '.join(table)}.")
    return table[name]


def create_critic(critic: Union[str, Critic], temperature: float = 0.2, queue_size: int = 0) -> Critic:
    """Create a critic by name, with a queue of past rows if queue_size is positive. A Critic is returned unchanged."""
    if not isinstance(critic, str):
        return critic
    if queue_size != int(queue_size) or queue_size < 0:
        raise ValueError(f'queue_size={queue_size}: must be a whole number of rows, 0 for no queue.')
    created = _named('critic', critic, CRITICS)(temperature)
    return QueuedCritic(created, queue_size) if queue_size else created


def create_weighting(
        weighting: Union[str, Weighting],
        cka_floor: float = 0.1,
        layer_weights: Optional[Sequence[float]] = None,
) -> Weighting:
    """Create a weighting by name. A Weighting is returned unchanged."""
    if not isinstance(weighting, str):
        return weighting
    create = _named('weighting', weighting, WEIGHTINGS)
    if (layer_weights is not None) != (weighting == 'fixed'):
        raise ValueError(f"layer_weights={layer_weights}: go with weighting='fixed', one per layer, and with no other; "
                         f"weighting='{weighting}'.")
    return create(floor=cka_floor) if layer_weights is None else create(layer_weights, floor=cka_floor)


def create_projection(projection: Union[str, Projection], dim: int = 128) -> Projection:
    """Create a projection by name. A Projection is returned unchanged."""
    return _named('projection', projection, PROJECTIONS)(dim) if isinstance(projection, str) else projection
