#!/usr/bin/env python3
"""Measure what SSCL adds to a training step: teacher, projections and critic, CKA, each compared with the step without.

    python benchmarks/loss.py

By default a spiking ResNet-18 with its ANN as the teacher, T = 4, batch 128 of 64 x 64.
"""
from typing import Any, Dict, List

import timm
import torch
from harness import create_parser, interleave, save, show

from timm_sscl import SSCLTask
from timm_sscl.losses.sscl import SSCLCriterion

T, CLASSES = 4, 100
MODES = {'cross-entropy': 'none', '+ kd': 'kd', '+ contrastive': 'contrastive', '+ sscl': 'sscl'}


def create_task(losses: str, size: int) -> SSCLTask:
    torch.manual_seed(0)
    student = timm.create_model('spiking_resnet18', timesteps=T, num_classes=CLASSES)
    teacher = timm.create_model('resnet18', num_classes=CLASSES)
    return SSCLTask(student, teacher, losses, input_size=(3, size, size), verbose=False).train()


def main() -> None:
    parser = create_parser(__doc__, rounds=5)
    parser.add_argument('--batch-size', type=int, default=128)
    parser.add_argument('--size', type=int, default=64, help='height and width of the images')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    images = torch.randn(args.batch_size, 3, args.size, args.size)
    labels = torch.randint(0, CLASSES, (args.batch_size,))
    tasks = {mode: create_task(losses, args.size) for mode, losses in MODES.items()}

    def step(task: SSCLTask) -> None:
        task.trainable_module.zero_grad()
        task(images, labels)['loss'].backward()

    sscl = tasks['+ sscl']
    with torch.no_grad():
        teacher_features = sscl.teacher_reader(sscl.teacher, images)[1]
        shapes = sscl.trainable_module.reader(sscl.student, images)[1]
    features = [torch.zeros_like(f).bernoulli_(.3).requires_grad_() for f in shapes]
    with_cka = sscl.trainable_module.losses['sscl']

    def compare() -> None:
        SSCLCriterion.forward(with_cka, features, teacher_features).backward()

    def cka() -> None:
        for running, s, a in zip(with_cka.running_cka, features, teacher_features):
            running(s.detach(), a)

    def teach() -> None:
        with torch.no_grad():
            sscl.teacher(images)

    parts = {'teacher, forward': teach, 'projections, critic and CKA, with backward': compare, 'CKA': cka}
    timings = interleave({**{m: lambda t=t: step(t) for m, t in tasks.items()}, **parts}, args.rounds, warmup=1)
    base = timings['cross-entropy'].median
    rows: List[Dict[str, Any]] = [
        dict(part=name, seconds=t.median, low=t.low, high=t.high, percent_of_step=100 * t.median / base)
        for name, t in timings.items()]
    added = timings['+ sscl'].median - base - timings['teacher, forward'].median
    rows.append(dict(part='sscl adds beyond the teacher', seconds=added, percent_of_step=100 * added / base))
    show(f'ResNet-18, batch {args.batch_size} x T={T}, {args.size} x {args.size}; cross-entropy step = 100', rows)
    save(args.output, 'loss', {'parts': rows}, batch_size=args.batch_size, size=args.size)


if __name__ == '__main__':
    main()
