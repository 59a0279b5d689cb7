#!/usr/bin/env python3
"""Measure the cost of a training step: time and peak memory of spiking networks and of their ANNs on as many images.

    python benchmarks/train_step.py                  # all
    python benchmarks/train_step.py resnet18 --layout channels_last --part time  # a piece of it, a few minutes

Every network, memory format and part has its own file in benchmarks/results.

T = 4; the ANN gets T times as many images, and ratios are to the ANN in the same memory format. A step is forward,
cross-entropy, backward and SGD. The options are those of train.py. Memory is that of tensors, measured in another
process in which glibc gives every freed block back.
"""
import gc
import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from harness import create_parser, has, interleave, measure_peak, output_of_fresh_process, save, show

from timm_sscl import share_stem
from timm_sscl.neurons import packed_spikes

T, CLASSES, SIZE = 4, 100, 112
PARTS = 'time', 'memory'


class Net(NamedTuple):
    """A network, the size of its images, and how many a spiking step takes."""
    name: str
    size: int
    batch: int


NETS = {net.name: net for net in (
    Net('resnet18', SIZE, 8), Net('vgg16_cifar', 32, 16), Net('convnext_atto', SIZE, 8),
    Net('vit_tiny_patch16_224', 224, 2), Net('mobilenetv3_small_100', SIZE, 16))}


class Variant(NamedTuple):
    """One way of training a network."""
    spiking: bool = True
    channels_last: bool = False
    options: Dict[str, Any] = {}
    stem: bool = False
    packed: bool = False
    checkpointing: bool = False
    compiled: bool = False
    bfloat16: bool = False
    peer: bool = False
    arch: str = 'resnet18'


ANN = 'ANN'
OPTIONS: Dict[str, Variant] = {
    ANN: Variant(spiking=False),
    'ANN, checkpointing': Variant(spiking=False, checkpointing=True),
    'spiking': Variant(),
    'packed spikes': Variant(packed=True),
    'detached reset': Variant(options=dict(detach_reset=True)),
    'detached reset, packed spikes': Variant(options=dict(detach_reset=True), packed=True),
    'checkpointing': Variant(checkpointing=True),
    'stem once': Variant(stem=True),
    'stem once, packed spikes': Variant(stem=True, packed=True),
}
# of the ResNet-18 in contiguous format alone
EXTRA: Dict[str, Variant] = {
    'ANN, bfloat16': Variant(spiking=False, bfloat16=True),
    'spiking, bfloat16': Variant(bfloat16=True),
    'ANN, torch.compile': Variant(spiking=False, compiled=True),
    'spiking, torch.compile': Variant(compiled=True),
    "SpikingJelly's spiking_resnet18": Variant(peer=True),
}


def layouts(arch: str) -> Tuple[str, ...]:
    """Return the memory formats in which a network is measured. A ViT has a single convolution."""
    return ('contiguous',) if arch.startswith('vit') else ('contiguous', 'channels_last')


def variants(arch: str, layout: str) -> Dict[str, Variant]:
    """Return the variants of a network in a memory format by their option, the rows of its table."""
    found = {**OPTIONS, **(EXTRA if (arch, layout) == ('resnet18', 'contiguous') else {})}
    found = {name: variant._replace(arch=arch, channels_last=layout == 'channels_last')
             for name, variant in found.items()}
    stem = has_stem(arch)
    return {name: variant for name, variant in found.items()
            if (stem or not variant.stem) and (has('spikingjelly') or not variant.peer)}


def has_stem(arch: str) -> bool:
    """Return whether what comes before the first neuron can run once per image."""
    try:
        create(Variant(arch=arch, stem=True), T)
    except ValueError:  # the residual stream starts before the first neuron
        return False
    return True


def spikingjelly_resnet18(timesteps: int) -> nn.Module:
    from spikingjelly.activation_based import functional, neuron, surrogate
    from spikingjelly.activation_based.model import spiking_resnet
    model = spiking_resnet.spiking_resnet18(
        spiking_neuron=neuron.LIFNode, tau=4 / 3, decay_input=False, v_threshold=.5, v_reset=0.,
        surrogate_function=surrogate.Sigmoid(), num_classes=CLASSES)
    functional.set_step_mode(model, 'm')

    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            functional.reset_net(self.model)
            return self.model(x.expand(timesteps, *x.shape)).mean(0)
    return Mean()


def create(variant: Variant, timesteps: int) -> nn.Module:
    torch.manual_seed(0)
    if variant.peer:
        model = spikingjelly_resnet18(timesteps)
    elif variant.spiking:
        model = timm.create_model(
            f'spiking_{variant.arch}', timesteps=timesteps, num_classes=CLASSES, **variant.options)
    else:
        model = timm.create_model(variant.arch, num_classes=CLASSES)
    if variant.stem:
        share_stem(model)
    if variant.checkpointing:
        model.set_grad_checkpointing(True)
    if variant.channels_last:
        model.to(memory_format=torch.channels_last)
    return torch.compile(model.train()) if variant.compiled else model.train()


