"""Fixtures of the tests of training."""
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState

from runs import Server
from tiny_training import Tiny, loaders_of, parse
from timm_sscl.distillation.teacher_input import TeacherInput
from timm_sscl.training.datasets import create_datasets
from timm_sscl.training.processes import create_accelerator
from timm_sscl.training.session import Session
from timm_sscl.training.saving.state import start_training
from timm_sscl.training.task import create_task


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)  # Accelerate's settings are the process's


@pytest.fixture(scope='session')
def server():
    """A process with everything imported, which forks trainings."""
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope='session')
def digits():
    """The digits are the same in most cases here: read once."""
    return create_datasets(parse([]))


@pytest.fixture
def fit(tmp_path, digits):
    """fit(argv) is the training of a tiny model on eight digits, ready to run; the folder is fit.folder."""
    def make(argv=(), model=None, datasets=None, options=lambda args: args, resume=''):
        AcceleratorState._reset_state(reset_partial_state=True)
        args = parse(argv)
        accelerator = create_accelerator(args)
        model = Tiny() if model is None else model
        config, make_loaders = loaders_of(args, datasets or digits, model)
        session = Session(args, accelerator, make_loaders, SimpleNamespace(signal_number=None))
        mixes = make_loaders().mixup is not None
        task = create_task(args, model, None, TeacherInput(), config, torch.device('cpu'), mixes)
        folder = tmp_path / f'run{len(list(tmp_path.glob("run*")))}'
        folder.mkdir()
        return start_training(session, options(args), task, folder, 'student', resume=str(resume), ema=args.model_ema,
                              compile_task=bool(args.torchcompile))
    return make
