"""The precision of the ablation's students on this CPU, measured once for an output."""
from pathlib import Path

import timm
import torch
import torch.nn.functional as F

from harness import machine
from trial_precision import decided_precision

__all__ = ['device_name', 'student_precision']

BATCH, CLASSES, TIMESTEPS = 16, 20, 2


class _Step:
    """A training step of the student on random images in a precision."""

    def __init__(self, precision: str, width: int):
        self.bfloat16 = precision == 'bfloat16'
        self.model = timm.create_model('spiking_resnet20_cifar', width=width, num_classes=CLASSES, timesteps=TIMESTEPS)
        self.images, self.target = torch.randn(BATCH, 3, 32, 32), torch.randint(CLASSES, (BATCH,))

    def train_mode(self, mode: bool) -> None:
        self.model.train(mode)

    def rewind(self) -> None:
        self.model.zero_grad()

    def train_step(self) -> None:
        with torch.autocast('cpu', torch.bfloat16, enabled=self.bfloat16):
            logits = self.model(self.images)
        F.cross_entropy(logits.float(), self.target).backward()


def device_name() -> str:
    """Return the name of the GPU, or that of the CPU with its capability."""
    facts = machine()
    return facts['gpu'] or f'{facts["cpu"]} ({facts["cpu_capability"]})'


def student_precision(output: Path, width: int) -> str:
    """Return the precision of an output's students: 'float32' or 'bfloat16', whichever is faster on this CPU.

    It is measured when the output has no run yet, and stays. An output with runs from before it was measured keeps
    bfloat16, and so does a GPU.

    Args:
        output: Root of all runs.
        width: Width of the student.

    Raises:
        SystemExit: It was measured on another CPU.
    """
    begun = not (output / 'precision.json').is_file() and any(output.glob('runs/*/args.yaml'))
    if begun or torch.cuda.is_available():
        return 'bfloat16'
    output.mkdir(parents=True, exist_ok=True)
    return decided_precision(output, device_name(), lambda name: _Step(name, width))
