"""Divide trials into rounds of those that train side by side."""
from collections import OrderedDict, deque
from typing import Dict, Hashable, Iterator, Mapping, NamedTuple, Sequence, Tuple

from trial_replica import signature
from trials import Trial

__all__ = ['Round', 'rounds']


class Round(NamedTuple):
    """Trials that train side by side. Rounds with the same key use the same replicas."""
    key: Tuple[Hashable, ...]
    trials: Tuple[Trial, ...]


def rounds(trials: Sequence[Trial], replicas: int) -> Iterator[Round]:
    """Divide trials into rounds, so that few different groups are needed: each group is captured once.

    Trials of a group have the same data, split, epochs and batch size. Arms get replicas in proportion to the trials
    that they have left, so that arms with equal numbers of seeds advance together.

    Args:
        trials: The trials.
        replicas: Most trials in a round.
    """
    sizes: Dict[Hashable, Dict[Hashable, deque]] = OrderedDict()
    for trial in trials:
        size = trial.scale.data, trial.scale.epochs, trial.scale.batch_size, trial.timesteps == 0, trial.split
        sizes.setdefault(size, OrderedDict()).setdefault(signature(trial), deque()).append(trial)
    for waiting in sizes.values():
        while waiting:
            slots = _slots({key: len(left) for key, left in waiting.items()}, replicas)
            for _ in range(min(len(waiting[key]) // count for key, count in slots.items())):
                keys = tuple(key for key, count in slots.items() for _ in range(count))
                yield Round(keys, tuple(waiting[key].popleft() for key in keys))
            for key in [key for key, left in waiting.items() if not left]:
                del waiting[key]


def _slots(left: Mapping[Hashable, int], replicas: int) -> Dict[Hashable, int]:
    """Return how many replicas each signature gets, in proportion to its trials that are left."""
    first = sorted(left, key=lambda key: -left[key])[:replicas]
    slots = {key: 1 for key in left if key in first}
    while True:  # arms with equally many trials get equally many, so that pairs end together
        most = max(left[key] / (count + 1) for key, count in slots.items())
        chosen = [key for key, count in slots.items() if left[key] / (count + 1) == most and count < left[key]]
        if not chosen or sum(slots.values()) + len(chosen) > replicas:
            return slots
        for key in chosen:
            slots[key] += 1
