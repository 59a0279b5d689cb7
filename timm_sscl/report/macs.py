"""Count the multiply-accumulates (MACs) of a forward by the kind of their input: how spiking a network is."""
from contextlib import contextmanager, nullcontext
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.modules.module as torch_module
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from timm_sscl.fused_paths import without_fused_paths
from timm_sscl.neurons import SpikingNeuron
from timm_sscl.probing import naming_channels
from timm_sscl.untouched import untouched

__all__ = ['MacShares', 'Product', 'count_macs', 'input_kind', 'near_whole', 'quotient', 'with_products',
           'KINDS']

KINDS = 'binary', 'fractional', 'analog'
_MAX_DENOMINATOR = 1024
_UNITS = 4  # number of neurons that ran last whose units are tried on an input
_SAMPLE = 4096  # number of values checked to tell fractions from analog values
_FEW = 32  # number of them checked for all denominators at once

aten = torch.ops.aten
_ADDED = {aten.addmm, aten.baddbmm}  # their first argument is added, not multiplied
# Products that torch's flop counter lacks: positions of the multiplied arguments, and their MACs.
_OTHERS: Dict[Any, Tuple[Tuple[int, int], Callable[..., int]]] = {
    aten.dot: ((0, 1), lambda a, b: a.numel()),
    aten.vdot: ((0, 1), lambda a, b: a.numel()),
    aten.mv: ((0, 1), lambda matrix, vector: matrix.numel()),
    aten.addmv: ((1, 2), lambda added, matrix, vector: matrix.numel()),
    aten.addbmm: ((1, 2), lambda added, a, b: a.numel() * b.shape[-1]),
    aten._trilinear: ((0, 2), lambda a, weight, b, *_: len(a) * weight.numel()),  # nn.Bilinear
}


class Product(NamedTuple):
    """One product of a forward: its part that only adds."""
    whole: int  # MACs whose input is whole numbers; 0 if it multiplies
    additions: float
    units: Sequence[Optional[torch.Tensor]]  # size of one level of its input, None is 1; the possible ones of zeros


class MacShares(NamedTuple):
    """MACs of one image over all its timesteps, by the kind of their input."""
    binary: int  # input 0 or 1: the MAC is an addition of a weight, or nothing
    fractional: int  # input k / n with n up to 1024: pooled spikes, residual sums
    analog: int
    by_module: Dict[str, Dict[str, int]]  # module -> kind -> MACs
    whole: int = 0  # MACs whose input is whole numbers (spikes, sums of spikes): additions only
    additions: float = 0.  # number of these additions: MACs times the mean |input| (the firing rate)
    added_by_module: Dict[str, Tuple[int, float]] = {}  # module -> its part of (whole, additions)
    products: Dict[str, List[Product]] = {}  # module -> its products in the order of the forward

    @property
    def total(self) -> int:
        return self.binary + self.fractional + self.analog

    def share(self, kind: str) -> float:
        """Return the fraction of all MACs of a kind, 0 to 1."""
        return getattr(self, kind) / max(self.total, 1)


def input_kind(x: torch.Tensor, tolerance: float = 2e-7) -> str:
    """Classify the values of a tensor: 'binary', 'fractional' (all multiples of 1/n, n up to 1024) or 'analog'.

    Args:
        x: Tensor.
        tolerance: Relative deviation from a multiple of 1/n that counts as rounding.
    """
    if ((x == 0) | (x == 1)).all():
        return 'binary'
    values = x.detach().flatten()
    values = values[values != 0].double()
    values = values[torch.linspace(0, len(values) - 1, min(len(values), _SAMPLE)).long()]
    if values.abs().max() > _SAMPLE:
        return 'analog'
    denominators = torch.arange(1, _MAX_DENOMINATOR + 1, dtype=values.dtype, device=values.device)
    # most denominators are out for the first few values
    possible = denominators[near_whole(values[:_FEW] * denominators[:, None], tolerance).all(1)]
    return 'fractional' if any(near_whole(values * n, tolerance).all() for n in possible) else 'analog'


