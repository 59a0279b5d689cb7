"""calibrate: an input gain for every neuron layer, from one forward, so that no layer starts silent."""
import logging
from contextlib import contextmanager
from typing import Dict, Iterator, List, NamedTuple, Tuple

import torch
import torch.nn as nn
from torch.nn.modules.batchnorm import _NormBase

from .neurons import LIF
from .spiking import SpikingModule

__all__ = ['calibrate', 'normalising_by_batch', 'LayerDrive']

_logger = logging.getLogger(__name__)

_MIN_RATE = 0.01  # below this share of inputs over the threshold the mean square says too little about a skewed input
_REVIVED = 0.1  # of a usual initialisation: what starts at zero stays weak, but passes a gradient on


class LayerDrive(NamedTuple):
    """What drives one neuron layer."""
    name: str
    rms: float  # root mean square of the input current, before the gain
    gain: float
    rate: float  # spikes per neuron and step after the gain


def calibrate(model: nn.Module, images: torch.Tensor) -> List[LayerDrive]:
    """Set the input gain of every neuron layer so that its input is as large as a batch norm's output.

        gain = (v_threshold / 0.5) / rms(x)        0.5 is the threshold that goes with a root mean square of 1

    Where hardly any input would reach the threshold so (a few large negative values make the mean square), the median
    of the positive inputs does. One forward measures and sets the layers in the order in which they run, each behind
    the calibrated ones before it. Batch norms normalise by the batch, as in training, and keep their running
    statistics; dropout and stochastic depth are off. A layer that runs several times gets one gain from all its inputs.

    Behind a zero no neuron gets a gradient: a norm's scale (or a weight-standardised convolution's gain) that is zero
    throughout, as in branches that start at zero, becomes 0.1, and weights that are, as of some classifiers, become
    small noise.

    Gains are no parameters; they are in the state_dict of the spiking model. Layers that fire never or always even so
    are named in a warning.

    Args:
        model: Spiking model.
        images: A batch as the model takes it, (B, C, H, W) or (B, T, C, H, W), of real images.

    Returns:
        One LayerDrive per layer that ran, in the order of their first call.

    Raises:
        ValueError: The model does not spike, its neurons have output scales (their thresholds come from an ANN), or
            images holds something that is not finite.
    """
    _check(model, images)
    if model.settings.norm is not None:
        _logger.warning(f"{type(model).__name__}: the gains make up for the scale that norm='{model.settings.norm}' "
                        f'gives the currents, so that training starts as with plain batch norms.')
    _revive_zeros(model)
    drives: Dict[str, '_Drive'] = {}
    handles = []
    for name, lif in model.neurons().items():
        drive = _Drive(lif)
        handles += [lif.register_forward_pre_hook(drive.measure), lif.register_forward_hook(drive.count)]
        drives[name] = drive
    try:
        with normalising_by_batch(model), torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    ran = sorted((d.order, name) for name, d in drives.items() if d.order is not None)
    result = [drives[name].result(name) for _, name in ran]
    _warn(model, result, [name for name, d in drives.items() if d.order is None])
    return result


def _check(model: nn.Module, images: torch.Tensor) -> None:
    if not isinstance(model, SpikingModule):
        raise ValueError(f'{type(model).__name__} does not spike; convert_to_spiking(model) makes it.')
    if any(lif.scale is not None for lif in model.neurons().values()):
        raise ValueError(f"{type(model).__name__}: its neurons' thresholds come from an ANN (convert_ann); a "
                         f'calibration would undo them.')
    if not torch.isfinite(images).all():
        raise ValueError('images: holds values that are not finite.')


