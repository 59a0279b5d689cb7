"""What the audit knows of a tensor that depends on the model's input."""
import itertools
from dataclasses import dataclass, field, replace
from typing import Dict, FrozenSet, Iterable, Optional, Set, Tuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

__all__ = ['Event', 'Meta', 'Taint', 'pending_of']


@dataclass(eq=False)
class Event:
    """One nonlinear operation at one place; `fates` is what became of its results.

    Fates are 'unknown' (a layer or a neuron got them), 'output' (they left the model), and 'gate' (they scaled another
    tensor, or weighted one).
    """
    op: str
    path: str  # of the module that ran it
    made: Optional[str] = None  # class of a module inside it that is no registered submodule
    gate: bool = False  # sigmoids: a gate where it scales another tensor
    fates: Set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Meta:
    """One tensor.

    Args:
        root: Identifies the layer output that it was made of, element by element.
        base: The same, of the tensor that this one's elements were taken from (slices, paddings).
        pending: Nonlinear operations on the way from there that nothing has decided about.
        stat: The base whose statistic this is (mean, norm, ...).
        binary: Whether it holds two values, as a neuron's output does: no function of it is nonlinear.
        fired_from: Root of the current that a neuron turned into this.
        shift: Constant that was added last.
        exp: The event, where it is exp(x) or a sum of it.
        stacked: Whether an axis of it counts tensors that were stacked, or parts of an axis.
    """
    root: int
    base: int
    pending: FrozenSet[Event] = frozenset()
    stat: Optional[int] = None
    binary: bool = False
    fired_from: Optional[int] = None
    shift: Optional[float] = None
    exp: Optional[Event] = None
    stacked: bool = False

    def but(self, **changes) -> 'Meta':
        return replace(self, **changes)

    def scaled(self) -> 'Meta':
        """The same times a constant."""
        return self.but(shift=None, exp=None, stacked=False)


_Geometry = Tuple[int, Tuple[int, ...], Tuple[int, ...]]


class Taint:
    """Metas of living tensors, by storage and place in it, so that views and in-place operations are seen."""

    def __init__(self):
        self._metas: Dict[int, Tuple[StorageWeakRef, Dict[_Geometry, Meta]]] = {}
        self._roots = itertools.count()
        self._mixed: Dict[FrozenSet[int], int] = {}

    def new_root(self) -> int:
        return next(self._roots)

    def mixed_root(self, roots: Iterable[int]) -> int:
        """The same number whenever the same roots are combined."""
        key = frozenset(roots)
        if len(key) == 1:
            return next(iter(key))
        if key not in self._mixed:
            self._mixed[key] = self.new_root()
        return self._mixed[key]

    def fresh(self, pending: FrozenSet[Event] = frozenset(), **known) -> Meta:
        root = self.new_root()
        return Meta(root, root, pending, **known)

    def get(self, x: torch.Tensor) -> Optional[Meta]:
        metas = self._of_storage(x)
        if not metas:
            return None
        found = metas.get(_geometry(x))
        if found is not None:
            return found
        parts = list(metas.values())  # a view that no operation was seen to make
        root = self.mixed_root(m.root for m in parts)
        return Meta(root, root, frozenset().union(*(m.pending for m in parts)))

    def has(self, x: torch.Tensor) -> bool:
        """Whether an operation was seen to make this very view."""
        return _geometry(x) in (self._of_storage(x) or {})

    def set(self, x: torch.Tensor, meta: Meta, in_place: bool = False) -> None:
        storage = x.untyped_storage()
        metas = self._of_storage(x)
        if metas is None:
            metas = {}
            self._metas[storage._cdata] = StorageWeakRef(storage), metas
        if in_place:  # views of the same memory
            for place, other in metas.items():
                metas[place] = other.but(pending=other.pending | meta.pending)
        metas[_geometry(x)] = meta

    def forget(self, x: torch.Tensor) -> None:
        """x was overwritten by a constant."""
        metas = self._of_storage(x)
        if metas:
            metas.pop(_geometry(x), None)

    def _of_storage(self, x: torch.Tensor) -> Optional[Dict[_Geometry, Meta]]:
        try:
            key = x.untyped_storage()._cdata
        except (NotImplementedError, RuntimeError):  # sparse and other tensors without a storage
            return None
        entry = self._metas.get(key)
        if entry is None or entry[0].expired():
            self._metas.pop(key, None)
            return None
        return entry[1]


def _geometry(x: torch.Tensor) -> _Geometry:
    return x.storage_offset(), tuple(x.shape), tuple(x.stride())


def pending_of(metas: Iterable[Meta]) -> FrozenSet[Event]:
    return frozenset().union(*(m.pending for m in metas))
