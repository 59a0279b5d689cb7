#!/usr/bin/env python3
"""Measure int8 inference: time of the deployed model beside its ANN in float32 and int8, and what rounding does to
accuracy.

    python benchmarks/deploy.py                                   # speed, and accuracy on the bundled digits
    python benchmarks/deploy.py --run output/train/NAME ...       # accuracy of further runs of train.py

T = 4. The ANN gets T times as many images. Times are CPU times of one thread, so that a shared machine adds little, in
interleaved rounds: once with all of the CPU's instructions, once with AVX2 only.
"""
import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

import timm
import torch
from harness import STEADY_MALLOC, create_parser, interleave, save, show
from torch.profiler import ProfilerActivity, profile

import timm_sscl
from timm_sscl.export import deploy

T, CLASSES = 4, 100
BITS = 24, 16, 8
DEPLOYED = 'spiking, deployed, {} bits'
NETS = {'resnet18': (8, 112), 'vgg16_cifar': (16, 32)}  # model -> images, size
ISAS = {'all instructions': {}, 'AVX2': dict(ONEDNN_MAX_CPU_ISA='AVX2', ATEN_CPU_CAPABILITY='avx2')}
DIGITS = '--config digits --distill none --device cpu --threads 1 --no-report'.split()
PROFILED = {'convolutions in int8': ('onednn::qconv', 'onednn::qlinear'), 'neurons': ('CompiledFxGraph', '_LIF'),
            'convolutions in float32': ('mkldnn_convolution',), 'pooling': ('pool',),
            'sums of planes and residuals': ('aten::add',),
            'copies': ('aten::copy_', 'aten::cat', 'aten::to')}


def quantized_ann(model: torch.nn.Module, images: torch.Tensor) -> Optional[Callable]:
    """Return the ANN in int8 by torch's FX quantization, observed on the images; None if this torch has none."""
    try:
        from torch.ao.quantization import get_default_qconfig_mapping
        from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
    except ImportError:
        print('absent: FX quantization')
        return None
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.backends.quantized.engine = 'x86'
        prepared = prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping('x86'), (images,))
        prepared(images)
        return convert_fx(prepared)


def variants(name: str) -> Dict[str, Callable[[], Any]]:
    """Return the calls to time for a net."""
    batch, size = NETS[name]
    torch.manual_seed(0)
    images = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    repeated = torch.cat([images] * T)
    ann = timm.create_model(name, num_classes=CLASSES).eval()
    spiking = timm.create_model(f'spiking_{name}', num_classes=CLASSES, timesteps=T).eval()
    timm_sscl.calibrate(spiking, images)
    quantized = quantized_ann(ann, repeated)
    ann_last = copy.deepcopy(ann).to(memory_format=torch.channels_last)
    spiking_last = copy.deepcopy(spiking).to(memory_format=torch.channels_last)
    contiguous = repeated.contiguous()
    calls = {'ANN, float32': lambda: ann(contiguous), 'ANN, float32, channels_last': lambda: ann_last(repeated),
             'spiking, float32, channels_last': lambda: spiking_last(images)}
    for bits in BITS:
        calls[DEPLOYED.format(bits)] = partial(deploy(spiking, images[:1], weight_bits=bits), images)
    if quantized is not None:
        calls['ANN, int8 (FX)'] = lambda: quantized(repeated)
        calls['ANN, int8 (FX), on a quarter of the images'] = lambda: quantized(images)
    return calls


def shares(run: Callable[[], Any]) -> Dict[str, float]:
    """Return the share of the operations of a call in its CPU time, by kind."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(10):
            run()
    events = profiled.key_averages()
    total, rest = sum(e.self_cpu_time_total for e in events), 1.
    result = {}
    for kind, names in PROFILED.items():
        share = sum(e.self_cpu_time_total for e in events if any(n in e.key for n in names)) / total
        result[kind], rest = share, rest - share
    return {**result, 'other': rest}


@torch.no_grad()
def measure(rounds: int) -> Dict[str, Any]:
    """Return rows of times and shares with the instructions of this process."""
    torch.set_num_threads(1)
    times: List[Dict[str, Any]] = []
    profiles: List[Dict[str, Any]] = []
    for net in NETS:
        calls = variants(net)
        timings = interleave(calls, rounds, clock=time.process_time)
        reference = min(timings[name].median for name in calls if name.startswith('ANN, float32'))
        for name, timing in timings.items():
            times.append(dict(net=net, what=name, rounds=rounds, time=timing.median / reference,
                              low=timing.low / reference, high=timing.high / reference, ms=1e3 * timing.median))
        profiles += [dict(net=net, bits=bits, **shares(calls[DEPLOYED.format(bits)])) for bits in (BITS[0], BITS[-1])]
    return dict(times=times, profiles=profiles, capability=torch.backends.cpu.get_cpu_capability())


def measure_apart(isa: str, rounds: int) -> Dict[str, Any]:
    """Return the result of `measure` in a process with other instructions."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / 'result.json'
        env = {**os.environ, **STEADY_MALLOC, **ISAS[isa], 'OMP_NUM_THREADS': '1'}
        subprocess.run([sys.executable, __file__, '--worker', str(file), '--rounds', str(rounds)], env=env, check=True)
        return json.loads(file.read_text())


