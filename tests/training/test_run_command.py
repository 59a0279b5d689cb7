"""The commands that a run names: the one that started it, and the one that resumes it."""
import shlex
import sys
from pathlib import Path

import pytest

from timm_sscl.training.exits import resume_command
from timm_sscl.training.runs.run_summary import run_command

BY_ACCELERATE = dict(ACCELERATE_DYNAMO_BACKEND='NO', ACCELERATE_MIXED_PRECISION='no')  # as accelerate launch sets them
BY_TORCHRUN = dict(TORCHELASTIC_RUN_ID='none', LOCAL_WORLD_SIZE='2', WORLD_SIZE='4')
BF16 = dict(ACCELERATE_MIXED_PRECISION='bf16')


@pytest.mark.parametrize('variables, words', [
    ({}, 'my python/bin/python'),
    (BF16, 'ACCELERATE_MIXED_PRECISION=bf16|my python/bin/python'),
    (BY_ACCELERATE, 'accelerate|launch'),
    ({**BY_ACCELERATE, **BF16}, 'accelerate|launch|--mixed_precision|bf16'),
    (BY_TORCHRUN, 'torchrun|--nproc_per_node|2'),
    ({**BY_TORCHRUN, **BF16}, 'ACCELERATE_MIXED_PRECISION=bf16|torchrun|--nproc_per_node|2'),
])
def test_commands_begin_as_the_run_was_started(monkeypatch, tmp_path, variables, words):
    for name in {**BY_ACCELERATE, **BY_TORCHRUN}:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, 'orig_argv', ['my python/bin/python', '-X', 'dev', 'train.py', '--epochs', '3'])
    monkeypatch.chdir(tmp_path)
    command = run_command(str(tmp_path / 'train.py'), ['--output', 'my runs'])
    assert shlex.split(command) == [*words.split('|'), 'train.py', '--output', 'my runs']
    resumed = resume_command(str(tmp_path / 'train.py'), Path('my runs/one'))
    assert shlex.split(resumed) == [*words.split('|'), 'train.py', '--resume', 'my runs/one']
