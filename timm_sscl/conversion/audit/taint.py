"""Metadata of tensors that depend on the model's input."""
import itertools
from dataclasses import dataclass, field, replace
from typing import Dict, FrozenSet, Iterable, Optional, Set, Tuple, Union

import torch
from torch.multiprocessing.reductions import StorageWeakRef

__all__ = ['Event', 'Meta', 'Taint', 'pending_of']


@dataclass(eq=False)
class Event:
    """One nonlinear operation at one place, with the fates of its results.

    Fates are 'unknown' (a layer or a neuron received them), 'output' (they left the model), and 'gate' (they scaled or
    weighted another tensor).
    """
    op: str
    path: str  # path of the module that ran the operation
    made: Optional[str] = None  # class of an unregistered module inside it that ran the operation
    gate: bool = False  # whether it is a gate if it scales another tensor (sigmoids)
    fates: Set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Meta:
    """Metadata of one tensor.

    Args:
        root: Identifies the layer output from which the tensor was made element by element.
        base: root of the tensor from which this one's elements were taken (slices, padding).
        pending: Nonlinear operations since the root that have no fate yet.
        stat: base of the tensor of which this is a statistic (mean, norm, ...).
        binary: Whether it has only two values, as a neuron's output. No function of it is then nonlinear.
        fired_from: root of the current from which a neuron computed this.
        shift: Constant that was added last.
        exp: The event, if the tensor is exp(x) or a sum of it.
        stacked: Whether one of its axes counts stacked tensors or parts of an axis.
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
        """Return a copy with some fields changed."""
        return replace(self, **changes)

    def scaled(self) -> 'Meta':
        """Return the meta of this tensor times a constant."""
        return self.but(shift=None, exp=None, stacked=False)


_Geometry = Tuple[Union[int, torch.SymInt], Tuple[int, ...], Tuple[int, ...]]


class Taint:
    """Map living tensors to their Meta, by storage and place in it. Views and in-place operations are thus followed."""

    def __init__(self):
        self._metas: Dict[int, Tuple[StorageWeakRef, Dict[_Geometry, Meta]]] = {}
        self._roots = itertools.count()
        self._mixed: Dict[FrozenSet[int], int] = {}

    def new_root(self) -> int:
        return next(self._roots)

    def mixed_root(self, roots: Iterable[int]) -> int:
        """Return the root for a combination of roots, always the same for the same roots."""
        key = frozenset(roots)
        if len(key) == 1:
            return next(iter(key))
        if key not in self._mixed:
            self._mixed[key] = self.new_root()
        return self._mixed[key]

    def fresh(self, pending: FrozenSet[Event] = frozenset(), **known) -> Meta:
        """Return a Meta with a new root."""
        root = self.new_root()
        return Meta(root, root, pending, **known)

    def get(self, x: torch.Tensor) -> Optional[Meta]:
        """Return the Meta of a tensor; None if it does not depend on the input."""
        metas = self._of_storage(x)
        if not metas:
            return None
        found = metas.get(_geometry(x))
        if found is not None:
            return found
        parts = list(metas.values())  # a view made by an operation that the mode did not see
        root = self.mixed_root(m.root for m in parts)
        return Meta(root, root, frozenset().union(*(m.pending for m in parts)))

    def has(self, x: torch.Tensor) -> bool:
        """Return whether this view itself was made by an operation that the mode saw."""
        return _geometry(x) in (self._of_storage(x) or {})

    def set(self, x: torch.Tensor, meta: Meta, in_place: bool = False) -> None:
        storage = x.untyped_storage()
        metas = self._of_storage(x)
        if metas is None:
            metas = {}
            self._metas[storage._cdata] = StorageWeakRef(storage), metas
        if in_place:  # other views of the same memory change, too
            for place, other in metas.items():
                metas[place] = other.but(pending=other.pending | meta.pending)
        metas[_geometry(x)] = meta

    def forget(self, x: torch.Tensor) -> None:
        """Remove the Meta of x, which was overwritten by a constant."""
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
    """Return all events that are pending in several Metas."""
    return frozenset().union(*(m.pending for m in metas))
