"""Checks on CUDA: neurons, norms, losses, precision, train.py and CUDA graphs against the same on the CPU.

The reference is the CPU in float64, run eagerly. Tolerances are relative to the largest expected value:

- float64 on the device: 1e-9. Sums in another order and other last digits of exp and tanh are 1e-15 each, which a
  small network multiplies by some thousands. A potential lies that near to the threshold in one of 1e9 cases.
- float32 through Triton, neurons alone: inputs are float32 numbers, so only the neuron rounds. The LIF gets currents
  that are multiples of 1/2, and powers of two as settings: no result needs more than 24 bits, so it must be equal.
  Other neurons may move a potential across the threshold: 0.1 % of the elements may differ by more than 1e-4, and
  gradients by parameters, which are sums over all elements, by 1 %.
"""
import copy
import logging
from contextlib import contextmanager, nullcontext
from functools import lru_cache, partial
from typing import Any, Callable, Dict, Iterator, List, Mapping, Tuple

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from gpu_cases import Case, agree, synchronize
from gpu_training import amp_run, resumed_run
from torch.overrides import TorchFunctionMode

from timm_sscl import (
    LIF, SSCLLoss, SSCLTask, calibrate, list_losses, list_neurons, list_surrogates, list_variants, share_stem)
from timm_sscl.neurons import create_neuron, lif_backend, packed_spikes

T, CHANNELS, CLASSES = 4, 6, 5
CPU = torch.device('cpu')
FLOAT64, FLOAT32 = 1e-9, 1e-4
LIF_SETTINGS: List[Dict[str, Any]] = [
    dict(), dict(v_reset=None), dict(detach_reset=True), dict(tau=.5, v_threshold=1., v_reset=-.25), dict(v_init=.25)]
COMPILED_SURROGATES = 'atan', 'sigmoid', 'triangle'


def create_cases(device: torch.device, toy: bool) -> List[Case]:
    """Return all checks, the most important first.

    Args:
        device: Device to check.
        toy: Whether sizes are as small as possible, and neurons run eagerly where Triton would compile them.
    """
    compiled = 'eager' if toy else 'compiled'
    layouts = 'contiguous', 'channels_last'
    cases = [
        *(Case(f'two bits behind a batch norm, {dtype}, {layout}', partial(norm_and_neuron, device, dtype, layout,
                                                                             compiled), 20)
          for dtype in ('float64', 'float32') for layout in layouts),
        Case('two bits behind a batch norm, memory', partial(norm_memory, device, 16 if toy else 128), 20),
        *(Case(f'LIF through Triton, {_text(settings)}, {layout}', partial(lif_exact, device, settings, layout,
                                                                             compiled), 15)
          for settings in LIF_SETTINGS for layout in layouts),
        Case('model, eager', partial(model, device, 'eager')),
        Case('model, Triton', partial(model, device, compiled), 40),
        Case('model, Triton, packed spikes', partial(model, device, compiled, packed=True), 20),
        *(Case(f'mixed precision, {name}', partial(mixed_precision, device, name, 4 if toy else 8), 20)
          for name in ('float16', 'bfloat16')),
        Case('train.py killed and resumed', partial(resumed_run, toy), 150),
        *(Case(f'train.py --amp {name}', partial(amp_run, name, toy), 60)
          for name in (['bfloat16'] if toy else ['float16', 'bfloat16'])),  # --amp float16 is refused on a CPU
        Case('SSCL step in a CUDA graph', partial(graph, device), 30),
        *(Case(f'loss {name}', partial(loss, device, name)) for name in list_losses()),
        Case('SSCL taps by hooks, ResNet', partial(taps, device, 'test_resnet')),
        Case('SSCL taps by hooks, ViT', partial(taps, device, 'test_vit')),
        *(Case(f'neuron {name}, eager', partial(neuron, device, name, 'eager')) for name in list_neurons()),
        *(Case(variant, partial(model, device, 'eager', variant=variant)) for variant in list_variants()),
        *(Case(f'surrogate {name}, eager', partial(neuron, device, 'lif', 'eager', surrogate=name))
          for name in list_surrogates()),
        *(Case(f'neuron {name}, Triton', partial(neuron, device, name, compiled), 20) for name in list_neurons()),
        *(Case(f'surrogate {name}, Triton', partial(neuron, device, 'lif', compiled, surrogate=name), 20)
          for name in COMPILED_SURROGATES)]
    return cases


