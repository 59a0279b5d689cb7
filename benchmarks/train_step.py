#!/usr/bin/env python3
"""Measure the cost of a training step: time and peak memory of a spiking ResNet-18 and of its ANN on as many images.

    python benchmarks/train_step.py

T = 4, 8 images of 112 x 112 for time (16 for memory); the ANN gets T times as many. A step is forward, cross-entropy,
backward and SGD. Memory is given for tensors (without glibc's holes) and for the process.
"""
from contextlib import nullcontext
from typing import Any, Callable, Dict, NamedTuple

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from harness import create_parser, has, interleave, measure_peak, peak_in_fresh_process, save, show

from timm_sscl import share_stem
from timm_sscl.neurons import packed_spikes

T, CLASSES, SIZE = 4, 100, 112
REFERENCE = 'ANN'


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


VARIANTS: Dict[str, Variant] = {
    REFERENCE: Variant(spiking=False),
    'ANN, channels_last': Variant(spiking=False, channels_last=True),
    'spiking': Variant(),
    'spiking, channels_last': Variant(channels_last=True),
    'spiking, stem once': Variant(stem=True),
    'spiking, channels_last, stem once': Variant(channels_last=True, stem=True),
    'spiking, channels_last, stem once, detached reset': Variant(
        channels_last=True, stem=True, options=dict(detach_reset=True)),
    'spiking, channels_last, stem once, packed spikes': Variant(channels_last=True, stem=True, packed=True),
    'spiking, channels_last, gradient checkpointing': Variant(channels_last=True, checkpointing=True),
    'ANN, channels_last, gradient checkpointing': Variant(spiking=False, channels_last=True, checkpointing=True),
    'ANN, torch.compile': Variant(spiking=False, compiled=True),
    'spiking, torch.compile': Variant(compiled=True),
    'ANN, bfloat16': Variant(spiking=False, bfloat16=True),
    'spiking, bfloat16': Variant(bfloat16=True),
    "SpikingJelly's spiking_resnet18": Variant(peer=True),
}


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


def create_step(variant: Variant, batch: int, size: int = SIZE, timesteps: int = T) -> Callable[[int], None]:
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


def worker(name: str, batch: int) -> None:
    print(measure_peak(create_step(VARIANTS[name], batch)))


def main() -> None:
    parser = create_parser(__doc__, rounds=11)
    parser.add_argument('--batch-size', type=int, default=8, help='images for time; twice as many for memory')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.worker:
        worker(args.worker, 2 * args.batch_size)
        return
    variants = {name: v for name, v in VARIANTS.items() if not v.peer or has('spikingjelly')}
    timings = interleave({name: create_step(v, args.batch_size) for name, v in variants.items()}, args.rounds)
    rows = []
    options = '--threads', str(args.threads), '--batch-size', str(args.batch_size)
    for name, variant in variants.items():
        print(f'  memory: {name}', flush=True)
        exact, process = (None if variant.compiled else  # the compiler's own memory would count
                          peak_in_fresh_process(__file__, name, *options, exact=e) for e in (True, False))
        rows.append(dict(step=name, seconds=timings[name].median, low=timings[name].low, high=timings[name].high,
                         MiB=exact, process_MiB=process))
    for row in rows:
        row['time'] = row['seconds'] / rows[0]['seconds']
        for column, ratio in (('MiB', 'memory'), ('process_MiB', 'process_memory')):
            row[ratio] = row[column] and row[column] / rows[0][column]
    show(f'ResNet-18, {args.batch_size} images x T={T}, {SIZE} x {SIZE}; {REFERENCE} on {args.batch_size * T} = 1',
         rows)
    if not has('spikingjelly'):
        print('absent: SpikingJelly')
    save(args.output, 'train_step', {'steps': rows}, batch_size=args.batch_size)


if __name__ == '__main__':
    main()
