"""share_stem: run everything before the first neuron once per image instead of once per timestep."""
import logging
from dataclasses import dataclass
from typing import Any, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from torch.utils._pytree import tree_leaves

from timm_sscl.conversion.over_time.dropout import OverTime
from timm_sscl.conversion.scales.gains import normalising_by_batch
from timm_sscl.conversion.model import SpikingModule
from timm_sscl.knobs import knob
from timm_sscl.neurons import SpikingNeuron
from timm_sscl.probing import probe_sizes, undisturbed
from timm_sscl.untouched import untouched

from .base import Variant, VariantSettings
from .registry import register_variant

__all__ = ['share_stem', 'SharedStem']

_logger = logging.getLogger(__name__)

_BATCH = 3  # with two timesteps, tensors of 3 and 6 rows meet, and raise, if the stem's output bypasses the neuron


@register_variant('stem', 'shared')
class SharedStem(Variant):
    """Let the first neuron take the current of one timestep and repeat it. `share_stem` checks whether that is valid.
    """

    @dataclass(frozen=True)
    class Settings(VariantSettings):
        neuron: str = knob('', 'name of the first neuron')

    def apply(self, model: nn.Module, settings: Any) -> None:
        for name, neuron in model.neurons().items():
            neuron.encodes = name == self.settings.neuron

    def remove(self, model: nn.Module) -> None:
        for neuron in model.neurons().values():
            neuron.encodes = False

    def summary(self, model: nn.Module) -> str:
        return f'what comes before {self.settings.neuron} runs once per image'


def share_stem(model: SpikingModule, input_size: Optional[Sequence[int]] = None) -> SpikingModule:
    """Run everything before the first neuron once per image, in place. The neuron repeats its current T times.

    For static images the stem computes the same at every timestep. This is valid if only the first neuron's output is
    used afterwards. A probe runs the model both ways and compares everything that forward and forward_intermediates
    return. If they differ (a residual stream from before the first neuron, as in ConvNeXt), it is refused.

    Outputs and gradients do not change. The running variance of a batch norm in the stem is scaled by n / (n - 1) with
    n counted over B instead of T * B images. Event frames, which differ in time, are refused from then on. The setting
    is part of the checkpoint.

    Args:
        model: Spiking model.
        input_size: Shape of one sample, (C, H, W), for the probe; guessed from the model by default.

    Returns:
        The model itself; `model.settings.stem` is the name of the first neuron.

    Raises:
        ValueError: The model is not spiking, or the probe fails. The message says where.
    """
    if not isinstance(model, SpikingModule):
        raise ValueError(f'{type(model).__name__} does not spike; call convert_to_spiking(model) first.')
    if model.settings.stem is not None:
        return model
    with untouched(model):
        model.set_timesteps(2)
        name, why = _probe(model, input_size)
    if why is not None:
        raise ValueError(f'{type(model).__name__}: the part before the first neuron ({name}) cannot run once per '
                         f'image: {why}.')
    model.set_stem(name)
    _logger.info(f'{type(model).__name__}: what comes before {name} runs once per image.')
    return model


def _probe(model: SpikingModule, input_size: Optional[Sequence[int]]) -> Tuple[Optional[str], Optional[str]]:
    """Return the name of the first neuron, and why the stem cannot be shared (None if it can)."""
    x, name, before, expected = _run_in_full(model, input_size)
    if x is None:
        return None, 'the model does not run on a guessed input; input_size=(C, H, W) tells it'
    modules = dict(model.named_modules())
    for other in before:
        if getattr(modules[other], 'per_step', False):
            return name, f'{other} ({type(modules[other]).__name__}) computes something else at every time step'
        return name, f'{other} draws its noise there, per time step and image'
    model.set_stem(name)
    try:
        outputs = _outputs(model, x)
    except (RuntimeError, ValueError, AssertionError, IndexError) as error:
        return name, f'what follows takes from before it as well ({" ".join(str(error).split())[:120]})'
    finally:
        model.set_stem(None)
    same = len(outputs) == len(expected) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(outputs, expected))
    return name, None if same else 'the outputs would differ'


def _run_in_full(model: SpikingModule, input_size: Optional[Sequence[int]]):
    """Run the model without a shared stem.

    Returns:
        Probe input, name of the first neuron, modules before it that draw noise or differ between timesteps, and
        outputs.
    """
    like = next(p for p in model.parameters() if p.is_floating_point())
    generator = torch.Generator().manual_seed(0)  # leaves the global generator alone
    for size in [tuple(input_size)] if input_size is not None else probe_sizes(model):
        x = torch.randn(_BATCH, *size, generator=generator).to(like)
        ran: List[str] = []
        with undisturbed(model):
            modules = {n: m for n, m in model.named_modules()
                       if isinstance(m, (SpikingNeuron, OverTime)) or getattr(m, 'per_step', False)}
            for n, module in modules.items():
                module.register_forward_pre_hook(lambda m, args, n=n, ran=ran: ran.append(n))
            try:
                outputs = _outputs(model, x, quiet=False)
            except (RuntimeError, ValueError, AssertionError, IndexError):
                continue
        first = next(n for n in ran if isinstance(modules[n], SpikingNeuron))
        before = [n for n in ran[:ran.index(first)] if getattr(modules[n], 'p', getattr(modules[n], 'drop_prob', 1))]
        return x, first, before, outputs
    return None, None, None, None


def _outputs(model: SpikingModule, x: torch.Tensor, quiet: bool = True) -> List[torch.Tensor]:
    """Return all outputs for x with norms normalising by the batch, since an untrained network is silent in evaluation
    mode.
    """
    def run() -> List[Any]:
        with normalising_by_batch(model):
            results = [model(x, per_step=True)]
            if hasattr(model, 'forward_intermediates'):
                results.append(model.forward_intermediates(x, per_step=True))
        return [leaf for leaf in tree_leaves(results) if isinstance(leaf, torch.Tensor)]

    if not quiet:
        return run()
    with undisturbed(model):
        return run()
