"""Common parts of the speed benchmarks: interleaved timing, peak memory in fresh processes, tables, JSON, the machine.
"""
import argparse
import ctypes
import gc
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Sequence

import torch

from timm_sscl.cpu_features import cpu_capability
from timm_sscl.neurons import lif_backend

RESULTS = Path(__file__).resolve().parent / 'results'
PACKAGES = 'torch', 'timm', 'triton', 'spikingjelly', 'snntorch'

# glibc otherwise keeps freed blocks below 32 MiB, and a process's memory then depends more on holes than on tensors
EXACT_MALLOC = {'MALLOC_MMAP_THRESHOLD_': '65536'}
# glibc otherwise returns blocks above 32 MiB at once, and a kernel's time then includes page faults of its output
STEADY_MALLOC = {'MALLOC_MMAP_MAX_': '0', 'MALLOC_TRIM_THRESHOLD_': str(2 ** 36)}


class Timing(NamedTuple):
    """Seconds of one variant."""
    median: float
    low: float  # quartiles
    high: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> 'Timing':
        ordered = sorted(seconds)
        at = [ordered[round(q * (len(ordered) - 1))] for q in (.5, .25, .75)]
        return cls(*at)


def create_parser(doc: str, rounds: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=rounds, help=f'times every variant runs (default: {rounds})')
    parser.add_argument('--threads', type=int, default=os.cpu_count(), help='CPU threads (default: all cores)')
    parser.add_argument('--output', type=Path, default=RESULTS, help='folder for JSON and figures')
    parser.add_argument('--worker', help=argparse.SUPPRESS)  # one variant's memory, measured in its own process
    return parser


def keep_freed_memory() -> None:
    """Restart this process with glibc settings that keep freed memory; glibc reads them only at its start."""
    if any(os.environ.get(name) != value for name, value in STEADY_MALLOC.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **STEADY_MALLOC})


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def interleave(
        variants: Mapping[str, Callable[[], Any]],
        rounds: int,
        warmup: int = 2,
        clock: Callable[[], float] = time.perf_counter,
) -> Dict[str, Timing]:
    """Run all variants in turn, round by round, so that disturbances of the machine affect all alike.

    Args:
        variants: Name -> function.
        rounds: Times that each runs.
        warmup: Times that each runs before.
        clock: Returns seconds. time.process_time leaves out the time that other processes take.
    """
    for name, run in variants.items():
        began = time.time()
        for _ in range(warmup):
            run()
        print(f'  warm: {name} ({time.time() - began:.1f} s)', flush=True)
    seconds: Dict[str, List[float]] = {name: [] for name in variants}
    began = time.time()
    for i in range(rounds):
        for name, run in variants.items():
            gc.collect()
            start = clock()
            run()
            seconds[name].append(clock() - start)
        if (i + 1) % max(1, rounds // 5) == 0:
            eta = timedelta(seconds=round((time.time() - began) / (i + 1) * (rounds - i - 1)))
            print(f'  round {i + 1}/{rounds}  ETA {eta}', flush=True)
    return {name: Timing.of(values) for name, values in seconds.items()}


# ---- memory

def _resident(field: str) -> float:
    """Return MiB of this process from /proc: VmRSS, or VmHWM, the maximum since its last reset."""
    with open('/proc/self/status') as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(field))


def measure_peak(step: Callable[..., Any]) -> float:
    """Return the MiB that step() adds at its peak to the process, after a step(2) on two samples."""
    with lif_backend('compiled'):  # compile for the small tensors, too, so that the compiler's memory is not counted
        step(2)
    gc.collect()
    ctypes.CDLL('libc.so.6').malloc_trim(0)
    with open('/proc/self/clear_refs', 'w') as refs:
        refs.write('5')  # resets VmHWM
    before = _resident('VmRSS')
    step()
    return _resident('VmHWM') - before


def output_of_fresh_process(script: str, variant: str, *options: str) -> str:
    """Return the last line that `script --worker variant` prints in its own process, which frees memory at once.

    Raises:
        SystemExit: It failed; with the last lines of its error.
    """
    command = [sys.executable, script, '--worker', variant, *options]
    env = {name: value for name, value in os.environ.items() if name not in STEADY_MALLOC}
    result = subprocess.run(command, capture_output=True, text=True, env={**env, **EXACT_MALLOC})
    if result.returncode:
        raise SystemExit(f'{variant}: {result.stderr.strip()[-2000:]}')
    return result.stdout.strip().splitlines()[-1]


# ---- output

def machine() -> Dict[str, Any]:
    with open('/proc/meminfo') as info:
        memory = round(int(info.readline().split()[1]) / 2 ** 20)
    with open('/proc/cpuinfo') as info:
        model = next((line.split(':')[1].strip() for line in info if line.startswith('model name')), platform.machine())
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return dict(cpu=model, cpu_capability=cpu_capability(), cores=os.cpu_count(), memory_gib=memory, gpu=gpu,
                python=platform.python_version(), **versions)


def show(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a table."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(c), *(len(line[i]) for line in text)) for i, c in enumerate(columns)]
    print(f'\n{title}')
    print('  '.join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(columns, widths))))
    for line in text:
        print('  '.join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))))


def _cell(value: Any) -> str:
    return '-' if value is None else f'{value:.2f}' if isinstance(value, float) else str(value)


def save(output: Path, name: str, tables: Mapping[str, Sequence[Mapping[str, Any]]], **facts: Any) -> None:
    """Write all tables of a benchmark and the machine to JSON. The previous run stays in the file, after the newest."""
    output.mkdir(parents=True, exist_ok=True)
    file = output / f'{name}.json'
    runs = json.loads(file.read_text()) if file.is_file() else []
    newest = dict(machine=machine(), threads=torch.get_num_threads(), **facts, tables=tables)
    file.write_text(json.dumps([newest, *runs][:2], indent=1) + '\n')  # two runs show how well they agree
    print(f'\nfile: {file}')