class _Drive:
    """Measures one layer's input and sets its gain, call by call."""
    _calls = 0  # over all layers, to order them

    def __init__(self, lif: LIF):
        self.lif = lif
        self.order = None
        self.squares: List[float] = []
        self.fired = self.elements = 0
        lif.set_gain(None, lif.scale)

    def measure(self, lif: LIF, args: Tuple[torch.Tensor]) -> None:
        if self.order is None:
            self.order = _Drive._calls = _Drive._calls + 1
        x = args[0].detach()
        self.squares.append(x.to(torch.promote_types(x.dtype, torch.float32)).square().mean().item())
        lif.set_gain(torch.tensor(self._gain(x), device=x.device), lif.scale)

    def _gain(self, x: torch.Tensor) -> float:
        if self.rms == 0:
            return 1.
        threshold = self.lif.v_threshold
        gain = threshold / 0.5 / self.rms
        if (x * gain >= threshold).float().mean() < _MIN_RATE and (x > 0).any():
            gain = max(gain, threshold / x[x > 0].median().item())  # skewed: half of the positive inputs fire
        return gain

    def count(self, lif: LIF, args: Tuple[torch.Tensor], spikes: torch.Tensor) -> None:
        self.fired += spikes.count_nonzero().item()
        self.elements += spikes.numel()

    @property
    def rms(self) -> float:
        return (sum(self.squares) / len(self.squares)) ** 0.5

    def result(self, name: str) -> LayerDrive:
        return LayerDrive(name, self.rms, self.lif.gain.item(), self.fired / max(self.elements, 1))


@contextmanager
def normalising_by_batch(model: nn.Module) -> Iterator[None]:
    """Norms with running statistics in training mode, all else in evaluation mode; statistics stay as they were."""
    modes = {module: module.training for module in model.modules()}
    norms = [module for module in modes if isinstance(module, _NormBase)]
    statistics = [{name: b.clone() for name, b in norm._buffers.items() if b is not None} for norm in norms]
    model.eval()
    for norm in norms:
        norm.training = True
    try:
        yield
    finally:
        for norm, kept in zip(norms, statistics):
            for name, value in kept.items():
                norm._buffers[name].copy_(value)
        for module, training in modes.items():
            module.training = training


def _revive_zeros(model: nn.Module) -> None:
    """Scales and weights that are zero throughout pass no gradient on: make them small instead."""
    revived = []
    generator = torch.Generator().manual_seed(0)  # the global generator stays where it is
    for name, module in model.named_modules():
        is_norm = 'norm' in type(module).__name__.lower() and 'GlobalResponse' not in type(module).__name__  # GRN adds
        for scale in [module._parameters.get('weight')] if is_norm else [module._parameters.get('gain')]:
            if scale is not None and not scale.any():
                nn.init.constant_(scale, _REVIVED)
                revived.append(name)
        weight = module._parameters.get('weight')
        if isinstance(module, (nn.Linear, nn.Conv2d)) and not weight.any():
            with torch.no_grad():
                weight.copy_(torch.randn(weight.shape, generator=generator) * _REVIVED / weight[0].numel() ** 0.5)
            revived.append(name)
    if revived:
        _logger.info(f'{type(model).__name__}: {len(revived)} scales or weights started at zero and are small now '
                     f'({", ".join(revived[:3])}{", ..." if len(revived) > 3 else ""}).')


def _warn(model: nn.Module, result: List[LayerDrive], idle: List[str]) -> None:
    kind = type(model).__name__
    for names, what in (
            ([d.name for d in result if d.rate == 0], 'never fire, even after calibration'),
            ([d.name for d in result if d.rate == 1], 'always fire, even after calibration'),
            (idle, 'did not run in the forward and have no gain')):
        if names:
            _logger.warning(f'{kind}: {len(names)} neuron layers {what}: {", ".join(names)}.')
    rates = sorted(d.rate for d in result)
    gains = sorted(d.gain for d in result)
    _logger.info(f'{kind}: {len(result)} neuron layers calibrated, gains {gains[0]:.3g} to {gains[-1]:.3g}, firing '
                 f'rates {rates[0]:.3f} to {rates[-1]:.3f}, median {rates[len(rates) // 2]:.3f}.')