def create_step(variant: Variant, batch: int, size: int, timesteps: int = T) -> Callable[[int], None]:
    """Return step(batch): one training step on `batch` samples. An ANN gets timesteps times as many."""
    model = create(variant, timesteps)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=.9)
    rows = batch if variant.spiking else batch * timesteps
    images, labels = torch.randn(rows, 3, size, size), torch.randint(0, CLASSES, (rows,))
    if variant.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)

    def step(samples: int = batch) -> None:
        n = samples if variant.spiking else samples * timesteps
        optimizer.zero_grad()
        with torch.autocast('cpu', torch.bfloat16) if variant.bfloat16 else nullcontext():
            with packed_spikes() if variant.packed else nullcontext():
                loss = F.cross_entropy(model(images[:n]), labels[:n])
        loss.backward()
        optimizer.step()
    return step


def peaks(net: Net, layout: str) -> Dict[str, Optional[float]]:
    """Return the MiB of a step's tensors at its peak by variant. The compiler's own memory would count: None."""
    found: Dict[str, Optional[float]] = {}
    for name, variant in variants(net.name, layout).items():
        found[name] = None if variant.compiled else measure_peak(create_step(variant, net.batch, net.size))
        gc.collect()
    return found


def times(net: Net, layout: str, rounds: int) -> List[Dict[str, Any]]:
    """Return the time of every variant. One thread is measured by its processor time, without that of others."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    timings = interleave({name: create_step(variant, net.batch, net.size)
                          for name, variant in variants(net.name, layout).items()}, rounds, clock=clock)
    return [dict(variant=name, **timing._asdict()) for name, timing in timings.items()]


def table(times: List[Dict[str, Any]], memory: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """Return a network's rows: times and peaks as ratios to the ANN, and which points are on the Pareto front."""
    peak = {row['variant']: row['MiB'] for row in memory}
    one = times[0]['median']
    rows = [dict(step=row['variant'], time=row['median'] / one, low=row['low'] / one, high=row['high'] / one,
                 memory=peak.get(row['variant']) and peak[row['variant']] / peak[ANN], seconds=row['median'],
                 MiB=peak.get(row['variant'])) for row in times]
    for row in rows:
        row['best'] = 'yes' if is_best(row, rows) else ''
    return rows


def is_best(row: Dict[str, Any], rows: List[Dict[str, Any]]) -> bool:
    """Return whether no other option of the spiking network takes less of both time and memory."""
    options = [r for r in rows if r['step'] in OPTIONS and not r['step'].startswith(ANN)]
    return row in options and not any(r['time'] < row['time'] and r['memory'] < row['memory'] for r in options)


def name_of(net: str, layout: str, part: str) -> str:
    """Return the name of the file of a piece."""
    return f'train_step_{net}_{layout}_{part}'


def measure(net: Net, layout: str, part: str, args: Any) -> None:
    """Measure times or peaks of a network and save them."""
    print(f'{net.name}, {layout}: {part}', flush=True)
    if part == 'time':
        rows = times(net, layout, args.rounds)
    else:
        found = json.loads(output_of_fresh_process(
            __file__, f'{net.name}:{layout}', '--threads', str(args.threads)))
        rows = [dict(variant=name, MiB=mib) for name, mib in found.items()]
    save(args.output, name_of(net.name, layout, part), {part: rows}, batch_size=net.batch, size=net.size)


def load_table(output: Path, net: str, layout: str) -> Optional[List[Dict[str, Any]]]:
    """Return a network's rows from the newest files; None if a part is missing."""
    files = [output / f'{name_of(net, layout, part)}.json' for part in PARTS]
    if not all(file.is_file() for file in files):
        return None
    return table(*(json.loads(f.read_text())[0]['tables'][part] for f, part in zip(files, PARTS)))


def main() -> None:
    parser = create_parser(__doc__, rounds=11)
    parser.add_argument('nets', nargs='*', metavar='NET', help=f'of {", ".join(NETS)} (default: all)')
    parser.add_argument('--layout', choices=['contiguous', 'channels_last'], help='only this memory format')
    parser.add_argument('--part', choices=PARTS, help='only times or only memory')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.worker:
        net, layout = args.worker.split(':')
        print(json.dumps(peaks(NETS[net], layout)))
        return
    if set(args.nets) - set(NETS):
        parser.error(f'unknown: {", ".join(sorted(set(args.nets) - set(NETS)))}; must be of {", ".join(NETS)}.')
    for name in args.nets or NETS:
        for layout in layouts(name):
            if args.layout in (None, layout):
                for part in [args.part] if args.part else PARTS:
                    measure(NETS[name], layout, part, args)
                rows = load_table(args.output, name, layout)
                if rows:
                    show(f'{name}, {layout}, T={T}; the ANN on as many images = 1', rows)
    if not has('spikingjelly'):
        print('absent: SpikingJelly')


if __name__ == '__main__':
    main()
