"""convert_ann: turn a trained ReLU network into integrate-and-fire neurons whose rates approach its activations."""
import logging
import math
from dataclasses import replace
from functools import partial
from typing import Any, Callable, Dict, Set, Tuple

import torch
import torch.nn as nn

from timm_sscl.features.channel_axis import ChannelAxes
from timm_sscl.neurons import SpikingNeuron
from timm_sscl.untouched import all_or_nothing, untouched

from .ann_obstacles import ann_obstacles
from ..finding.call_sites import find_calls
from ..convert import convert_to_spiking
from ..model import SpikingModule
from .pool_first import pooled_current
from .pool_pairs import find_pool_pairs
from .qcfs import QCFS, check_learned
from ..rules import ThresholdRule, rule_maker
from ..rules.base import Rule
from ..rules.percentile import Percentile

__all__ = ['INTEGRATE_AND_FIRE', 'PERCENTILE', 'conversion_rule', 'convert_ann']

_logger = logging.getLogger(__name__)

INTEGRATE_AND_FIRE: Dict[str, Any] = dict(tau=1., v_threshold=1., v_reset=None, v_init=.5)
PERCENTILE = 'percentile'  # the rule by default
_CHUNK = 64  # images per forward of the ANN


@all_or_nothing()
def convert_ann(
        model: nn.Module,
        images: torch.Tensor,
        timesteps: int = 32,
        per_channel: bool = True,
        percentile: float = 100.,
        rule: Rule = PERCENTILE,
        factor: float = 1.,
        pool_first: bool = False,
) -> nn.Module:
    """Convert a trained ReLU network to a spiking network with approximately the same output, in place.

    A ReLU becomes an integrate-and-fire neuron (tau 1, soft reset, initial potential half the threshold). Its threshold
    comes from the images, by a rule. The input gain is 1 / threshold and the output scale is the threshold. The mean
    output over T is then the activation, rounded to multiples of threshold / T and clipped to the threshold. More
    timesteps reduce the error. Gains and scales are in the state_dict; `fold_gains` folds them into the surrounding
    weights where that is exact. A ReLU that runs several times in a forward becomes one neuron per call. Max pooling
    takes the maximum of the spikes at every timestep, which overestimates the maximum of the rates; see `pool_first`.

    Rules (`list_threshold_rules()`):

    - 'percentile': percentile of the ANN's activations; the maximum by default.
    - 'ltb': local threshold balancing. Every batch of 64 images adds twice the mean excess of the activations.
    - 'spike_norm': the largest activation of the currents over T, behind layers that spike. All images run at once.

    A QCFS activation (`convert_to_qcfs`) has learned its threshold. It is used as it is, with any rule.

    Args:
        model: ANN of timm or any other, or a spiking model with the ANN's weights.
        images: Real images (N, C, H, W), normalised as in the ANN's training. For 'spike_norm' also frames (N, T, C, H,
            W), such as those of `poisson_input`.
        timesteps: Number of timesteps T.
        per_channel: Whether to use one threshold per channel instead of per layer. The channel axis is 1 after a
            convolution or batch norm, and the last after a linear layer.
        percentile: Percentile of the activations used as threshold, above 0 to 100; 100 is the maximum. For the rule
            'percentile'.
        rule: Name of a threshold rule, a subclass of ThresholdRule, or a functools.partial of one.
        factor: Factor on the thresholds that are measured, above 0. The thresholds of QCFS stay.
        pool_first: Whether a neuron whose spikes only an nn.MaxPool2d takes fires after it: it integrates the maximum
            of the current, as in LTB. Features that are read at this neuron are then those after the pooling.

    Returns:
        The model itself, spiking.

    Raises:
        ValueError: The network has unsupported parts (activations other than ReLU, layer norms, attention, gates);
            percentile, rule or factor is unknown or out of range; images or activations are empty, of a wrong shape or
            not finite; or a learned threshold is not above 0. The model is left unchanged.
    """
    make = conversion_rule(rule, percentile, factor)
    spiking = _check_images(images, timesteps, make, rule)
    check_learned(model)
    if not isinstance(model, SpikingModule):
        size = images.shape[2 if images.ndim == 5 else 1:]  # per sample; event frames are (N, T, C, H, W)
        convert_to_spiking(model, timesteps=timesteps, input_size=size, **INTEGRATE_AND_FIRE)
    obstacles = ann_obstacles(model)
    if obstacles:
        raise ValueError(f'{type(model).__name__} is not a network of ReLU and batch norms, so thresholds cannot '
                         f'stand for its activations: {"; ".join(obstacles)}. Use its weights as an '
                         f'initialisation (calibrate).')
    calls = model.settings.calls or find_calls(model, images[:1])
    model._set_settings(replace(
        model.settings, timesteps=timesteps, calls=calls, neuron='lif', neuron_kwargs=(), **INTEGRATE_AND_FIRE))
    if pool_first:
        pairs = find_pool_pairs(model, images[:1])
        model._set_settings(replace(model.settings, pool_first=pairs))
        _logger.info(f'{type(model).__name__}: {len(pairs or ())} neurons fire after their max pooling.')
    measured = _Measured(model, make, per_channel, factor)
    measured.behind_spikes(images) if spiking else measured.as_ann(images)
    thresholds = measured.thresholds()
    for lif, threshold in thresholds.items():
        lif.set_gain(1 / threshold, threshold)
    model._drives = ()
    learned = len(measured.learned)
    _logger.info(f'{type(model).__name__}: {len(thresholds)} layers of ReLU are integrate-and-fire neurons, thresholds '
                 f'{"per channel" if per_channel else "per layer"} from {len(images)} images'
                 f'{f", {learned} learned by QCFS" if learned else ""}, T={timesteps}.')
    return model


