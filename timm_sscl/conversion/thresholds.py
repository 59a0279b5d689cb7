"""convert_ann: a trained ReLU network as integrate-and-fire neurons, whose rates approach its activations."""
import logging
from dataclasses import replace
from typing import Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn

from timm_sscl.features.channel_axis import ChannelAxes
from timm_sscl.neurons import SpikingNeuron
from timm_sscl.untouched import all_or_nothing, untouched

from .ann_obstacles import ann_obstacles
from .call_sites import find_calls
from .convert import convert_to_spiking
from .model import SpikingModule

__all__ = ['INTEGRATE_AND_FIRE', 'convert_ann']

_logger = logging.getLogger(__name__)

INTEGRATE_AND_FIRE = dict(tau=1., v_threshold=1., v_reset=None, v_init=.5)
_CHUNK = 64  # images per forward


@all_or_nothing()
def convert_ann(
        model: nn.Module,
        images: torch.Tensor,
        timesteps: int = 32,
        per_channel: bool = True,
        percentile: float = 100.,
) -> nn.Module:
    """Turn a trained ReLU network into a spiking one that computes the same, the closer the more time steps, in place.

    A ReLU becomes an integrate-and-fire neuron (tau 1, soft reset, initial potential half the threshold) whose
    threshold is the largest activation, or a percentile, that the ANN shows on the images: gain 1 / threshold on its
    current, scale threshold on its spikes, so that the mean over T of its output is the activation, rounded to
    threshold / T and clipped to the threshold. Gains and scales are in the state_dict; `fold_gains` moves them into the
    weights around where that is exact. A ReLU that runs several times in a forward becomes a neuron per call. Max
    pooling takes the maximum of spikes at every step, which is an upper bound.

    Args:
        model: ANN in timm's or any form, or a spiking model that has the ANN's weights.
        images: Real images (N, C, H, W), normalised as in the ANN's training.
        timesteps: Time steps T.
        per_channel: Whether each channel has a threshold, or a layer. The channels are on axis 1 behind a convolution
            or batch norm, whether of maps or sequences, and on the last behind a linear map.
        percentile: Percentile of the activations, above 0 to 100, that the threshold is; 100 is the maximum.

    Returns:
        The model itself, spiking.

    Raises:
        ValueError: The network has parts that this cannot stand for (activations other than ReLU, layer norms,
            attention, gates), percentile is out of range, or images or activations on them are none or not finite.
            The model stays what it was.
    """
    if not 0 < percentile <= 100:
        raise ValueError(f'percentile={percentile}: must be above 0 and at most 100 (the maximum).')
    if len(images) == 0:
        raise ValueError('images: holds no image to take the thresholds from.')
    if not torch.isfinite(images).all():
        raise ValueError('images: holds values that are not finite.')
    if not isinstance(model, SpikingModule):
        size = images.shape[2 if images.ndim == 5 else 1:]  # event frames (N, T, C, H, W)
        convert_to_spiking(model, timesteps=timesteps, input_size=size, **INTEGRATE_AND_FIRE)
    obstacles = ann_obstacles(model)
    if obstacles:
        raise ValueError(f'{type(model).__name__} is no network of ReLU and batch norms, so that thresholds cannot '
                         f'stand for its activations: {"; ".join(obstacles)}. Use its weights as an '
                         f'initialisation (calibrate).')
    calls = model.settings.calls or find_calls(model, images[:1])
    model._set_settings(replace(
        model.settings, timesteps=timesteps, calls=calls, neuron='lif', neuron_kwargs=(), **INTEGRATE_AND_FIRE))
    thresholds = _thresholds(model, images, per_channel, percentile / 100)
    for lif, threshold in thresholds.items():
        lif.set_gain(1 / threshold, threshold)
    model._drives = ()
    _logger.info(f'{type(model).__name__}: {len(thresholds)} layers of ReLU are integrate-and-fire neurons, thresholds '
                 f'{"per channel" if per_channel else "per layer"} from {len(images)} images, T={timesteps}.')
    return model


def _thresholds(
        model: SpikingModule,
        images: torch.Tensor,
        per_channel: bool,
        q: float,
) -> Dict[SpikingNeuron, torch.Tensor]:
    """Threshold of every neuron layer, from the model run as the ANN that it was, at one time step."""
    seen: Dict[SpikingNeuron, List[torch.Tensor]] = {}
    axes = ChannelAxes()

    def as_ann(lif: SpikingNeuron, args: Tuple[torch.Tensor], spikes: torch.Tensor) -> torch.Tensor:
        out = lif.replaced.forward(args[0].clone())  # not its hooks, which are the neuron's; it may work in place
        seen.setdefault(lif, []).append(_quantile(out, axes.axis(args[0]) if per_channel else None, q))
        return out

    with untouched(model):
        for lif in model.neurons().values():
            lif.register_forward_hook(as_ann)
        model._set_settings(replace(model.settings, timesteps=1))
        for chunk in images.split(_CHUNK):
            with axes:
                model(chunk)
    names = {lif: name for name, lif in model.neurons().items()}
    for lif, values in seen.items():
        if len({value.shape for value in values}) > 1:
            raise ValueError(
                f'{type(model).__name__}: {names[lif]} runs on {" and ".join(_widths(values))} channels, and not as '
                f'often in each forward of the module that holds it, so that no threshold per channel fits; give each '
                f'call a ReLU of its own, or use per_channel=False.')
        if not all(value.isfinite().all() for value in values):
            raise ValueError(f'{type(model).__name__}: the activations of {names[lif]} are not finite on these images, '
                             f'so that no threshold fits them; check the weights before it, or run in float32.')
    return {lif: _threshold(torch.stack(values), q) for lif, values in seen.items()}


def _widths(values: Sequence[torch.Tensor]) -> List[str]:
    return sorted({str(value.numel()) for value in values}, key=int)


def _quantile(out: torch.Tensor, axis: Optional[int], q: float) -> torch.Tensor:
    """Quantile of activations: 0-d, or per channel along an axis in a shape that broadcasts against a sample."""
    by_channel = axis is not None and axis > 0
    rows = out.movedim(axis, 0).flatten(1) if by_channel else out.reshape(1, -1)
    k = max(1, round(q * rows.shape[1]))
    values = rows.kthvalue(k, dim=1).values if k < rows.shape[1] else rows.amax(1)
    return values.view(-1, *(1,) * (out.ndim - 1 - axis)) if by_channel else values[0]


def _threshold(quantiles: torch.Tensor, q: float) -> torch.Tensor:
    """One threshold from the chunks' quantiles: their maximum for q = 1, else their mean; a silent channel gets 1."""
    threshold = quantiles.amax(0) if q == 1 else quantiles.mean(0)
    return torch.where(threshold > 0, threshold, torch.ones_like(threshold))
