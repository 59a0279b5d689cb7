"""to_onnx: write a spiking model to an ONNX file, with all timesteps in the graph, and run it in onnxruntime."""
import logging
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Dict, List, Optional, Tuple, Union

import torch
import torch.nn as nn
from torch.utils._pytree import tree_flatten_with_path

from .extra import from_extra
from .inference_copy import check_images, inference_copy

__all__ = ['OnnxReport', 'to_onnx']

_logger = logging.getLogger(__name__)

_BATCH = 'batch'  # name of the dynamic axis
_EXAMPLES = 3  # samples of the traced batch; torch.export takes sizes 0 and 1 as fixed
_ROUNDING = 1e-3  # relative difference above which a spike has probably flipped


@dataclass
class OnnxReport:
    """What `to_onnx` wrote, and how onnxruntime's outputs compare with the model's. Printing it computes nothing.

    Attributes:
        path: The file.
        timesteps: Number of timesteps in the graph.
        opset: Version of ONNX's operators.
        inputs: Name -> shape of the input; its first axis is 'batch'.
        outputs: Name -> shape of every output.
        checked: Number of samples that onnxruntime ran.
        difference: Largest difference between an output and the model's, relative to the model's largest output.
        agreement: Share of samples with the same largest class; None if the output is not (B, classes).
    """
    path: str
    timesteps: int
    opset: int
    inputs: Dict[str, Tuple[Any, ...]] = field(default_factory=dict)
    outputs: Dict[str, Tuple[Any, ...]] = field(default_factory=dict)
    checked: int = 0
    difference: float = 0.
    agreement: Optional[float] = None

    def __str__(self) -> str:
        ports = ', '.join(f'{name} {list(shape)}' for name, shape in self.inputs.items())
        made = ', '.join(f'{name} {list(shape)}' for name, shape in self.outputs.items())
        same = '' if self.agreement is None else f', the same class for {self.agreement:.1%}'
        return (f'{self.path}: {ports} -> {made}, timesteps={self.timesteps} in the graph, opset {self.opset}; '
                f'onnxruntime on {self.checked} samples: relative difference {self.difference:.2g}{same}')


def to_onnx(
        model: nn.Module,
        path: Union[str, os.PathLike],
        images: torch.Tensor,
        per_step: bool = False,
        opset: Optional[int] = None,
) -> OnnxReport:
    """Write a spiking model to an ONNX file for inference, and compare onnxruntime's outputs with the model's.

    The file holds the whole call of the model: the input is repeated over time, or event frames are folded, all
    timesteps run, and the output is their mean. The number of timesteps is part of the graph; another number needs
    another file. The batch size is free. Neurons become plain comparisons and products; a spike's surrogate gradient
    is not exported.

    The model is copied: it stays as it is, in its mode and on its device. The copy is in evaluation mode, without
    forward hooks (a warning names them) and without gradient checkpointing. A deployed int8 model computes in float32
    with the rounded weights.

    Float32 rounding differs between torch and onnxruntime, and may flip single spikes. A warning says so if the outputs
    on the images differ by more than rounding.

    Args:
        model: Spiking model in float32.
        path: File to write; an existing file is replaced. Weights beyond 2 GB go to a second file beside it.
        images: A batch in the model's input format: images (B, C, H, W) or event frames (B, T, C, H, W). Their size is
            part of the graph. They are converted to float32. They are also what onnxruntime is compared on, in one
            batch and the first by itself.
        per_step: Whether the outputs are those of every timestep, (T, B, ...), instead of their mean.
        opset: Version of ONNX's operators; torch's default.

    Returns:
        An OnnxReport.

    Raises:
        ImportError: The extra `export` is not installed.
        ValueError: The model does not spike, is compiled or not in float32; the images do not fit; path is in no
            folder; torch.export cannot trace the model with a free batch size; ONNX has no operator for a function in
            it; or onnxruntime does not run the file. The message names what it is.
    """
    for package in ('onnx', 'onnxscript', 'onnxruntime'):
        from_extra(package)
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f'path={str(path)!r}: there is no folder {str(path.parent)!r}.')
    copied = inference_copy(model, 'ONNX file')
    images = check_images(copied, images)
    _check_float32(copied)
    with torch.no_grad():
        expected = copied(images, per_step=per_step)
        names, _ = _named(expected)
        program = _convert(copied, _trace(copied, images, per_step), names, opset)
        with TemporaryDirectory(dir=path.parent) as folder:  # a failure leaves what was at path
            report = _save(program, Path(folder, path.name), copied)
            _compare(report, copied, images, per_step)
            for file in Path(folder).iterdir():  # large weights lie in a second file
                os.replace(file, path.parent / file.name)
    report.path = str(path)
    if not report.difference <= _ROUNDING:
        _logger.warning(f'{report.path}: outputs of onnxruntime differ from the model by up to {report.difference:.2g} '
                        f'of the largest: rounding flips spikes whose potential lies at the threshold. Judge the file '
                        f'by its accuracy.')
    _logger.info(str(report))
    return report