def conversion_rule(rule: Rule, percentile: float, factor: float) -> Callable[[], ThresholdRule]:
    """Return what makes one rule per layer, after checking the arguments.

    Raises:
        ValueError: The rule is unknown, or percentile or factor is out of range or not read by the rule.
        TypeError: rule is neither a name nor a class of rules.
    """
    if not 0 < factor < math.inf:
        raise ValueError(f'factor={factor}: must be a finite number above 0.')
    make = rule_maker(rule)
    if make is Percentile:
        make = partial(Percentile, percentile)
    elif percentile != 100.:
        raise ValueError(f"percentile={percentile}: is of rule='percentile', and rule={rule!r} does not read it.")
    make()  # checks the rule's own options
    return make


def _check_images(images: torch.Tensor, timesteps: int, make: Callable[[], ThresholdRule], rule: Rule) -> bool:
    """Return whether the rule measures spiking layers, after checking the images."""
    spiking = make().spiking
    if not isinstance(images, torch.Tensor):
        raise ValueError(f'images: must be a tensor (N, C, H, W) or (N, T, C, H, W), got a {type(images).__name__}.')
    if len(images) == 0:
        raise ValueError('images: holds no image to take the thresholds from.')
    if not torch.isfinite(images).all():
        raise ValueError('images: holds values that are not finite.')
    frames = images.shape[1] if images.ndim == 5 else None
    if spiking and frames not in (None, timesteps):
        raise ValueError(f'images: holds {frames} frames per sample, the network will run timesteps={timesteps}; give '
                         f'as many frames.')
    if not spiking and frames not in (None, 1):
        raise ValueError(f'images: holds {frames} frames per sample, and rule={rule!r} measures the ANN on images (N, '
                         f'C, H, W); rules that measure spiking layers take frames.')
    return spiking


