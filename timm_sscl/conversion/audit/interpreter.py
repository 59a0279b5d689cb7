"""Interpreter: follow one forward operation by operation and record nonlinear operations between layers and neurons."""
from typing import Any, Callable, Dict, FrozenSet, List, Optional, Tuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .ops import CURVED_REDUCTIONS, EXCUSED_IN_NORMS, SLICES, attention_name, kind_of, op_name
from .taint import Event, Meta, Taint, pending_of

__all__ = ['Interpreter']

_SIGMOIDS = {'sigmoid', 'hardsigmoid'}
_CLIPS = {'clamp', 'hardtanh', 'clip'}
_STAYS_BINARY = {'max', 'amax', 'any', 'max_pool2d_with_indices', 'max_pool2d', 'adaptive_max_pool2d'}


def _tensors(tree: Any) -> List[torch.Tensor]:
    """Return all tensors in nested containers."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Interpreter(TorchDispatchMode):
    """Dispatch mode that follows all tensors that depend on the model's input through torch's operations.

    Args:
        place: Function that returns the path of the running module, and the class of an unregistered module inside it.
    """

    def __init__(self, place: Callable[[], Tuple[str, Optional[str]]]):
        super().__init__()
        self.taint = Taint()
        self.events: List[Event] = []
        self._place = place
        self._paused = 0
        self._rules: Dict[str, Callable] = {
            'view': self._view, 'linear': self._linear, 'reduction': self._reduce, 'curved reduction': self._reduce,
            'layer': self._layer, 'attention': self._attention, 'sum': self._sum, 'copy': self._copy,
            'cast': self._cast, 'mul': self._mul, 'div': self._div, 'where': self._where,
            'elementwise': self._elementwise, 'opaque': self._opaque,
        }

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        name = op_name(func)
        inputs = [(x, self.taint.get(x)) for x in _tensors((args, kwargs))]
        out = func(*args, **kwargs)
        metas = [meta for _, meta in inputs if meta is not None]
        if not metas:
            return out
        kind = kind_of(name, func)
        if kind == 'escape':
            self.event('control flow')
        elif kind == 'constant':
            for x in _tensors(out):
                self.taint.forget(x)
        else:
            self._set(func, out, self._rules[kind](name, args, metas, out))
        return out

    def _set(self, func, out: Any, meta: Any) -> None:
        """Assign metadata to every output of an operation. `meta` is a Meta, or a function of the output."""
        in_place = func._schema.is_mutable
        for x in _tensors(out):
            known = meta(x) if callable(meta) else meta
            if known is not None:
                self.taint.set(x, known, in_place)

    # ---- called by the run

    def source(self, x: torch.Tensor) -> None:
        """Mark x as input of the model."""
        self.taint.set(x, self.taint.fresh())

    def neuron(self, fire: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """Call fire(x) for a neuron without following the operations inside, and return its output."""
        self._paused += 1
        try:
            out = fire(x)
        finally:
            self._paused -= 1
        meta = self.taint.get(x)
        if meta is not None:
            self._decide(meta.pending, 'unknown')
            self.taint.set(out, self.taint.fresh(binary=True, fired_from=meta.root))
        return out

    def leaves(self, out: Any) -> bool:
        """Mark the operations pending in the model's output, and return whether the output depends on the input.

        Without tensors in the output, the result is True.
        """
        tensors = _tensors(out)
        metas = [meta for meta in map(self.taint.get, tensors) if meta is not None]
        for event in pending_of(metas):
            event.fates.add('gate' if event.gate else 'output')
        return bool(metas) or not tensors

    # ---- events

    def event(self, op: str, gate: bool = False, fate: Optional[str] = None) -> FrozenSet[Event]:
        """Record a nonlinear operation in the running module.

        Args:
            op: Name of the operation.
            gate: Whether the operation is a gate if it scales another tensor.
            fate: What becomes of its result, if it is known already.
        """
        event = Event(op, *self._place(), gate)
        if fate is not None:
            event.fates.add(fate)
        self.events.append(event)
        return frozenset([event])

    @staticmethod
    def _decide(events: FrozenSet[Event], fate: str, gates: Optional[str] = None) -> None:
        """Assign a fate to events; events that may be gates get the fate `gates` if it is given."""
        for event in events:
            event.fates.add(gates if event.gate and gates else fate)

    # ---- rules: (name, args, metas of the inputs that depend on the model's input, out) -> meta of the output

    def _view(self, name, args, metas, out):
        meta, x = metas[0], _tensors(args)[0]
        grows = name in ('view', 'unflatten', '_unsafe_view', 'reshape') and _tensors(out)[0].ndim > x.ndim
        return meta.but(stacked=meta.stacked and name in ('permute', 'transpose', 'alias', 'detach') or grows)

    def _linear(self, name, args, metas, out):
        known = self._merge(metas).but(stacked=name == 'stack', shift=None, exp=None,
                                       binary=all(m.binary for m in metas))

        def of(x: torch.Tensor) -> Optional[Meta]:
            if name in SLICES and self.taint.has(x):  # the same slice was taken before
                return self.taint.get(x)
            return known.but(root=self.taint.new_root())
        return of

    def _reduce(self, name, args, metas, out):
        meta = self._merge(metas)
        pending = meta.pending
        if meta.stacked and name in ('amax', 'max', 'amin', 'min', 'aminmax') or (
                name in CURVED_REDUCTIONS and not meta.binary):
            pending = pending | self.event(name)
        return self.taint.fresh(pending, stat=meta.base if meta.stat is None else meta.stat,
                                exp=meta.exp if name == 'sum' else None,
                                binary=meta.binary and name in _STAYS_BINARY)

    def _layer(self, name, args, metas, out):
        both = len(metas) > 1  # an attention product: both operands depend on the input
        self._decide(pending_of(metas), 'unknown', 'gate' if both else None)
        return self.taint.fresh()

    def _attention(self, name, args, metas, out):
        self._decide(pending_of(metas), 'unknown', 'gate')
        self.event(attention_name(name), gate=True, fate='gate')
        return self.taint.fresh()

    def _sum(self, name, args, metas, out):
        meta = self._merge(metas)
        if len(metas) > 1 or name not in ('add', 'sub', 'rsub'):
            return meta
        constants = [a for a in args[:2] if isinstance(a, (int, float))]
        return meta.but(shift=constants[0] if constants and name == 'add' else None)

    def _copy(self, name, args, metas, out):
        return self.taint.get(args[1])

    def _cast(self, name, args, metas, out):
        x, y = _tensors(args)[0], _tensors(out)[0]
        loses = x.is_floating_point() and not (y.is_floating_point() or y.is_complex())
        meta = metas[0]
        return meta.but(pending=meta.pending | self.event('cast')) if loses and not meta.binary else meta

    def _mul(self, name, args, metas, out):
        if len(metas) < 2:
            return metas[0].scaled()
        a, b = metas[:2]
        if a.binary and b.binary:
            return self._merge(metas).scaled().but(binary=True)
        if b.root == a.fired_from or a.root == b.fired_from:
            self.event("mul of a neuron's output and its own input", fate='unknown')
            return self.taint.fresh(a.pending | b.pending)
        scaled = self._scaled(a, b) or self._scaled(b, a)
        if scaled is not None:
            return scaled
        pending = a.pending | b.pending
        if a.root == b.root:
            for event in pending:
                event.gate = False  # x * sigmoid(x) is an activation, not a gate
            return self._merge(metas).but(pending=pending | self.event('mul'))
        return self._merge(metas).but(pending=self._gates_open(pending))

    def _gates_open(self, pending: FrozenSet[Event]) -> FrozenSet[Event]:
        """Assign the fate 'gate' to events that may be gates, since they scale another tensor; return the other events.
        """
        for event in pending:
            if event.gate:
                event.fates.add('gate')
        return frozenset(event for event in pending if not event.gate)

    def _scaled(self, x: Meta, by: Meta) -> Optional[Meta]:
        """Return the meta of x times or divided by its own statistic (a normalisation); None if it is not one."""
        if by.stat is None or by.stat not in (x.base, x.stat):
            return None
        rest = frozenset(event for event in self._gates_open(by.pending) if event.op not in EXCUSED_IN_NORMS)
        return self.taint.fresh(x.pending | rest, stat=x.stat).but(base=x.base)

    def _div(self, name, args, metas, out):
        above, below = (self.taint.get(x) if isinstance(x, torch.Tensor) else None for x in args[:2])
        if below is None:
            return above.scaled()
        if above is None:
            return self._reciprocal(below)
        if above.exp is not None and above.exp is below.exp:
            above.exp.fates.add('gate')
            above.exp.gate = True
            self._decide((above.pending | below.pending) - {above.exp}, 'unknown', 'gate')
            above.exp.op = 'softmax'
            return self.taint.fresh()
        scaled = self._scaled(above, below)
        if scaled is not None:
            return scaled
        pending = above.pending | below.pending
        if above.root == below.root:
            return self._merge(metas).but(pending=pending | self.event('div'))
        self.event('div', gate=True, fate='gate')
        return self._merge(metas).but(pending=self._gates_open(pending))

    def _reciprocal(self, below: Meta) -> Meta:
        if below.binary:
            return below
        if below.exp is not None and below.shift == 1:  # 1 / (1 + exp(-x))
            return below.scaled().but(pending=below.pending - {below.exp} | self.event('sigmoid', gate=True))
        return below.scaled().but(pending=below.pending | self.event('reciprocal'))

    def _where(self, name, args, metas, out):
        mask = self.taint.get(args[0 if name == 'where' else 1])
        known = self._merge(metas)
        if mask is None or all(m.binary for m in metas):
            return known
        return known.but(pending=known.pending | self.event(name))

    def _elementwise(self, name, args, metas, out):
        known = self._merge(metas)
        if name == 'reciprocal':
            return self._reciprocal(known)
        if all(m.binary for m in metas) and len(metas) == 1 or name == 'pow' and len(args) > 1 and args[1] == 1:
            return known
        if name == 'lerp':
            weighted = isinstance(args[2], torch.Tensor) and self.taint.get(args[2]) is not None
            return known.but(pending=self._gates_open(known.pending)) if weighted else known
        if name in ('addcmul', 'addcdiv'):
            return self._add_product(name, args, metas, out)
        event = self.event(name, gate=name in _SIGMOIDS or name in _CLIPS and _clips_to_positive(args))
        exp = next(iter(event)) if name == 'exp' else None
        return known.but(pending=known.pending | event, exp=exp, shift=None, stacked=False, binary=False)

    def _add_product(self, name, args, metas, out):
        product = [meta for meta in map(self.taint.get, _tensors(args[1:3])) if meta is not None]
        known = [m for m in [self.taint.get(args[0])] if m is not None]
        if product:
            rule = self._mul if name == 'addcmul' else self._div
            known.append(rule(name, args[1:3], product, out))
        return self._merge(known)

    def _opaque(self, name, args, metas, out):
        self._decide(pending_of(metas), 'unknown', None)
        self.event(name, fate='unknown')
        return self.taint.fresh()

    def _merge(self, metas: List[Meta]) -> Meta:
        """Return the meta of a sum of tensors."""
        if len(metas) == 1:
            return metas[0]
        mains = [m for m in metas if m.stat is None] or metas
        bases = {m.base for m in mains} | {m.stat for m in mains}
        roots = {m.root for m in mains} | {m.root for m in metas if m.stat is not None and m.stat not in bases}
        stats = {m.stat for m in metas}
        root = self.taint.mixed_root(roots)
        alone = len({m.base for m in mains}) == 1 and roots == {m.root for m in mains}
        base = mains[0].base if alone else root
        return Meta(root, base, pending_of(metas), stat=stats.pop() if len(stats) == 1 else None)


def _clips_to_positive(args: Tuple[Any, ...]) -> bool:
    """Return whether the arguments are those of clamp(x, 0, c), the core of a hard sigmoid."""
    low, high = (*args[1:3], None, None)[:2]
    return low == 0 and isinstance(high, (int, float)) and 0 < high < float('inf')
