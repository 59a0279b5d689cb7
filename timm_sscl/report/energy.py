"""Estimate the energy of the arithmetic for one image, spiking and real-valued (45 nm, float32; Horowitz 2014)."""
import warnings
from typing import Dict, List, NamedTuple, Optional

import torch
import torch.nn as nn

from timm_sscl.untouched import untouched

from .firing import FiringRates
from .layer_inputs import InputSum
from .macs import MacShares, Product, count_macs, near_whole, quotient, with_products
from .watching import neurons_to_watch

__all__ = ['Energy', 'LayerEnergy', 'estimate_energy', 'MAC_PJ', 'AC_PJ', 'RULE']

MAC_PJ = 4.6  # energy of one multiplication and addition
AC_PJ = 0.9  # energy of one addition
_Sums = Dict[str, List[InputSum]]
_PROBE = 8  # number of images that show the kinds of a model's products where rates are given
RULE = (
    f'{MAC_PJ} pJ for a multiply-accumulate (MAC) whose input is not whole numbers, {AC_PJ} pJ for an addition. A MAC '
    f'whose input is spikes is as many additions as its input has spikes. Real-valued: {MAC_PJ} pJ for every MAC of '
    f'one timestep. 45 nm, float32 (Horowitz 2014); no memory traffic, norms or neurons.')


class LayerEnergy(NamedTuple):
    """Energy of one layer per image in microjoules, by the rule of `Energy`."""
    spiking: float
    ann: float
    macs: int  # multiply-accumulates in the spiking network
    additions: float  # additions in the spiking network


class Energy(NamedTuple):
    """Energy per image in microjoules, without memory traffic, norms and neurons.

        spiking = 4.6 pJ * MACs whose input is not whole numbers
                  + 0.9 pJ * sum_l fr_l * MACs_l over the others, all T timesteps; fr_l the mean |value|
        ann     = 4.6 pJ * MACs of one timestep

    The stem, whose input is the analog image, counts T times, or once with `share_stem`. Layers with fractional input
    (average pooling of spikes) count as MACs. Sums of spikes, ternary and integer spikes count by their absolute value.
    Analog output of a neuron counts as MACs, and so do the products inside a parallel spiking neuron.
    """
    spiking: float
    ann: float
    macs: int  # multiply-accumulates of the spiking network
    additions: float  # additions of the spiking network
    ann_macs: int
    layers: Dict[str, LayerEnergy] = {}  # energy by module, in the order of the first calls; its sum is the whole

    @property
    def ratio(self) -> float:
        """Spiking energy divided by real-valued energy."""
        return self.spiking / self.ann


def estimate_energy(model: nn.Module, images: torch.Tensor, rates: Optional[FiringRates] = None) -> Energy:
    """Estimate the energy of a spiking model's arithmetic, and of the same network with one real-valued timestep.

    Args:
        model: Spiking model.
        images: Real images in the model's input format, on its device. The firing rates are measured on them.
        rates: What `FiringRates(model, inputs=True)` counted on other images, such as a whole validation set. The
            firing rates are then those. The first 8 of `images` show which layers multiply and which add (all of them,
            if a layer is silent on 8). They stand for products outside a layer, such as one of two activations.

    Returns:
        Energy per image.

    Raises:
        ValueError: The model has no spiking neurons; there are no images, or they have another number of channels than
            the model takes; rates have no inputs, or were counted on another model or number of timesteps.

    Examples:
        ```python
        with FiringRates(model, inputs=True) as rates, torch.no_grad():
            for images, _ in loader:
                model(images)
        energy = estimate_energy(model, images, rates)
        ```
    """
    neurons = neurons_to_watch(model)
    if isinstance(images, torch.Tensor) and not len(images):
        raise ValueError(f'images: have shape {tuple(images.shape)}, no image.')
    shares = count_macs(model, images) if rates is None else _count_with_rates(model, images, rates)
    frames = images[:, :1] if images.ndim == 5 else images
    with untouched(model), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # some neurons change with one timestep, which does not affect the count
        model.set_timesteps(1)
        ann = count_macs(model, frames[:1])
    ann_by_layer = {name: sum(macs.values()) for name, macs in ann.by_module.items()
                    if name not in neurons}  # an activation takes none
    layers = _by_layer(shares, ann_by_layer)
    macs, ann_macs = shares.total - shares.whole, sum(ann_by_layer.values())
    return Energy((MAC_PJ * macs + AC_PJ * shares.additions) * 1e-6, MAC_PJ * ann_macs * 1e-6, macs, shares.additions,
                  ann_macs, layers)


