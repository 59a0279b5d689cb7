"""The lines of runs.jsonl: facts of the machine, what a finished or failed trial gives, appending."""
import fcntl
import json
import os
import subprocess
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any, Dict, Iterator, Mapping, Sequence

import numpy as np
import timm
import torch

from trials import Trial, encode_correct

__all__ = ['append_line', 'claim', 'code_revision', 'failed_line', 'machine_facts', 'ok_line']

ROOT = Path(__file__).resolve().parent.parent


def code_revision() -> str:
    """Return the variable CODE_REVISION, or git's name of the code."""
    named = os.environ.get('CODE_REVISION', 'unknown')
    if named != 'unknown':
        return named
    try:
        result = subprocess.run(['git', 'describe', '--always', '--dirty'], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return named
    return result.stdout.strip() if result.returncode == 0 else named


def machine_facts(device: torch.device, precision: str = 'float32') -> Dict[str, Any]:
    """Return what every line says about machine, versions and precision."""
    capability = torch.backends.cpu.get_cpu_capability()
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else f'CPU {capability}'
    if device.type == 'cuda':
        precision = 'float32, TF32 in convolutions'
    elif precision == 'bfloat16':
        precision = 'bfloat16 autocast, channels_last'
    return dict(
        precision=precision, device=name, cpu=capability, torch=torch.__version__, timm=timm.__version__,
        revision=code_revision())


def ok_line(trial: Trial, facts: Mapping[str, Any], correct: np.ndarray, **numbers: Any) -> Dict[str, Any]:
    """Return the line of a trial that ended well."""
    return dict(
        name=trial.name, status='ok', **asdict(trial), **numbers, num_images=len(correct),
        correct=encode_correct(correct), **facts, finished=_now())


def failed_line(trial: Trial, facts: Mapping[str, Any], error: str) -> Dict[str, Any]:
    return dict(name=trial.name, status='failed', error=error, **asdict(trial), **facts, finished=_now())


def _now() -> str:
    return datetime.now().isoformat(timespec='seconds')


@contextmanager
def claim(folder: Path, name: str) -> Iterator[bool]:
    """Yield whether this process alone may do what has this name; False while another one does it. A claim ends with
    its process, however that ends.
    """
    (folder / 'claims').mkdir(exist_ok=True)
    with open(folder / 'claims' / name, 'w') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def append_line(folder: Path, line: Mapping[str, Any]) -> None:
    """Append a line to runs.jsonl, which several processes may do; a line that was cut off before is ended first."""
    with open(folder / 'runs.jsonl', 'ab+') as out:
        fcntl.flock(out, fcntl.LOCK_EX)
        end = out.seek(0, os.SEEK_END)
        if end:
            out.seek(end - 1)
        cut = end and out.read(1) != b'\n'
        out.write((('\n' if cut else '') + json.dumps(_rounded(line)) + '\n').encode())


def _rounded(value: Any) -> Any:
    """Round floats to 6 digits, so that a line stays short."""
    if isinstance(value, float):
        return float(f'{value:.6g}')
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, Sequence) and not isinstance(value, str) else value
