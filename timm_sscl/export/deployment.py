"""deploy: a spiking model for inference on a CPU, with int8 weights wherever the input is spikes."""
import copy
import logging
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.nn as nn

from timm_sscl.class_swap import mix_in
from timm_sscl.conversion import fold_gains, fold_norms, share_stem
from timm_sscl.conversion.model import SpikingModule
from timm_sscl.probing import ProbeError, examples
from timm_sscl.untouched import remove_hooks, untouched

from . import int8
from .layers import Int8Conv2d, Int8Linear, LevelAvgPool, LevelMaxPool, LevelNeuron
from .levels import StepTrace
from .plan import Plan, make_plan

__all__ = ['DeployReport', 'WEIGHT_BITS', 'deploy']

_logger = logging.getLogger(__name__)


WEIGHT_BITS = 8, 16, 24  # that a deployed weight may have


@dataclass
class DeployReport:
    """What `deploy` made of a model. Printing it computes nothing.

    Attributes:
        weight_bits: Bits of a weight that were asked for.
        int8: Convolutions and linear maps with int8 weights -> bits of the weights and levels of the input, in words.
        faster_in_float32: Those of them which the CPU of this machine computes in float32, since it is faster.
        float32: Convolutions and linear maps that stay in float32 -> the reason.
        levels: Neurons that write whole levels -> 'uint8', or 'int8' for ternary spikes.
        values: Neurons that write float32 -> the reason.
        stem: Name of the neuron before which everything runs once per image, or why there is none.
        folds: What was folded: Folded records of fold_gains and fold_norms.
        missing: Why int8 is not available on this machine; None if it is.
    """
    weight_bits: int = 8
    int8: Dict[str, str] = field(default_factory=dict)
    faster_in_float32: Tuple[str, ...] = ()
    float32: Dict[str, str] = field(default_factory=dict)
    levels: Dict[str, str] = field(default_factory=dict)
    values: Dict[str, str] = field(default_factory=dict)
    stem: str = ''
    folds: List[Any] = field(default_factory=list)
    missing: Optional[str] = None

    def __str__(self) -> str:
        maps, neurons = len(self.int8) + len(self.float32), len(self.levels) + len(self.values)
        weights, computing = len(self.int8), len(self.int8) - len(self.faster_in_float32)
        what = f'{weights} of {maps} convolutions and linear maps ' + (
            f'in int8 ({self.weight_bits} bits)' if computing == weights else
            f'with int8 weights ({self.weight_bits} bits), {computing} of them compute in int8 on this CPU and '
            f'{weights - computing} in float32')
        lines = [f'Deployed: {what}, {len(self.levels)} of {neurons} neuron layers write 8 bits; stem: {self.stem}']
        lines += [f'  int8 is missing: {self.missing}'] if self.missing else []
        if self.faster_in_float32:
            lines.append(f'  run in float32 on this CPU, where that is faster: {", ".join(self.faster_in_float32)}')
        lines += [f'  float32: {name}: {why}' for name, why in {**self.float32, **self.values}.items()]
        lines += [f'  not folded: {folded.name}: {folded.factor} {folded.into}'
                  for folded in self.folds if not folded.done]
        return '\n'.join(lines)