def near_whole(x: torch.Tensor, tolerance: float = 2e-7) -> torch.Tensor:
    """Return where values are whole numbers. Averages deviate by a few float32 roundings, other values by 1/4 on
    average.
    """
    return (x - x.round()).abs() <= tolerance * x.abs()


def _is_whole(x: torch.Tensor) -> bool:
    return bool((x == x.round()).all())


def _in_levels(x: torch.Tensor, units: Sequence[torch.Tensor]) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
    """Return x divided by one of the units, and this unit, if that gives whole numbers or, failing that, fractions;
    else x itself and None.
    """
    quotients = [(q, unit) for q, unit in ((quotient(x, unit), unit) for unit in units) if q is not None]
    for levels, unit in quotients:
        if near_whole(levels, 2e-6).all():  # tolerance: a few float32 roundings
            return levels.round(), unit
    if quotients and input_kind(x) == 'analog':
        return next((pair for pair in quotients if input_kind(pair[0], 2e-6) == 'fractional'), (x, None))
    return x, None


def quotient(x: torch.Tensor, unit: torch.Tensor) -> Optional[torch.Tensor]:
    """Return x / unit, also for flattened maps x (N, C * H * W) and a unit (C, 1, 1); None if the shapes do not fit."""
    if unit.ndim > x.ndim and x.ndim == 2 and x.shape[1] % unit.numel() == 0 and unit.shape[0] == unit.numel():
        unit = unit.flatten().repeat_interleave(x.shape[1] // unit.numel())
    if unit.ndim > x.ndim or any(n not in (1, m) for n, m in zip(unit.shape[::-1], x.shape[::-1])):
        return None
    return torch.where(unit == 0, 0., x / unit)


class _CountMacs(TorchDispatchMode):
    """Dispatch mode that counts the MACs of every product, by module and by the kind of input.

    Args:
        model: Model. Its parameters and buffers do not count as input of a product.
    """
    def __init__(self, model: nn.Module):
        super().__init__()
        self.weights = {w.untyped_storage().data_ptr() for w in (*model.parameters(), *model.buffers())}
        # a shared module has one name, its first
        self.names = {module: f'.{name}'.replace('._orig_mod', '')[1:] for name, module in model.named_modules()}
        self.running: List[nn.Module] = []
        self.fired = False  # before the first neuron, a fraction is a pixel (k / 255), not an average of spikes
        self.by_module: Dict[str, Dict[str, int]] = {}
        self.products: Dict[str, List[Product]] = {}
        self.inside_neuron = False
        self.units: List[torch.Tensor] = []  # units of the neurons that ran last

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, packet = kwargs or {}, func._overloadpacket
        if packet not in flop_registry and packet not in _OTHERS:
            with self:  # in torch.inference_mode, linear layers and convolutions arrive as one op
                out = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if out is NotImplemented else out
        out = func(*args, **kwargs)
        if packet in flop_registry:
            flops = flop_registry[packet](*args, **kwargs, out_val=out)
            self._count(args[1:3] if packet in _ADDED else args[:2], flops // 2)
        else:
            operands, macs = _OTHERS[packet]
            self._count([args[i] for i in operands], macs(*args))
        return out

    def _count(self, operands: Sequence[torch.Tensor], macs: int) -> None:
        """Count a product by its most spiking operand that is not a weight."""
        if self.inside_neuron:  # arithmetic inside a neuron, as in a parallel spiking neuron
            self._add('analog', macs)
            return
        inputs = [_in_levels(x, self.units) for x in operands
                  if x.untyped_storage().data_ptr() not in self.weights]
        kinds = [input_kind(x) for x, _ in inputs]
        kind = min(kinds, key=KINDS.index, default='analog')
        self._add('analog' if kind == 'fractional' and not self.fired else kind, macs)
        x, unit = inputs[kinds.index(kind)] if inputs else (None, None)
        adds = x is not None and self.fired and (kind == 'binary' or _is_whole(x))
        product = Product(0, 0., [None])
        if x is not None and adds:
            units = [unit] if x.any() else [None, *self.units]
            product = Product(macs, macs * x.double().abs().mean().item(), units)
        self.products.setdefault(self._module(), []).append(product)

    def enter_neuron(self, *_: Any) -> None:
        """Forward pre-hook of a neuron."""
        self.inside_neuron = True

    def leave_neuron(self, neuron: SpikingNeuron, *_: Any) -> None:
        """Forward hook of a neuron: from here on, fractions and whole multiples of the neuron's unit come from spikes.
        """
        self.inside_neuron, self.fired, unit = False, True, neuron.unit()
        if unit is not None:
            self.units = [unit.detach(), *self.units][:_UNITS]

    @contextmanager
    def follow(self) -> Iterator[None]:
        """Count inside, and know which modules run."""
        entered = torch_module.register_module_forward_pre_hook(lambda module, args: self.running.append(module))
        left = torch_module.register_module_forward_hook(lambda module, args, out: self._leave())
        try:
            with self:
                yield
        finally:
            entered.remove()
            left.remove()

    def _leave(self) -> None:
        self.running.pop()

    def _module(self) -> str:
        """Return the name of the innermost module of the model that runs."""
        return next((self.names[module] for module in reversed(self.running) if module in self.names), '')

    def _add(self, kind: str, macs: int) -> None:
        self.by_module.setdefault(self._module(), dict.fromkeys(KINDS, 0))[kind] += macs


def count_macs(model: nn.Module, images: torch.Tensor) -> MacShares:
    """Count the MACs of one forward by the kind of their input: convolutions, linear layers, matrix products.

    A product of two activations (attention) counts by its more spiking operand. Elementwise products, norms and pooling
    are not MACs. The kind follows from the values of the input, not from the architecture. An amplitude that a neuron
    learns, or the output scale of a converted ANN, is divided out where the input is multiples of it, since it folds
    into the weights there.

    Args:
        model: Model, spiking or not. It runs in evaluation mode without gradients.
        images: Batch in the model's input format.

    Returns:
        MacShares per image, summed over the timesteps.

    Raises:
        ValueError: The images have another number of channels than the model takes.
    """
    model = getattr(model, '_orig_mod', model)  # of a compiled model
    counter = _CountMacs(model)
    recurrent = any(isinstance(m, nn.RNNBase) for m in model.modules())
    # fused kernels would hide their products
    unfused = torch.backends.mkldnn.flags(enabled=False) if recurrent else nullcontext()
    with untouched(model), unfused, without_fused_paths(), sdpa_kernel(SDPBackend.MATH):
        for module in model.modules():
            if isinstance(module, SpikingNeuron):
                module.register_forward_pre_hook(counter.enter_neuron)
                module.register_forward_hook(counter.leave_neuron)
        with naming_channels(images), counter.follow():
            model(images)
    n = len(images)
    by_module = {name: {kind: macs // n for kind, macs in counts.items()} for name, counts in counter.by_module.items()}
    totals = {kind: sum(counts[kind] for counts in by_module.values()) for kind in KINDS}
    products = {name: [Product(p.whole // n, p.additions / n, p.units) for p in found]
                for name, found in counter.products.items()}
    shares = MacShares(totals['binary'], totals['fractional'], totals['analog'], by_module)
    return with_products(shares, products)


def with_products(shares: MacShares, products: Dict[str, List[Product]]) -> MacShares:
    """Return shares whose additions are those of some products."""
    added = {name: (sum(p.whole for p in found), sum(p.additions for p in found)) for name, found in products.items()}
    return shares._replace(
        whole=sum(whole for whole, _ in added.values()), additions=sum(additions for _, additions in added.values()),
        added_by_module=added, products=products)
