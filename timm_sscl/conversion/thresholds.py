"""convert_ann: turn a trained ReLU network into integrate-and-fire neurons whose rates approach its activations."""
import logging
from dataclasses import replace
from typing import Any, Dict, List, Optional, Sequence, Tuple

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

INTEGRATE_AND_FIRE: Dict[str, Any] = dict(tau=1., v_threshold=1., v_reset=None, v_init=.5)
_CHUNK = 64  # images per forward


@all_or_nothing()
def convert_ann(
        model: nn.Module,
        images: torch.Tensor,
        timesteps: int = 32,
        per_channel: bool = True,
        percentile: float = 100.,
) -> nn.Module:
    """Convert a trained ReLU network to a spiking network with approximately the same output, in place.

    A ReLU becomes an integrate-and-fire neuron (tau 1, soft reset, initial potential half the threshold). Its threshold
    is the largest activation, or a percentile, that the ANN shows on the images. The input gain is 1 / threshold and
    the output scale is the threshold. The mean output over T is then the activation, rounded to multiples of threshold
    / T and clipped to the threshold. More timesteps reduce the error. Gains and scales are in the state_dict;
    `fold_gains` folds them into the surrounding weights where that is exact. A ReLU that runs several times in a
    forward becomes one neuron per call. Max pooling takes the maximum of the spikes at every timestep, which
    overestimates the maximum of the rates.

    Args:
        model: ANN of timm or any other, or a spiking model with the ANN's weights.
        images: Real images (N, C, H, W), normalised as in the ANN's training.
        timesteps: Number of timesteps T.
        per_channel: Whether to use one threshold per channel instead of per layer. The channel axis is 1 after a
            convolution or batch norm, and the last after a linear layer.
        percentile: Percentile of the activations used as threshold, above 0 to 100; 100 is the maximum.

    Returns:
        The model itself, spiking.

    Raises:
        ValueError: The network has unsupported parts (activations other than ReLU, layer norms, attention, gates),
            percentile is out of range, or images or activations are empty or not finite. The model is left unchanged.
    """
    if not 0 < percentile <= 100:
        raise ValueError(f'percentile={percentile}: must be above 0 and at most 100 (the maximum).')
    if len(images) == 0:
        raise ValueError('images: holds no image to take the thresholds from.')
    if not torch.isfinite(images).all():
        raise ValueError('images: holds values that are not finite.')
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
    thresholds = _thresholds(model, images, per_channel, percentile / 100)
    for lif, threshold in thresholds.items():
        lif.set_gain(1 / threshold, threshold)
    model._drives = ()
    _logger.info(f'{type(model).__name__}: {len(thresholds)} layers of ReLU are integrate-and-fire neurons, thresholds '
                 f'{"per channel" if per_channel else "per layer"} from {len(images)} images, T={timesteps}.')
    return model


def _thresholds(
        model: nn.Module,
        images: torch.Tensor,
        per_channel: bool,
        q: float,
) -> Dict[SpikingNeuron, torch.Tensor]:
    """Return the threshold of every neuron layer, from the model run as the original ANN at one timestep."""
    seen: Dict[SpikingNeuron, List[torch.Tensor]] = {}
    axes = ChannelAxes()

    def as_ann(lif: SpikingNeuron, args: Tuple[torch.Tensor], spikes: torch.Tensor) -> torch.Tensor:
        # not by calling the module: its hooks are the neuron's; clone, since it may be inplace
        out = lif.replaced.forward(args[0].clone())
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
    """Return the distinct numbers of channels as text, sorted."""
    return sorted({str(value.numel()) for value in values}, key=int)


def _quantile(out: torch.Tensor, axis: Optional[int], q: float) -> torch.Tensor:
    """Return a quantile of activations: 0-d, or one per channel along an axis in a shape that broadcasts against a
    sample.
    """
    along = axis if axis is not None and axis > 0 else None
    rows = out.reshape(1, -1) if along is None else out.movedim(along, 0).flatten(1)
    k = max(1, round(q * rows.shape[1]))
    values = rows.kthvalue(k, dim=1).values if k < rows.shape[1] else rows.amax(1)
    return values[0] if along is None else values.view(-1, *(1,) * (out.ndim - 1 - along))


def _threshold(quantiles: torch.Tensor, q: float) -> torch.Tensor:
    """Combine the quantiles of all chunks: the maximum for q = 1, else the mean. A silent channel gets 1."""
    threshold = quantiles.amax(0) if q == 1 else quantiles.mean(0)
    return torch.where(threshold > 0, threshold, torch.ones_like(threshold))