@torch.no_grad()
def deploy(model: SpikingModule, images: Optional[torch.Tensor] = None, weight_bits: int = 24) -> SpikingModule:
    """Return a copy of a spiking model for inference on a CPU. The model itself stays as it is.

    - Norms, gains, scales and amplitudes are folded into the weights, where the result is the same.
    - What comes before the first neuron runs once per image, where that is valid (`share_stem`).
    - Convolutions and linear maps get int8 weights, rounded symmetrically per output channel, if their input is known
      to be whole levels of spikes: 0 and 1, -1 to 1, or a range of at most 128. It is known from one forward, by what
      the functions in it do. Other layers stay in float32. So do sums of currents.
    - Neurons write uint8 (int8 for ternary spikes) if only such layers, pooling, and sums with currents take them.

    The copy is a model of the same class in evaluation mode, for channels_last images. Its state dict holds the int8
    weights and their scales. It can be copied, saved by `torch.save(copy, file)` and exported by torch.export; an
    exported or compiled program computes in float32 with the rounded weights. It cannot be trained. Forward hooks are
    not copied, except those that compute a layer's weight; a warning names them.

    The only difference to the model is rounding, which flips single spikes, and a flipped spike flips others behind it.
    24 bits round as float32 does: trained networks gave the predictions that they give in float32. A layer of 24 or 16
    bits runs as three or two int8 maps, which are summed, or in float32 on a CPU where that is faster. 8 bits are the
    fastest, and for a network whose weights were trained on 8 bits: others change predictions.

    Args:
        model: Spiking model, trained.
        images: A batch in the model's input format for the forward that decides; one image suffices. By default an
            image of noise of the model's input size.
        weight_bits: 24, 16 or 8. A layer whose weights need fewer bits to be exact gets fewer.

    Returns:
        The copy. Its `deploy_report` is a DeployReport, which says what stayed in float32, and why.

    Raises:
        ValueError: The model is not spiking, or does not run on the images, or `weight_bits` is another number.
    """
    if weight_bits not in WEIGHT_BITS:
        raise ValueError(f'weight_bits={weight_bits!r}: 8, 16 or 24.')
    if not isinstance(model, SpikingModule):
        raise ValueError(f'{type(model).__name__} does not spike; convert_to_spiking(model) makes it.')
    copied: Any = copy.deepcopy(model).float().cpu().eval().requires_grad_(False)
    images = _example(copied) if images is None else images.float().cpu()
    report = DeployReport(weight_bits=weight_bits, missing=int8.int8_missing())
    hooked = remove_hooks(copied)
    if hooked:
        _logger.warning(f'{type(model).__name__}: the deployed model has no forward hooks; those of '
                        f'{", ".join(name or "the model" for name in hooked)} were left out.')
    for fold in (fold_gains, fold_norms):
        fold(copied, images)
        report.folds += copied._folds
    report.stem = _share_stem(copied, images)
    _to_channels_last(copied)
    if report.missing is None:
        _apply(copied, _trace(copied, images), report)
    copied._folds, copied.deploy_report = report.folds, report
    if report.missing is not None:
        _logger.warning(f'{type(model).__name__}: no int8 inference, {report.missing}. The deployed model computes in '
                        f'float32.')
    _logger.info(str(report).splitlines()[0])
    return copied


def _example(model: SpikingModule) -> torch.Tensor:
    """Return one image of noise of a size that the model takes."""
    for example in examples(model, 1):
        try:
            with untouched(model):
                example(model)
        except Exception:  # an unknown model may raise anything on an unsuitable input
            continue
        return example.tensors()[0]
    raise ProbeError(f'{type(model).__name__} runs on no guessed image; give images.')


def _share_stem(model: SpikingModule, images: torch.Tensor) -> str:
    """Let the part before the first neuron run once per image. Return the neuron's name, or why not."""
    if images.ndim == 5:
        return 'at every timestep, since event frames differ'
    try:
        share_stem(model, images.shape[1:])
    except ValueError as error:
        return f'at every timestep: {error}'
    return f'once per image, up to {model.settings.stem}'


def _to_channels_last(model: nn.Module) -> None:
    """Lay out tensors of four axes as channels_last; a weight per timestep or of a 3-d convolution has five."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)


def _trace(model: SpikingModule, images: torch.Tensor) -> Plan:
    with untouched(model), StepTrace(model) as trace:
        model(images)
    return make_plan(model, trace)


def _apply(model: SpikingModule, plan: Plan, report: DeployReport) -> None:
    """Change the model by the plan, and fill the report."""
    modules: Dict[str, Any] = dict(model.named_modules())
    for name, planned in plan.maps.items():
        weight, bias = modules[name].weight, modules[name].bias
        planes = report.weight_bits // 8
        layer = (Int8Linear(weight, bias, planned.levels, planes) if planned.geometry is None
                 else Int8Conv2d(weight, bias, planned.levels, planned.geometry, planes))
        _replace(model, modules[name], layer.eval())
        report.int8[name] = f'{8 * len(layer.planes)} bits, input {planned.levels}'
        if not layer.runs_planes:
            report.faster_in_float32 += name,
    for name, (levels, window) in plan.max_pools.items():
        mix_in(modules[name], LevelMaxPool)
        modules[name].levels, modules[name].window = levels, window
    for name, window in plan.sum_pools.items():
        mix_in(modules[name], LevelAvgPool)
        modules[name].window = window
    for name, dtype in plan.neurons.items():
        mix_in(modules[name], LevelNeuron)
        modules[name].writes = dtype
        report.levels[name] = str(dtype).removeprefix('torch.')
    report.float32, report.values = plan.float_maps, plan.float_neurons


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in another's place, under all its names."""
    for module in list(model.modules()):
        for child, other in module._modules.items():
            if other is old:
                module._modules[child] = new