def _count_with_rates(model: nn.Module, images: torch.Tensor, rates: FiringRates) -> MacShares:
    """Count the MACs of some images. Additions of layers are scaled to the mean inputs that `rates` counted, for each
    call and channel of a layer.
    """
    if rates.inputs is None:
        raise ValueError('rates: the inputs of the layers were not counted; give FiringRates(model, inputs=True).')
    steps = {len(step_rates) for step_rates in rates.per_step().values()}
    if steps != {model.timesteps}:
        counted = f'{max(steps)} timesteps' if steps else 'no image'
        raise ValueError(f'rates: were counted on {counted}, and the model has {model.timesteps} timesteps.')
    wanted = rates.inputs.sums()
    for few in dict.fromkeys((min(_PROBE, len(images)), len(images))):
        with FiringRates(model, inputs=True) as here:
            shares = count_macs(model, images[:few])
        found = here.inputs.sums() if here.inputs is not None else {}
        _check_same_calls(wanted, found)
        if all(bool(own.total.any()) or not other.total.any()
               for name, sums in found.items() for own, other in zip(sums, wanted[name])):
            break  # the input of a layer that is silent on these images has no kind
    return with_products(shares, {
        name: [_at_rate(product, *(sums[name][i * len(sums[name]) // len(products)] for sums in (wanted, found)))
               for i, product in enumerate(products)] if name in found else products
        for name, products in shares.products.items()})


def _check_same_calls(wanted: _Sums, found: _Sums) -> None:
    """Raise ValueError unless the layers that run were counted, as often in a forward."""
    for name, sums in found.items():
        if name not in wanted:
            raise ValueError(f"rates: were counted on another model, since layer '{name}' did not run there. Give "
                             f'FiringRates and estimate_energy the same model.')
        if len(wanted[name]) != len(sums):
            raise ValueError(f"rates: layer '{name}' runs {len(sums)} times in a forward, and was counted "
                             f'{len(wanted[name])} times. Count calls of the whole model: model(images).')


def _at_rate(product: Product, wanted: InputSum, found: InputSum) -> Product:
    """Scale the additions of a product from one sum of |input| per channel to another.

    If its input was zero, it adds where the other sum is whole numbers of levels.
    """
    if not product.whole:
        return product
    if found.total.any():
        mean, own = (_in_units(x.mean, product.units[0]).mean().item() for x in (wanted, found))
        return product._replace(additions=product.additions * mean / own)
    for unit in product.units:
        if near_whole(_in_units(wanted.total, unit), 2e-6).all():  # tolerance: a few float32 roundings
            return product._replace(additions=product.whole * _in_units(wanted.mean, unit).mean().item())
    return Product(0, 0., [None])


def _in_units(x: torch.Tensor, unit: Optional[torch.Tensor]) -> torch.Tensor:
    levels = None if unit is None else quotient(x, unit.abs().to(x))
    return x if levels is None else levels


def _by_layer(shares: MacShares, ann: Dict[str, int]) -> Dict[str, LayerEnergy]:
    """Return the energy of every module.

    Args:
        shares: MACs of the spiking network.
        ann: MACs of one real-valued timestep by module.
    """
    layers = {}
    for name in dict.fromkeys([*shares.by_module, *ann]):
        whole, additions = shares.added_by_module.get(name, (0, 0.))
        macs = sum(shares.by_module.get(name, {}).values()) - whole
        layers[name] = LayerEnergy(
            (MAC_PJ * macs + AC_PJ * additions) * 1e-6, MAC_PJ * ann.get(name, 0) * 1e-6, macs, additions)
    return layers