# ---- accuracy

@torch.no_grad()
def accuracy(run: str, limit: int) -> List[Dict[str, Any]]:
    """Return rows of a run's student as it is, in another memory format and batch size, and deployed: top-1, and the
    percentage of images with the prediction of the first row.
    """
    from timm.models import clean_state_dict

    from timm_sscl.training.datasets import create_datasets, guard_samples, resolve_input, resolve_num_classes
    from timm_sscl.training.loaders import create_loaders
    from timm_sscl.training.command_line.options import parse_args
    from timm_sscl.training.saving.resume import newest_file
    from timm_sscl.training.student import create_student

    args, _ = parse_args(['--eval-only', '--resume', run, '--workers', '0', '--device', 'cpu'])
    datasets = create_datasets(args)
    classes = resolve_num_classes(args, datasets[1])
    student = create_student(args, classes)
    config = args.data_config = resolve_input(args, student)
    loader = create_loaders(args, guard_samples(args, datasets, config, classes), config, classes).eval
    state = torch.load(newest_file(Path(run)), map_location='cpu', weights_only=False)['state_dict']
    student.load_state_dict(clean_state_dict(state))
    student.eval()
    images, targets, count = [], [], 0
    for batch, target in loader:
        images.append(batch)
        targets.append(target)
        count += len(target)
        if count >= limit:
            break
    facts = dict(data=Path(args.data_dir).name if args.data_dir else args.dataset, model=args.model,
                 T=student.timesteps, images=count)
    own, target = predict(student, images), torch.cat(targets)

    def row(what: str, classes: torch.Tensor) -> Dict[str, Any]:
        return dict(**facts, what=what, top1=100 * (classes == target).double().mean().item(),
                    agreement=100 * (classes == own).double().mean().item())

    other = copy.deepcopy(student).to(memory_format=torch.channels_last)
    halves = [half.contiguous(memory_format=torch.channels_last) for batch in images for half in batch.chunk(2)]
    return [row('float32', own), row('float32, channels_last, half batches', predict(other, halves)),
            *(row(f'deployed, {bits} bits', predict(deploy(student, images[0][:1], weight_bits=bits), images))
              for bits in BITS)]


def predict(model: torch.nn.Module, batches: List[torch.Tensor]) -> torch.Tensor:
    """Return the class that a model gives every image."""
    return torch.cat([model(batch).argmax(1) for batch in batches])


def train_digits(folder: str) -> str:
    """Train the network of README's first command on the digits, without its teacher. Return the run's folder."""
    script = Path(__file__).resolve().parent.parent / 'train.py'
    subprocess.run([sys.executable, str(script), *DIGITS, '--output', folder], check=True, stdout=subprocess.DEVNULL)
    return str(next(Path(folder).iterdir()))


def main() -> None:
    parser = create_parser(__doc__, rounds=15)
    parser.add_argument('--run', nargs='+', default=[], help='folders of runs of train.py, for the accuracy')
    parser.add_argument('--images', type=int, default=10 ** 9, help='validation images per run (default: all)')
    parser.add_argument('--no-digits', action='store_true', help='do not train on the digits')
    args: argparse.Namespace = parser.parse_args()
    if args.worker:
        Path(args.worker).write_text(json.dumps(measure(args.rounds)))
        return
    torch.set_num_threads(1)
    times: List[Dict[str, Any]] = []
    profiles: List[Dict[str, Any]] = []
    for isa in ISAS:
        result = measure_apart(isa, args.rounds)
        times += [dict(isa=isa, **row) for row in result['times']]
        profiles += [dict(isa=isa, **row) for row in result['profiles']]
    with tempfile.TemporaryDirectory() as folder:
        runs = ([] if args.no_digits else [train_digits(folder)]) + args.run
        rows = [row for run in runs for row in accuracy(run, args.images)]
    show('Time beside the ANN in float32 on T * B images', times)
    show('Shares of the deployed model\'s operations', profiles)
    show('Accuracy', rows)
    save(args.output, 'deploy', dict(times=times, profiles=profiles, accuracy=rows), timesteps=T)


if __name__ == '__main__':
    main()
