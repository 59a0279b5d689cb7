"""calibrate: set an input gain for every neuron layer from one forward, so that no layer starts silent."""
import logging
import math
from contextlib import contextmanager
from functools import partial
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Tuple

import torch
import torch.nn as nn
from torch.nn.modules.batchnorm import _NormBase

from timm_sscl.neurons import SpikingNeuron
from .revive import revive_zeros
from .model import SpikingModule
from timm_sscl.untouched import undone_on_error, untouched

__all__ = ['calibrate', 'normalising_by_batch', 'LayerDrive']

_logger = logging.getLogger(__name__)

# if a smaller share of inputs exceeds the threshold, the input is skewed and its mean square is not used
_MIN_RATE = 0.01


class LayerDrive(NamedTuple):
    """Input current of one neuron layer."""
    name: str
    rms: float  # root mean square of the input current before the gain
    gain: float
    rate: float  # spikes per neuron and timestep with the gain


def calibrate(model: SpikingModule, images: torch.Tensor) -> SpikingModule:
    """Set the input gain of every neuron layer so that its input is as large as a batch norm's output.

        gain = (v_threshold / 0.5) / rms(x)        threshold 0.5 corresponds to a root mean square of 1

    If hardly any input would reach the threshold (a few large negative values dominate the mean square), the gain lets
    the median of the positive inputs reach it. One forward measures and sets the layers in the order in which they run,
    so that each is measured after the calibrated layers before it. Batch norms normalise by the batch, as in training,
    and keep their running statistics. Dropout and stochastic depth are off. A layer that runs several times gets one
    gain from all its inputs.

    A neuron behind a zero gets no gradient. A norm's scale (or the gain of a weight-standardised convolution) that is
    all zeros, as at the end of zero-initialised branches, is therefore set to 0.1. Weights that are all zeros, as in
    some classifiers, are set to small noise.

    Gains are not parameters. They are in the state_dict of the spiking model. A warning names layers that still never
    or always fire.

    Args:
        model: Spiking model.
        images: A batch of real images in the model's input format, (B, C, H, W) or (B, T, C, H, W).

    Returns:
        The model itself. `model.spiking_report().drives` has one LayerDrive per layer that ran, in the order of the
        first calls.

    Raises:
        ValueError: The model is not spiking, its neurons have output scales (thresholds from an ANN), images or a
            layer's current has a value that is not finite, or no layer runs.
    """
    _check(model, images)
    variants = model.settings.variants().values()
    for variant in variants:
        if variant.scales_currents:
            _logger.warning(f'{type(model).__name__}: the gains make up for the scale that {variant} gives the '
                            f'currents, so that training starts as with plain batch norms.')
    stay = {name for variant in variants for name in variant.zeros_stay(model)}
    with undone_on_error(model, parameters=True):
        revive_zeros(model, stay)
        drives = _measure(model, images)
        for name, lif in model.neurons().items():
            lif.set_gain(drives[name].gain if name in drives else None, lif.scale)
    idle = [name for name in model.neurons() if name not in drives]
    result = [drive.result(name) for name, drive in drives.items()]
    _warn(model, result, idle, [drive.name for drive in result if stay and drive.rms == 0])
    model._drives = result
    return model


def _check(model: nn.Module, images: torch.Tensor) -> None:
    """Raise ValueError if the model or the images cannot be calibrated."""
    if not isinstance(model, SpikingModule):
        raise ValueError(f'{type(model).__name__} does not spike; convert_to_spiking(model) makes it.')
    if any(lif.scale is not None for lif in model.neurons().values()):
        raise ValueError(f"{type(model).__name__}: its neurons' thresholds come from an ANN (convert_ann); a "
                         f'calibration would undo them.')
    if not torch.isfinite(images).all():
        raise ValueError('images: holds values that are not finite.')


