"""calibrate: set an input gain for every neuron layer from one forward, so that no layer starts silent."""
import logging
import math
from contextlib import contextmanager
from functools import partial
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

import torch
import torch.nn as nn
from torch.nn.modules.batchnorm import _NormBase

from timm_sscl.neurons import SpikingNeuron
from .revive import revive_zeros
from ..model import SpikingModule
from ..from_ann.pool_first import pooled_current
from ..rules import ThresholdRule, rule_maker
from ..rules.base import Rule
from timm_sscl.probing import naming_channels
from timm_sscl.untouched import undone_on_error, untouched

__all__ = ['calibrate', 'normalising_by_batch', 'LayerDrive', 'RMS', 'calibration_rule']

_logger = logging.getLogger(__name__)

# if a smaller share of inputs exceeds the threshold, the input is skewed and its mean square is not used
_MIN_RATE = 0.01
RMS = 'rms'


class LayerDrive(NamedTuple):
    """Input current of one neuron layer."""
    name: str
    rms: float  # root mean square of the input current before the gain
    gain: float
    rate: float  # spikes per neuron and timestep with the gain


def calibrate(
        model: SpikingModule,
        images: torch.Tensor,
        rule: Rule = RMS,
        factor: float = 1.,
) -> SpikingModule:
    """Set the input gain of every neuron layer so that its input is as large as a batch norm's output.

        gain = (v_threshold / 0.5) / (factor * rms(x))    rule 'rms'; 0.5 corresponds to a root mean square of 1
        gain = v_threshold / (factor * max(x))            rule 'spike_norm'

    With 'rms', if hardly any input would reach the threshold (a few large negative values dominate the mean square),
    the gain lets the median of the positive inputs reach it. With 'spike_norm', the largest current over timesteps,
    images and neurons just reaches it (Sengupta et al. 2019); with a factor of 0.7 this is the start of hybrid training
    (Rathi et al. 2020), made for networks without batch norms and biases.

    One forward measures and sets the layers in the order in which they run, so that each is measured after the
    calibrated layers before it. Batch norms normalise by the batch, as in training, and keep their running statistics.
    Dropout and stochastic depth are off. A layer that runs several times gets one gain from all its inputs.

    A neuron behind a zero gets no gradient. A norm's scale (or the gain of a weight-standardised convolution) that is
    all zeros, as at the end of zero-initialised branches, is therefore set to 0.1. Weights that are all zeros, as in
    some classifiers, are set to small noise.

    Gains are not parameters. They are in the state_dict of the spiking model. A warning names layers that still never
    or always fire.

    Args:
        model: Spiking model.
        images: A batch of real images in the model's input format, (B, C, H, W) or (B, T, C, H, W).
        rule: 'rms', or a threshold rule that measures spiking layers: its name, class or a functools.partial.
        factor: Factor on the threshold, above 0. The smaller, the more neurons fire.

    Returns:
        The model itself. `model.spiking_report().drives` has one LayerDrive per layer that ran, in the order of the
        first calls.

    Raises:
        ValueError: The model is not spiking, its neurons have output scales (thresholds from an ANN), images or a
            layer's current has a value that is not finite, images have another number of channels than the model takes,
            no layer runs, or rule or factor is unknown or out of range.
    """
    make = calibration_rule(rule, factor)
    _check(model, images)
    variants = model.settings.variants().values()
    for variant in variants:
        if variant.scales_currents:
            _logger.warning(f'{type(model).__name__}: the gains make up for the scale that {variant} gives the '
                            f'currents, so that training starts as with plain batch norms.')
    stay = {name for variant in variants for name in variant.zeros_stay(model)}
    with undone_on_error(model, parameters=True):
        revive_zeros(model, stay)
        drives = _measure(model, images, make, factor)
        for name, lif in model.neurons().items():
            lif.set_gain(drives[name].gain if name in drives else None, lif.scale)
    idle = [name for name in model.neurons() if name not in drives]
    result = [drive.result(name) for name, drive in drives.items()]
    _warn(model, result, idle, [drive.name for drive in result if stay and drive.rms == 0])
    model._drives = result
    return model


