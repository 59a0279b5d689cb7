"""What a resumed run on a GPU depends on, as far as a CPU can show it."""
import os

import pytest
import torch
from accelerate.state import AcceleratorState

from timm_sscl.random_state import get_random_state, set_random_state
from timm_sscl.training.command_line.options import parse_args
from timm_sscl.training.processes import create_accelerator
from timm_sscl.training.session import Session
from timm_sscl.training.saving.state import start_training


def test_a_training_begins_with_the_loss_scale_that_the_run_began_with(fit):
    """A run that is killed between the teacher's training and the student's first checkpoint has no other scale."""
    training = fit()
    session = training.session
    session.accelerator.scaler = torch.amp.GradScaler('cpu', init_scale=1024.)
    session = Session(session.args, session.accelerator, session.make_loaders, session.stop)
    scaler = session.accelerator.scaler
    scaler.load_state_dict({**scaler.state_dict(), 'scale': 8., '_growth_tracker': 7})
    assert scaler.get_scale() == 8.
    again = start_training(session, training.args, training.task, training.folder, 'student')
    state = again.accelerator.scaler.state_dict()
    assert (state['scale'], state['_growth_tracker']) == (1024., 0)


@pytest.mark.parametrize('given', [False, True])
def test_deterministic_asks_pytorch_for_it(given, monkeypatch):
    monkeypatch.delenv('CUBLAS_WORKSPACE_CONFIG', raising=False)
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic
    try:
        create_accelerator(parse_args(['--deterministic'] if given else [])[0])
        assert torch.are_deterministic_algorithms_enabled() == torch.backends.cudnn.deterministic == given
        assert torch.is_deterministic_algorithms_warn_only_enabled() == given
        assert ('CUBLAS_WORKSPACE_CONFIG' in os.environ) == given
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.deterministic = before[1]
        os.environ.pop('CUBLAS_WORKSPACE_CONFIG', None)
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='the generator of a GPU')
def test_the_random_state_holds_the_gpus_generator():
    torch.rand(3, device='cuda')
    state = get_random_state()
    first = torch.rand(5, device='cuda')
    set_random_state(state)
    assert torch.equal(torch.rand(5, device='cuda'), first)