def _check_float32(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ValueError(f'{type(model).__name__}: {name} is {tensor.dtype}; ONNX files are written in float32: '
                             f'to_onnx(copy.deepcopy(model).float(), ...).')


def _named(out: Any) -> Tuple[List[str], List[torch.Tensor]]:
    """Return the names and tensors of a model's output: 'output', or with the keys of dictionaries and tuples."""
    paths, _ = tree_flatten_with_path(out)
    names, tensors = [], []
    for keys, leaf in paths:
        parts = ['output', *(str(getattr(key, 'key', getattr(key, 'idx', getattr(key, 'name', key)))) for key in keys)]
        if not isinstance(leaf, torch.Tensor):
            raise ValueError(f'{"_".join(parts)}: the model returns a {type(leaf).__name__}; an ONNX file has tensors '
                             f'only.')
        names.append('_'.join(parts))
        tensors.append(leaf)
    return names, tensors


def _trace(model: Any, images: torch.Tensor, per_step: bool) -> torch.export.ExportedProgram:
    """Trace a model by torch.export with a free batch size.

    Raises:
        ValueError: It cannot be traced. The message has the reason of torch.export.
    """
    example = torch.cat([images] * -(-_EXAMPLES // len(images)))[:_EXAMPLES].contiguous()
    free = {0: torch.export.Dim(_BATCH)}
    try:
        return torch.export.export(
            _Call(model, per_step), (example,), dynamic_shapes=dict(images=free), strict=False)
    except Exception as error:  # torch.export raises many kinds
        raise ValueError(f'{type(model).__name__}: torch.export does not trace it with a free batch size: '
                         f'{_reason(error)}') from error


class _Call(nn.Module):
    """A call of a model with one argument."""

    def __init__(self, model: nn.Module, per_step: bool):
        super().__init__()
        self.model = model
        self.per_step = per_step

    def forward(self, images: torch.Tensor) -> Any:
        return self.model(images, per_step=self.per_step)


def _convert(model: Any, program: torch.export.ExportedProgram, names: List[str], opset: Optional[int]) -> Any:
    """Convert an exported program to ONNX.

    Raises:
        ValueError: ONNX has no operator for a function.
    """
    try:
        converted: Any = torch.onnx.export(
            program, (), dynamo=True, verbose=False, input_names=['images'], output_names=names, opset_version=opset,
            dynamic_shapes=dict(images={0: _BATCH}))
    except Exception as error:
        raise ValueError(f'{type(model).__name__}: torch {torch.__version__} does not write it to ONNX: '
                         f'{_reason(error)}') from error
    converted.model.metadata_props['timesteps'] = str(model.timesteps)
    return converted


def _reason(error: BaseException) -> str:
    """Return the first lines of the first error in a chain."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f'{type(error).__name__}: {" ".join(str(error).split())[:300]}'


def _save(program: Any, path: Path, model: Any) -> OnnxReport:
    program.save(str(path))
    graph = program.model.graph
    inputs, outputs = ({value.name: tuple(n if isinstance(n, int) else str(n) for n in value.shape) for value in values}
                       for values in (graph.inputs, graph.outputs))
    return OnnxReport(str(path), model.timesteps, program.model.opset_imports[''], inputs, outputs)


def _compare(report: OnnxReport, model: Any, images: torch.Tensor, per_step: bool) -> None:
    """Run the file in onnxruntime on the images, and on the first alone, and write the comparison to the report.

    Raises:
        ValueError: onnxruntime does not run it, or gives another shape.
    """
    onnxruntime: Any = from_extra('onnxruntime')
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    classes = []
    try:
        session = onnxruntime.InferenceSession(report.path, options, providers=['CPUExecutionProvider'])
        batches = [(batch, session.run(list(report.outputs), {'images': batch.numpy()}))
                   for batch in (images, images[:1]) if len(batch)]
    except Exception as error:  # onnxruntime raises classes of its own
        raise ValueError(f'{type(model).__name__}: onnxruntime does not run the file: {_reason(error)}') from error
    for batch, arrays in batches:
        _, expected = _named(model(batch, per_step=per_step))
        for name, value, array in zip(report.outputs, expected, arrays):
            got = torch.from_numpy(array)
            if got.shape != value.shape:
                raise ValueError(f'{type(model).__name__}: onnxruntime gives {name} of shape {tuple(got.shape)} for '
                                 f'{len(batch)} samples, the model {tuple(value.shape)}.')
            report.difference = max(report.difference, _difference(got, value))
            if len(expected) == 1 and value.ndim == 2:
                classes.append((got.argmax(1) == value.argmax(1)).float())
    report.checked = len(images)
    report.agreement = classes[0].mean().item() if classes else None


def _difference(got: torch.Tensor, value: torch.Tensor) -> float:
    """Return the largest difference relative to the largest value; infinity where only one is finite."""
    got, value = got.double(), value.double()
    if not torch.equal(got.isfinite(), value.isfinite()):
        return math.inf
    if not value.numel():
        return 0.
    off = (got - value).nan_to_num().abs().max().item()
    return off / max(value.nan_to_num().abs().max().item(), torch.finfo(torch.float32).tiny)