def calibration_rule(rule: Rule, factor: float) -> Callable[[], Optional[ThresholdRule]]:
    """Return what makes one rule per layer, None for 'rms', after checking the arguments.

    Raises:
        ValueError: The rule is unknown or measures the ANN, or factor is out of range.
        TypeError: rule is neither a name nor a class of rules.
    """
    if not 0 < factor < math.inf:
        raise ValueError(f'factor={factor}: must be a finite number above 0.')
    if rule == RMS:
        return lambda: None
    make = rule_maker(rule, also=(RMS,))
    if not make().spiking:
        raise ValueError(f"rule={rule!r}: measures the ANN's activations (convert_ann); a calibration measures spiking "
                         f"layers, by '{RMS}', 'spike_norm' or another rule with `spiking`.")
    return make


def _check(model: nn.Module, images: torch.Tensor) -> None:
    """Raise ValueError if the model or the images cannot be calibrated."""
    if not isinstance(model, SpikingModule):
        raise ValueError(f'{type(model).__name__} does not spike; call convert_to_spiking(model) first.')
    if any(lif.scale is not None for lif in model.neurons().values()):
        raise ValueError(f"{type(model).__name__}: its neurons' thresholds come from an ANN (convert_ann); a "
                         f'calibration would undo them.')
    if not isinstance(images, torch.Tensor):
        raise ValueError(f'images: must be a tensor (N, C, H, W) or (N, T, C, H, W), got a {type(images).__name__}.')
    if not torch.isfinite(images).all():
        raise ValueError('images: holds values that are not finite.')


def _measure(
        model: SpikingModule,
        images: torch.Tensor,
        make: Callable[[], Optional[ThresholdRule]],
        factor: float,
) -> Dict[str, '_Drive']:
    """Run one forward that sets the gains; return the measurements of the layers that ran, in the order of the first
    calls.
    """
    drives: Dict[str, _Drive] = {}
    with normalising_by_batch(model):
        for name, lif in model.neurons().items():
            drive = _Drive(lif, partial(drives.setdefault, name), make(), factor)
            lif.register_forward_pre_hook(drive.measure)
            lif.register_forward_hook(drive.count)
        with naming_channels(images):
            model(images)
    if not drives:
        raise ValueError(f'{type(model).__name__}: none of its neuron layers ran on the images; nothing to calibrate.')
    broken = [name for name, drive in drives.items() if not math.isfinite(drive.rms)]
    if broken:
        raise ValueError(f'{type(model).__name__}: the current of {broken[0]} is not finite on these images, so that '
                         f'no gain fits it; check the weights before it, or run in float32.')
    return drives


class _Drive:
    """Measure one layer's input and set its gain, call by call.

    Args:
        lif: The layer.
        ran: Called at every call of the layer.
        rule: Rule of the threshold; None is the root mean square.
        factor: Factor on the threshold.
    """

    def __init__(
            self,
            lif: SpikingNeuron,
            ran: Callable[['_Drive'], Any],
            rule: Optional[ThresholdRule],
            factor: float,
    ):
        self.lif = lif
        self.rule = rule
        self.factor = factor
        self.ran = ran
        self.gain = torch.ones(())
        self.squares: List[float] = []
        self.fired: float = 0
        self.elements = 0
        lif.set_gain(None, lif.scale)

    def measure(self, lif: SpikingNeuron, args: Tuple[torch.Tensor]) -> None:
        self.ran(self)
        x = pooled_current(lif, args[0].detach())
        self.squares.append(x.to(torch.promote_types(x.dtype, torch.float32)).square().mean().item())
        dtype = None if self.rule is None else torch.promote_types(x.dtype, torch.float32)
        self.gain = torch.tensor(self._gain(x), device=x.device, dtype=dtype)
        lif.set_gain(self.gain, lif.scale)

    def _gain(self, x: torch.Tensor) -> float:
        if not 0 < self.rms < math.inf:
            return 1.
        threshold = self.lif.threshold()
        if self.rule is not None:
            self.rule.measure(x, None)
            measured = self.factor * self.rule.threshold().item()
            return threshold / measured if measured > 0 else 1.
        gain = threshold / 0.5 / self.rms / self.factor
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
