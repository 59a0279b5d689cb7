"""Time and memory on CUDA: neurons against ReLU, training steps of spiking networks against their ANNs.

Times are medians of CUDA event timings with quartiles, the variants of a case in turn, round by round. Memory is the
peak of allocated tensors during a step above what model, optimizer and batch hold. float32 means PyTorch's defaults:
TF32 in convolutions, float32 in matrix products. bfloat16 is autocast. The ANN gets T times as many images.
"""
import time
from contextlib import nullcontext
from functools import partial
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Tuple

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from gpu_cases import Case, synchronize
from gpu_training import synchronizations
from harness import Timing
from neuron import LAYOUTS, spikingjelly_lif

from timm_sscl.neurons import LIF, lif_backend, packed_spikes

T, CLASSES = 4, 100


class Net(NamedTuple):
    """A network and the size of its batch."""
    name: str
    size: int
    batch: int
    formats: Tuple[str, ...] = tuple(LAYOUTS)


NETS = (Net('resnet18', 224, 32), Net('vgg16_cifar', 32, 128), Net('convnext_atto', 224, 32),
        Net('vit_tiny_patch16_224', 224, 64, ('contiguous',)), Net('mobilenetv3_small_100', 224, 64))
TOY = Net('test_resnet', 32, 2),
COMPILED = 'resnet18', 'vit_tiny_patch16_224', 'test_resnet'
PRECISIONS = 'float32', 'bfloat16'


def create_cases(device: torch.device, toy: bool) -> List[Case]:
    """Return all measurements, the most important first."""
    shape = (T * 2, 4, 8, 8) if toy else (T * 128, 64, 32, 32)
    nets, rounds = (TOY, 1) if toy else (NETS, 9)
    compiler = 'eager' if toy else 'inductor'
    cases = [Case(f'neuron, {dtype}, {layout}', partial(neurons, device, shape, dtype, layout, rounds, toy), 30)
             for dtype in PRECISIONS for layout in LAYOUTS]
    cases += [Case('synchronisations of train.py', partial(synchronizations, toy, []), 40)]
    cases += [Case(_name(net, layout, precision, False), partial(steps, device, net, layout, precision, '', rounds),
                   20)
              for precision in PRECISIONS for net in nets for layout in net.formats]
    cases += [Case('synchronisations of train.py --amp', partial(
        synchronizations, toy, ['--amp', '--amp-dtype', 'bfloat16' if toy else 'float16', '--clip-grad', '1']), 40)]
    cases += [Case(_name(net, 'contiguous', 'bfloat16', True),
                   partial(steps, device, net, 'contiguous', 'bfloat16', compiler, rounds), 90)
              for net in nets if net.name in COMPILED]
    return cases


def _name(net: Net, layout: str, precision: str, compiled: bool) -> str:
    return f'step {net.name}, {precision}, {layout}' + (', torch.compile' if compiled else '')


# ---- time

def _milliseconds(device: torch.device, run: Callable[[], Any]) -> float:
    """Return how long the device takes from the first to the last kernel of one call."""
    if device.type != 'cuda':
        began = time.perf_counter()
        run()
        return (time.perf_counter() - began) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def _interleave(device: torch.device, variants: Mapping[str, Callable[[], Any]], rounds: int) -> Dict[str, Timing]:
    times: Dict[str, List[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            times[name].append(_milliseconds(device, run))
    return {name: Timing.of(values) for name, values in times.items()}


def neurons(device: torch.device, shape: Tuple[int, ...], dtype: str, layout: str, rounds: int,
            toy: bool) -> Dict[str, Any]:
    """Forward and backward of one layer, relative to ReLU on the same tensor."""
    x = torch.randn(shape, device=device, dtype=getattr(torch, dtype))
    x = x.contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    grad = torch.randn_like(x)
    layers = {'ReLU': torch.relu, 'LIF': LIF(T), 'LIF, detached reset': LIF(T, detach_reset=True),
              'LIF, soft reset': LIF(T, v_reset=None), 'LIF, atan': LIF(T, surrogate='atan'),
              'LIF without a compiler': LIF(T), 'SpikingJelly LIFNode': spikingjelly_lif(False)}
    variants = {}
    for name, layer in layers.items():
        backend = 'eager' if toy or 'without' in name else 'auto'
        if layer is not None:
            variants[name] = partial(_forward_backward, layer, x, grad, backend)
            for _ in range(2):
                variants[name]()
    timings = _interleave(device, variants, 3 * rounds)
    return dict(kind='neuron', dtype=dtype, layout=layout, shape=list(shape), rows=[
        dict(layer=name, ratio=t.median / timings['ReLU'].median, ms=t.median, low=t.low, high=t.high)
        for name, t in timings.items()])


def _forward_backward(layer: Callable, x: torch.Tensor, grad: torch.Tensor, backend: str) -> None:
    with lif_backend(backend):
        torch.autograd.grad(layer(x), x, grad)


# ---- steps

def steps(device: torch.device, net: Net, layout: str, precision: str, compiled: str, rounds: int) -> Dict[str, Any]:
    """Training steps of a spiking network, plain and with packed spikes, relative to the ANN on T times the images."""
    kinds = ('ANN', 'spiking') if compiled else ('ANN', 'spiking', 'spiking, packed')
    variants, memory, first = {}, {}, {}
    for kind in kinds:
        began = time.time()
        step = _create_step(device, net, layout, precision, compiled, kind)
        step()
        synchronize(device)
        first[kind] = time.time() - began
        for _ in range(2):
            step()
        memory[kind] = _peak(device, step)
        variants[kind] = step
    timings = _interleave(device, variants, rounds)
    return dict(kind='step', net=net.name, layout=layout, precision=precision, compiled=compiled, batch=net.batch,
                size=net.size, rows=[dict(
                    step=kind, ratio=t.median / timings['ANN'].median, ms=t.median, low=t.low, high=t.high,
                    mib=memory[kind], memory=_ratio(memory[kind], memory['ANN']), first_s=first[kind])
                    for kind, t in timings.items()])


def _create_step(device: torch.device, net: Net, layout: str, precision: str, compiled: str,
                 kind: str) -> Callable[[], None]:
    torch.manual_seed(0)
    if kind == 'ANN':
        model: nn.Module = timm.create_model(net.name, num_classes=CLASSES)
    else:
        model = timm.create_model(f'spiking_{net.name}', num_classes=CLASSES, timesteps=T)
    rows = net.batch * (T if kind == 'ANN' else 1)
    model.train().to(device, memory_format=LAYOUTS[layout])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=.9)
    images = torch.randn(rows, 3, net.size, net.size, device=device).contiguous(memory_format=LAYOUTS[layout])
    labels = torch.randint(0, CLASSES, (rows,), device=device)
    forward = torch.compile(model, backend=compiled) if compiled else model

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16) if precision == 'bfloat16' else nullcontext():
            with packed_spikes() if 'packed' in kind else nullcontext():
                loss = F.cross_entropy(forward(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def _peak(device: torch.device, step: Callable[[], None]) -> Optional[float]:
    """Return the MiB of tensors that a step adds at its peak; None on a CPU."""
    if device.type != 'cuda':
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2 ** 20


def _ratio(a: Any, b: Any) -> Any:
    return None if a is None or not b else a / b