def _text(settings: Mapping[str, Any]) -> str:
    return ', '.join(f'{k}={v}' for k, v in settings.items()) or 'default'


@contextmanager
def _backend(name: str) -> Iterator[None]:
    """Run neurons so. Raise AssertionError if a kernel could not be compiled, where neurons only log a warning."""
    said: List[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(lif_backend.__wrapped__.__module__)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    try:
        with lif_backend(name):
            yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
    if said:
        raise AssertionError(said[0])


def _randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _halves(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return multiples of 1/2 between -2 and 2."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).double() / 2


def _format(layout: str) -> torch.memory_format:
    return torch.channels_last if layout == 'channels_last' else torch.contiguous_format


# ---- neurons

def _run_neuron(module: nn.Module, x: torch.Tensor, weight: torch.Tensor, backend: str) -> List[torch.Tensor]:
    """Return output, and gradients by the current and the parameters."""
    with _backend(backend):
        x = x.detach().clone().requires_grad_()
        out = module(x)
        return [out.detach(), *torch.autograd.grad((out * weight).sum(), [x, *module.parameters()])]


def lif_exact(device: torch.device, settings: Mapping[str, Any], layout: str, backend: str) -> Dict[str, Any]:
    """A LIF in float32 on numbers that need no rounding: spikes, gradients and memory format are equal."""
    steps = 3  # the gradient of one more would need more than 24 bits
    module = LIF(steps, **settings)
    for gain in (None, torch.tensor(.5), torch.tensor([.5, 1., 2.] * 2).view(CHANNELS, 1, 1)):
        module.set_gain(gain)
        x, weight = (_halves(steps * 4, CHANNELS, 9, 8, seed=seed).contiguous(memory_format=_format(layout))
                     for seed in (0, 1))
        expected = _run_neuron(copy.deepcopy(module).double(), x, weight, 'eager')
        got = _run_neuron(copy.deepcopy(module).to(device), x.float().to(device), weight.float().to(device), backend)
        for what, a, b in zip(('spikes', 'gradient'), got, expected):
            if not torch.equal(a.cpu().double(), b):
                raise AssertionError(f'{what} with gain {gain}: {(a.cpu() != b).sum().item()} of {b.numel()} differ.')
            if a.stride() != b.stride():
                raise AssertionError(f'{what}: strides {a.stride()}, not {b.stride()}.')
    return {}


def neuron(device: torch.device, name: str, backend: str, **settings: Any) -> Dict[str, Any]:
    """Any neuron: output, and gradients by the current and the parameters."""
    torch.manual_seed(0)
    module = create_neuron(name, T, channels=(CHANNELS, 1, 1), **settings).double()
    with torch.no_grad():
        for p in module.parameters():  # initial values are special: gates are alike, slopes are 1
            p.add_(.1 * torch.randn(p.shape, dtype=p.dtype))
            p.copy_(p.float())
    x = (2 * module.threshold() * _randn(T * 8, CHANNELS, 8, 8)).float().double()
    weight = _randn(T * 8, CHANNELS, 8, 8, seed=1).float().double()
    expected = _run_neuron(copy.deepcopy(module), x, weight, 'eager')
    dtype = torch.float64 if backend == 'eager' else torch.float32
    got = _run_neuron(copy.deepcopy(module).to(device, dtype), x.to(device, dtype), weight.to(device, dtype), backend)
    if dtype == torch.float64:
        return dict(apart=agree('output and gradients', got, expected, FLOAT64))
    moved = 0.
    for what, a, b in zip(('output', 'gradient by the current'), got, expected):
        wrong = ((a.cpu().double() - b).abs() > FLOAT32 * b.abs().max()).double().mean().item()
        moved = max(moved, wrong)
        if not wrong <= 1e-3 or not a.isfinite().all():
            raise AssertionError(f'{what}: {wrong:.2%} of the elements differ.')
    apart = agree('gradients by the parameters', got[2:], expected[2:], 1e-2) if expected[2:] else None
    return dict(moved=moved, apart=apart)


# ---- batch norm, neuron, convolution

def _layers(dtype: torch.dtype, **settings: Any) -> nn.ModuleList:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(CHANNELS)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return nn.ModuleList([norm, LIF(3, **settings), nn.Conv2d(CHANNELS, 5, 3)]).to(dtype)


def _gradients(layers: nn.ModuleList, x: torch.Tensor, cut: bool) -> Tuple[str, List[torch.Tensor]]:
    """Return the name of the norm's node, and gradients by x and all parameters. cut: as if there were no norm."""
    norm, act, conv = layers
    x = x.detach().requires_grad_()
    current = norm(x)
    out = conv(act(current * 1 if cut else current))
    return type(current.grad_fn).__name__, list(torch.autograd.grad(out.square().sum(), [x, *layers.parameters()]))


def norm_and_neuron(device: torch.device, dtype: str, layout: str, backend: str) -> Dict[str, Any]:
    """Gradients where the neuron makes its current again from what the norm keeps, against keeping the current."""
    nodes, apart = set(), 0.
    x = _randn(12, CHANNELS, 9, 8).to(device, getattr(torch, dtype)).contiguous(memory_format=_format(layout))
    # the same spikes either way, so only the currents round otherwise
    tolerance = dict(float64=1e-11, float32=1e-4)[dtype]
    for settings in (dict(), dict(v_reset=None), dict(detach_reset=True), dict(v_reset=-.2, tau=.6)):
        layers = _layers(x.dtype, **settings).to(device)
        with lif_backend('eager'):
            _, expected = _gradients(layers, x, cut=True)
        for context in (nullcontext, packed_spikes):
            with _backend(backend if not settings else 'eager'), context():
                node, got = _gradients(layers, x, cut=False)
            nodes.add(node)
            apart = max(apart, agree(f'{_text(settings)}, {context.__name__}', got, expected, tolerance))
    return dict(nodes=sorted(nodes), apart=apart)


def norm_memory(device: torch.device, size: int) -> Dict[str, Any]:
    """Behind a batch norm a LIF keeps two bits per element and step instead of the current."""
    kept, nodes = {}, {}
    for cut in (True, False):
        norm, act, _ = _layers(torch.float32).to(device)
        x = torch.randn(3 * 16, CHANNELS, size, size, device=device, requires_grad=True)
        current = norm(x)
        nodes[cut] = type(current.grad_fn).__name__
        kept[cut] = _kept(act(current * 1 if cut else current), norm.bias) / x.numel()
    facts: Dict[str, Any] = dict(node=nodes[False], bytes_per_element=kept[False], without_norm=kept[True])
    if kept[True] != 4 or abs(kept[False] - 2 / 3) > 1e-6:  # T = 3: two bytes for three steps
        raise AssertionError(f'bytes kept per element: {facts}; expected are 2/3 and 4.')
    if device.type == 'cuda':
        facts['allocated'], facts['without_norm_allocated'] = (_allocated(device, size, cut) for cut in (False, True))
        saved = facts['without_norm_allocated'] - facts['allocated']
        if saved < 3.2:  # 4 - 2/3, less what the allocator rounds up
            raise AssertionError(f'CUDA memory saved per element is {saved:.2f} bytes: {facts}')
    return facts


def _kept(out: torch.Tensor, bias: torch.Tensor) -> int:
    """Return the bytes that a neuron saved for its backward, other than the norm's bias."""
    node: Any = out.grad_fn
    while 'LIF' not in type(node).__name__:
        node = node.next_functions[0][0]
    return sum(t.untyped_storage().nbytes() for t in node.saved_tensors if t is not None and t is not bias)


def _allocated(device: torch.device, size: int, cut: bool) -> float:
    """Return CUDA memory per element of the input that norm and neuron hold between forward and backward."""
    norm, act, _ = _layers(torch.float32).to(device)
    x = torch.randn(3 * 16, CHANNELS, size, size, device=device, requires_grad=True)
    synchronize(device)
    before = torch.cuda.memory_allocated()
    out = act(norm(x) * 1 if cut else norm(x))
    synchronize(device)
    held = torch.cuda.memory_allocated() - before
    out.sum().backward()
    return held / x.numel()


# ---- models and losses

def _pair(student: str = 'test_resnet', **options: Any) -> Tuple[nn.Module, nn.Module]:
    return copy.deepcopy(_create_pair(student, tuple(options.items())))


@lru_cache(maxsize=None)
def _create_pair(student: str, options: Tuple[Tuple[str, Any], ...]) -> Tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    net = timm.create_model(f'spiking_{student}', num_classes=CLASSES, timesteps=2, **dict(options))
    ann = timm.create_model(student, num_classes=CLASSES)
    calibrate(net, _images().float())
    return net.double().train(), ann.double()


def _images(n: int = 8) -> torch.Tensor:
    return _randn(n, 3, 32, 32)


def _labels(n: int = 8) -> torch.Tensor:
    return torch.arange(n) % CLASSES


def model(device: torch.device, backend: str, packed: bool = False, variant: str = '') -> Dict[str, Any]:
    """A small spiking ResNet in float64: logits and gradients."""
    options: Dict[str, Any] = {}
    if variant:
        kind, name = variant.split('/')
        options = dict(neuron='mlf') if name == 'ds' else {}
        options.update({kind: name} if kind != 'stem' else {})
    net, _ = _pair(**options)
    if variant == 'stem/shared':
        share_stem(net)
    results = []
    for place, how in ((CPU, 'eager'), (device, backend)):
        own = copy.deepcopy(net).to(place)
        with _backend(how), packed_spikes() if packed else nullcontext():
            out = own(_images().to(place))
            F.cross_entropy(out, _labels().to(place)).backward()
        results.append([out, *(p.grad for p in own.parameters() if p.grad is not None)])
    return dict(apart=agree('logits and gradients', results[1], results[0], FLOAT64))


def _task(device: torch.device, losses: Any, dtype: torch.dtype = torch.float64) -> SSCLTask:
    student, teacher = _pair()
    torch.manual_seed(1)
    task = SSCLTask(student, teacher, losses, input_size=(3, 32, 32), num_samples=32, verbose=False, device=device)
    task.trainable_module.to(dtype)
    task.teacher.to(dtype) if task.teacher is not None else None
    return task.train()


class _DrawnOnHost(TorchFunctionMode):
    """Draw random numbers with the CPU's generator, which is the same for every device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.rand, torch.randn, torch.randint, torch.randperm) and kwargs.get('device') is not None:
            return func(*args, **{**kwargs, 'device': 'cpu'}).to(kwargs['device'])
        return func(*args, **kwargs)


def loss(device: torch.device, name: str) -> Dict[str, Any]:
    """A registered loss in a task: its value, and gradients by everything that trains."""
    results = []
    for place in (CPU, device):
        with lif_backend('eager'):
            task = _task(place, {name: 1.})
            task.set_progress(.5)
            torch.manual_seed(2)
            index = dict(index=torch.arange(8).to(place)) if task.index_losses else {}
            with _DrawnOnHost():
                result = task(_images().to(place), _labels().to(place), **index)
            result['loss'].backward()
        gradients = [p.grad for p in task.trainable_module.parameters() if p.grad is not None]
        results.append([result[f'{name}_loss'], *gradients])
    agree('value', results[1][:1], results[0][:1], FLOAT64)
    return dict(apart=agree('gradients', results[1][1:], results[0][1:], FLOAT64))


def taps(device: torch.device, arch: str) -> Dict[str, Any]:
    """SSCLLoss in one's own loop reads the same features: loss and statistics of every layer."""
    results = []
    for place in (CPU, device):
        student, teacher = _pair(arch, **({'img_size': 32} if arch == 'test_vit' else {}))
        torch.manual_seed(1)
        student, teacher = student.to(place), teacher.to(place)
        sscl = SSCLLoss(student, teacher, input_size=(3, 32, 32), dim=8).double().to(place)
        with lif_backend('eager'):
            student(_images().to(place))
            value = sscl(_images().to(place))
        stats = torch.tensor([[v for _, v in sorted(s.items())] for s in sscl.stats.values()])
        results.append((value, stats, list(sscl.stats)))
    if results[0][2] != results[1][2]:
        raise AssertionError(f'layers {results[1][2]}, not {results[0][2]}')
    agree('loss', [results[1][0]], [results[0][0]], FLOAT64)
    return dict(layers=results[0][2], apart=agree('statistics', [results[1][1]], [results[0][1]], 1e-6))  # float32


# ---- precision and graphs

def mixed_precision(device: torch.device, name: str, images: int, steps: int = 10) -> Dict[str, Any]:
    """Steps of SSCL under autocast: finite losses; float16 starts at a scale that overflows, which adapts."""
    task = _task(device, {'sscl': .1, 'kd': 1.}, torch.float32)
    optimizer = torch.optim.AdamW(task.trainable_module.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler(device.type, init_scale=2. ** 48, backoff_factor=2. ** -8, growth_interval=3,
                                  enabled=name == 'float16')
    x, y = _images(images).float().to(device), _labels(images).to(device)
    before = [p.detach().clone() for p in task.trainable_module.parameters()]
    losses, scales = [], []
    for _ in range(steps):
        with torch.autocast(device.type, getattr(torch, name)):
            value = task(x, y)['loss']
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(value.item())
        scales.append(scaler.get_scale())
    after = list(task.trainable_module.parameters())
    facts = dict(losses=losses, scales=scales)
    if not torch.tensor(losses).isfinite().all() or not all(p.isfinite().all() for p in after):
        raise AssertionError(f'not finite: {facts}')
    if all(torch.equal(a, b) for a, b in zip(before, after)):
        raise AssertionError(f'no weight has changed: {facts}')
    if name == 'float16' and not min(scales) < 2. ** 48:
        raise AssertionError(f'the scale did not adapt: {facts}')
    return facts


def graph(device: torch.device, steps: int = 6) -> Dict[str, Any]:
    """Losses of whole SSCL training steps, replayed from a captured CUDA graph, and as usual."""
    usual, replayed = (_losses_of_steps(device, steps, captured) for captured in (False, True))
    # the same kernels on the same numbers; convolutions may be chosen otherwise, and atomics add in any order
    apart = agree('losses', [torch.tensor(replayed)], [torch.tensor(usual)], 1e-6)
    if len(set(usual)) < steps:
        raise AssertionError(f'the losses do not change: {usual}')
    return dict(apart=apart, losses=usual)


def _losses_of_steps(device: torch.device, steps: int, captured: bool) -> List[float]:
    task = _task(device, {'sscl': .1, 'kd': 1.})
    optimizer = torch.optim.SGD(task.trainable_module.parameters(), lr=.05, momentum=.9)
    x, y = _images().to(device), _labels().to(device)

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=False)
        value = task(x, y)['loss']
        value.backward()
        optimizer.step()
        return value.detach()

    state = copy.deepcopy(task.trainable_module.state_dict())
    run: Callable[[], torch.Tensor] = _capture(step) if captured and device.type == 'cuda' else _warm(step)
    with torch.no_grad():
        for key, value in task.trainable_module.state_dict().items():
            value.copy_(state[key])
        for slots in optimizer.state.values():
            slots['momentum_buffer'].zero_()
    return [run().item() for _ in range(steps)]


def _warm(step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    for _ in range(3):
        step()
    return step


def _capture(step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Return a function that replays a captured step and returns its result."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _warm(step)
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        out = step()

    def replay() -> torch.Tensor:
        captured.replay()
        return out
    return replay