class _Measured:
    """Rules of all neuron layers, and the runs that they measure.

    Args:
        model: Spiking model.
        make: Makes one rule per layer.
        per_channel: Whether thresholds are per channel.
        factor: Factor on measured thresholds.
    """

    def __init__(self, model: nn.Module, make: Callable[[], ThresholdRule], per_channel: bool, factor: float):
        self.model = model
        self.make = make
        self.per_channel = per_channel
        self.factor = factor
        self.names = {lif: name for name, lif in model.neurons().items()}
        self.rules: Dict[SpikingNeuron, ThresholdRule] = {}
        self.shapes: Dict[SpikingNeuron, Set[int]] = {}
        self.learned = {lif: self._learned(lif) for lif in self.names if isinstance(lif.replaced, QCFS)}

    def _learned(self, lif: SpikingNeuron) -> torch.Tensor:
        return lif.replaced.threshold.detach().clone().to(lif.spiking_gain.device)

    def as_ann(self, images: torch.Tensor) -> None:
        """Measure the model run as the original ANN, at one timestep."""
        axes = ChannelAxes()

        def run(lif: SpikingNeuron, args: Tuple[torch.Tensor], spikes: torch.Tensor) -> torch.Tensor:
            out = _activation(lif, args[0])
            return out if lif in self.learned else self._measure(lif, out, axes.axis(args[0])).transmit(out)

        with untouched(self.model):
            for lif in self.names:
                lif.register_forward_hook(run)
            self.model._set_settings(replace(self.model.settings, timesteps=1))
            for chunk in images.split(_CHUNK):
                with axes:
                    self.model(chunk)

    def behind_spikes(self, images: torch.Tensor) -> None:
        """Measure each layer of the spiking model behind layers that have their thresholds."""
        axes = self._axes(images[:1, 0] if images.ndim == 5 else images[:1])

        def run(lif: SpikingNeuron, args: Tuple[torch.Tensor]) -> None:
            if lif not in self.learned:
                self._measure(lif, _activation(lif, args[0]), axes[lif])
            threshold = self.threshold(lif)
            lif.set_gain(1 / threshold, threshold)

        with untouched(self.model):
            for lif in self.names:
                lif.register_forward_pre_hook(run)
            self.model(images)

    def _axes(self, image: torch.Tensor) -> Dict[SpikingNeuron, int]:
        """Return the channel axis of every layer that runs on an image."""
        axes, found = ChannelAxes(), {}

        def run(lif: SpikingNeuron, args: Tuple[torch.Tensor], spikes: torch.Tensor) -> torch.Tensor:
            found[lif] = axes.axis(args[0])
            return _activation(lif, args[0])

        with untouched(self.model):
            for lif in self.names:
                lif.register_forward_hook(run)
            self.model._set_settings(replace(self.model.settings, timesteps=1))
            with axes:
                self.model(image)
        return found

    def _measure(self, lif: SpikingNeuron, x: torch.Tensor, axis: int) -> ThresholdRule:
        """Give a layer's rule the values of one call."""
        if lif not in self.rules:
            self.rules[lif] = self.make()
        widths = self.shapes.setdefault(lif, set())
        widths.add(x.shape[axis] if self.per_channel and axis > 0 else 1)
        if len(widths) > 1:
            raise ValueError(
                f'{type(self.model).__name__}: {self.names[lif]} runs on {" and ".join(map(str, sorted(widths)))} '
                f'channels, and not as often in each forward of the module that holds it, so that no threshold per '
                f'channel fits; give each call a ReLU of its own, or use per_channel=False.')
        if not x.isfinite().all():
            raise ValueError(f'{type(self.model).__name__}: the activations of {self.names[lif]} are not finite on '
                             f'these images, so that no threshold fits them; check the weights before it, or run in '
                             f'float32.')
        self.rules[lif].measure(x, axis if self.per_channel else None)
        return self.rules[lif]

    def threshold(self, lif: SpikingNeuron) -> torch.Tensor:
        """Return the threshold of a layer so far."""
        return self.learned[lif] if lif in self.learned else _threshold(self.rules[lif], self.factor)

    def thresholds(self) -> Dict[SpikingNeuron, torch.Tensor]:
        """Return the thresholds of all layers that ran or learned theirs."""
        return {lif: self.threshold(lif) for lif in self.names if lif in self.learned or lif in self.rules}


def _activation(lif: SpikingNeuron, x: torch.Tensor) -> torch.Tensor:
    """Return the activation that a neuron replaced, applied to a copy of the current x."""
    return lif.replaced.forward(pooled_current(lif, x.clone()))  # not by calling the module: its hooks are the neuron's


def _threshold(rule: ThresholdRule, factor: float) -> torch.Tensor:
    """Return a rule's threshold times a factor. A silent channel gets 1."""
    threshold = rule.threshold() * factor
    return torch.where(threshold > 0, threshold, torch.ones_like(threshold))
