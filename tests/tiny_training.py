"""A tiny model and the parts of train.py around it, for tests of single options."""
import copy
import csv
from functools import partial

import torch
import torch.nn as nn

from timm_sscl.training.command_line.options import parse_args
from timm_sscl.distillation.teacher_input import TeacherInput
from timm_sscl.training.datasets import guard_samples, resolve_input
from timm_sscl.training.loaders import create_loaders
from timm_sscl.training.student import create_student
from timm_sscl.training.task import create_task

BASE = ['--dataset', 'digits', '--model', 'test_resnet', '--distill', 'none', '--num-classes', '10', '--img-size', '8',
        '--mean', '0.5', '--std', '0.5', '--crop-pct', '1', '--batch-size', '4', '--train-num-samples', '8',
        '--val-num-samples', '8', '--workers', '0', '--device', 'cpu', '--epochs', '2', '--warmup-epochs', '0']


def parse(argv):
    return parse_args([*BASE, *map(str, argv)])[0]


class Tiny(nn.Module):
    """The least that trains: a batch norm and a linear classifier of (B, 3, 8, 8)."""
    pretrained_cfg = dict(mean=(.5,) * 3, std=(.5,) * 3)
    num_classes, in_chans = 10, 3

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.norm = nn.BatchNorm2d(3)
            self.fc = nn.Linear(192, 10)

    def forward(self, x):
        return self.fc(self.norm(x).flatten(1))


def loaders_of(args, datasets, model=None):
    config = args.data_config = resolve_input(args, model or Tiny())
    guarded = guard_samples(args, copy.deepcopy(datasets), config, 10)
    return config, partial(create_loaders, args, guarded, config, 10)


def rows(fit):
    with open(fit.folder / 'summary.csv') as file:
        return list(csv.DictReader(file))


def student(argv):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return create_student(parse(argv), 10)


def task_of(args, model, teacher=None):
    config = dict(input_size=(3, 8, 8))
    return create_task(args, model, teacher, TeacherInput(), config, torch.device('cpu'), args.mixup > 0)


class Posing:
    """An accelerator that says of itself what it is told to: its device is a GPU, or there are other processes."""

    def __init__(self, accelerator, **said):
        self._accelerator, self._said = accelerator, said

    def __getattr__(self, name):
        return self._said[name] if name in self._said else getattr(self._accelerator, name)