def _measure(model: SpikingModule, images: torch.Tensor) -> Dict[str, '_Drive']:
    """Run one forward that sets the gains; return the measurements of the layers that ran, in the order of the first
    calls.
    """
    drives: Dict[str, _Drive] = {}
    with normalising_by_batch(model):
        for name, lif in model.neurons().items():
            drive = _Drive(lif, partial(drives.setdefault, name))
            lif.register_forward_pre_hook(drive.measure)
            lif.register_forward_hook(drive.count)
        model(images)
    if not drives:
        raise ValueError(f'{type(model).__name__}: none of its neuron layers ran on the images; nothing to calibrate.')
    broken = [name for name, drive in drives.items() if not math.isfinite(drive.rms)]
    if broken:
        raise ValueError(f'{type(model).__name__}: the current of {broken[0]} is not finite on these images, so that '
                         f'no gain fits it; check the weights before it, or run in float32.')
    return drives


class _Drive:
    """Measure one layer's input and set its gain, call by call."""

    def __init__(self, lif: SpikingNeuron, ran: Callable[['_Drive'], Any]):
        self.lif = lif
        self.ran = ran  # called at every call of the layer
        self.gain = torch.ones(())
        self.squares: List[float] = []
        self.fired: float = 0
        self.elements = 0
        lif.set_gain(None, lif.scale)

    def measure(self, lif: SpikingNeuron, args: Tuple[torch.Tensor]) -> None:
        self.ran(self)
        x = args[0].detach()
        self.squares.append(x.to(torch.promote_types(x.dtype, torch.float32)).square().mean().item())
        self.gain = torch.tensor(self._gain(x), device=x.device)
        lif.set_gain(self.gain, lif.scale)

    def _gain(self, x: torch.Tensor) -> float:
        if self.rms == 0:
            return 1.
        threshold = self.lif.threshold()
        gain = threshold / 0.5 / self.rms
        if (x * gain >= threshold).float().mean() < _MIN_RATE and (x > 0).any():
            gain = max(gain, threshold / x[x > 0].median().item())  # skewed: half of the positive inputs fire
        return gain

    def count(self, lif: SpikingNeuron, args: Tuple[torch.Tensor], spikes: torch.Tensor) -> None:
        self.fired += lif.activity(spikes).sum(dtype=torch.float64).item()
        self.elements += spikes.numel()

    @property
    def rms(self) -> float:
        return (sum(self.squares) / len(self.squares)) ** 0.5

    def result(self, name: str) -> LayerDrive:
        return LayerDrive(name, self.rms, self.gain.item(), self.fired / max(self.elements, 1))


@contextmanager
def normalising_by_batch(model: nn.Module) -> Iterator[None]:
    """Run a model inside in evaluation mode, except norms with running statistics, which run in training mode.

    Afterwards the model and its statistics are restored.
    """
    with untouched(model):
        for module in model.modules():
            if isinstance(module, _NormBase):
                module.training = True
        yield


def _warn(model: nn.Module, result: List[LayerDrive], idle: List[str], unfed: List[str]) -> None:
    """Log layers that never or always fire or did not run, and a summary.

    Args:
        model: The model.
        result: The measurements.
        idle: Layers that did not run.
        unfed: Layers with zero current, since a residual variant initialises blocks as the identity.
    """
    kind = type(model).__name__
    if unfed:
        _logger.info(f'{kind}: {len(unfed)} neuron layers have no current yet, since their blocks start as the '
                     f'identity: {", ".join(unfed)}.')
    for names, what in (
            ([d.name for d in result if d.rate == 0 and d.name not in unfed], 'never fire, even after calibration'),
            ([d.name for d in result if d.rate == 1], 'always fire, even after calibration'),
            (idle, 'did not run in the forward and have no gain')):
        if names:
            _logger.warning(f'{kind}: {len(names)} neuron layers {what}: {", ".join(names)}.')
    rates = sorted(d.rate for d in result)
    gains = sorted(d.gain for d in result)
    _logger.info(f'{kind}: {len(result)} neuron layers calibrated, gains {gains[0]:.3g} to {gains[-1]:.3g}, firing '
                 f'rates {rates[0]:.3f} to {rates[-1]:.3f}, median {rates[len(rates) // 2]:.3f}.')
