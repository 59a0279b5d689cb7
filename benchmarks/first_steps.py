#!/usr/bin/env python3
"""From the command to the tenth step: `accelerate launch train.py` beside an ANN in timm's own loop.

    python benchmarks/first_steps.py

timm's train.py is not part of its package, so that the ANN runs in a loop of the same parts in the same order: timm's
data set, loaders, model, optimizer and schedule (`--ann` of this script). The ANN gets T times as many images per step
as the spiking network gets, which is as many convolutions. Both read the same images, which are drawn at random.

"cold" has an empty compile cache, "warm" one that an earlier run has filled. All commands run in turn, round by round.
Processor time leaves out the time that other work on the machine takes.
"""
import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Dict, List, Tuple

ROOT = Path(__file__).resolve().parent.parent
STEPS, BATCH, TIMESTEPS, SIZE, CLASSES = 10, 16, 4, 32, 10
IMAGES = 12 * BATCH * TIMESTEPS  # of the training set: more than ten batches of the ANN
_DONE = re.compile(rf'\[ *{STEPS}/')  # in the log of both scripts


def write_images(folder: Path) -> None:
    """Write random PNG images in timm's layout."""
    import numpy as np
    from PIL import Image
    random = np.random.default_rng(0)
    for split, count in (('train', IMAGES), ('validation', 4 * CLASSES)):
        for i in range(count):
            file = folder / split / str(i % CLASSES) / f'{i}.png'
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(file)


def write_teacher(file: Path) -> None:
    """Write weights of an ANN that was not trained, so that train.py has a teacher."""
    import timm
    import torch
    torch.save(timm.create_model('resnet18', num_classes=CLASSES).state_dict(), file)


def train_ann(data: str, batch_size: int) -> None:
    """Train a ResNet-18 for ten steps by timm's parts, and log the tenth."""
    import torch
    from timm.data import create_dataset, create_loader, resolve_data_config
    from timm.models import create_model
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import AverageMeter, random_seed
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    random_seed(42, 0)
    model = create_model('resnet18', num_classes=CLASSES)
    config = resolve_data_config(dict(img_size=SIZE), model=model)
    optimizer = create_optimizer_v2(model, opt='sgd', lr=0.01)
    loaders = [create_loader(
        create_dataset('', data, split, is_training=split == 'train'), config['input_size'], batch_size,
        is_training=split == 'train', num_workers=2, use_prefetcher=False, mean=config['mean'], std=config['std'],
        interpolation='random' if split == 'train' else config['interpolation']) for split in ('train', 'validation')]
    scheduler, _ = create_scheduler_v2(optimizer, num_epochs=300)
    scheduler.step(0)
    criterion, losses = torch.nn.CrossEntropyLoss(label_smoothing=0.1), AverageMeter()
    model.train()
    for step, (input, target) in enumerate(loaders[0], 1):
        loss = criterion(model(input), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.update(loss.item(), len(input))
        if step == STEPS:
            print(f'[{STEPS}/{len(loaders[0])}]  loss {losses.avg:.3f}', file=sys.stderr, flush=True)
            break


def commands(data: Path, output: Path) -> Dict[str, List[str]]:
    """Return the commands by name."""
    launch = [sys.executable, '-m', 'accelerate.commands.launch']
    train = [str(ROOT / 'train.py'), '--data-dir', str(data), '--img-size', str(SIZE), '--model', 'spiking_resnet18',
             '-b', str(BATCH), '-T', str(TIMESTEPS), '--log-interval', str(STEPS), '--workers', '2', '--lr', '0.01',
             '--output', str(output), '--no-report']
    ann = [__file__, '--ann', str(data)]
    sscl = ['--teacher-checkpoint', str(data.parent / 'teacher.pth')]  # else the first ten steps are the teacher's
    return {
        'ANN, timm\'s loop': [sys.executable, *ann],
        'ANN, timm\'s loop, accelerate launch': [*launch, *ann],
        'train.py --distill none': [*launch, *train, '--distill', 'none'],
        'train.py (SSCL)': [*launch, *train, *sscl],
    }


def _processor_time(group: int) -> float:
    """Return the processor seconds of a process group, of its ended processes too, from /proc."""
    ticks = 0
    for stat in Path('/proc').glob('[0-9]*/stat'):
        try:
            fields = stat.read_text().rpartition(')')[2].split()
        except OSError:  # it has just ended
            continue
        if int(fields[2]) == group:
            ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf('SC_CLK_TCK')


def time_to_tenth_step(command: List[str], cache: Path) -> Tuple[float, float]:
    """Return the seconds and the processor seconds from the start of a command to its tenth step. It is ended then."""
    env = {**os.environ, 'TORCHINDUCTOR_CACHE_DIR': str(cache), 'PYTHONPATH': str(ROOT)}
    began = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=env,
                               start_new_session=True)
    lines: List[str] = []
    try:
        for line in process.stderr:
            lines.append(line)
            if _DONE.search(line):
                return time.perf_counter() - began, _processor_time(process.pid)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the launcher would leave its child running
        process.communicate()
    raise SystemExit(f'{" ".join(command)} ended before its tenth step:\n{"".join(lines[-20:])}')


def measure(rounds: int, folder: Path) -> Dict[str, List[Tuple[float, float]]]:
    """Return the times of every command by name; those of train.py cold and warm."""
    write_images(folder / 'data')
    write_teacher(folder / 'teacher.pth')
    all_commands = commands(folder / 'data', folder / 'out')
    times: Dict[str, List[Tuple[float, float]]] = {}
    for i in range(rounds):
        for number, (name, command) in enumerate(all_commands.items()):
            for kind in ('cold', 'warm') if 'train.py' in name else ('',):
                case = ', '.join(filter(None, [name, kind]))
                times.setdefault(case, []).append(time_to_tenth_step(command, folder / f'cache-{i}-{number}'))
                wall, cpu = times[case][-1]
                print(f'  round {i + 1}/{rounds}  {case}: {wall:.1f} s, {cpu:.1f} s of processors', flush=True)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=3, help='times every command runs (default: 3)')
    parser.add_argument('--output', type=Path, default=ROOT / 'benchmarks' / 'results', help='folder for the JSON file')
    parser.add_argument('--ann', metavar='DIR', help=argparse.SUPPRESS)  # the ANN's loop on these images
    args = parser.parse_args()
    if args.ann:
        train_ann(args.ann, BATCH * TIMESTEPS)
        return
    from harness import Timing, save, show  # not at the top: the ANN's loop is to import what timm's script imports
    with tempfile.TemporaryDirectory() as folder:
        times = measure(args.rounds, Path(folder))
    walls, cpus = ({name: Timing.of([pair[i] for pair in pairs]) for name, pairs in times.items()} for i in (0, 1))
    base = next(name for name in walls if name.endswith('accelerate launch'))
    rows = [dict(what=name, time=wall.median / walls[base].median, low=wall.low / walls[base].median,
                 high=wall.high / walls[base].median, seconds=wall.median,
                 processor_time=cpus[name].median / cpus[base].median, processor_seconds=cpus[name].median)
            for name, wall in walls.items()]
    show('to the tenth step', rows)
    save(args.output, 'first_steps', {'steps': rows}, batch_size=BATCH, timesteps=TIMESTEPS, size=SIZE)


if __name__ == '__main__':
    main()
