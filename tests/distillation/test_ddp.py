"""SSCLLoss beside a student in DistributedDataParallel, with gradient accumulation, in somebody's loop."""
import logging
from contextlib import ExitStack

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

from processes import run_processes
from timm_sscl import SSCLLoss, convert_to_spiking

TAPS = ['1', '3']


def _net():
    """Without batch norms, whose statistics are of one process."""
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def _models(seed=0):
    torch.manual_seed(0)
    teacher = _net().double()
    torch.manual_seed(1 + seed)
    student = convert_to_spiking(_net(), timesteps=2, v_threshold=.1).double()
    sscl = SSCLLoss(student, teacher, taps=TAPS, input_size=(3, 8, 8), dim=6, cka_scope='global', queue_size=8)
    return student, sscl.double()


def _batches():
    """Two micro-batches of 12 images."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 12, 3, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(4, (2, 12), generator=generator)


def _step(student, sscl, batches, accumulating):
    """Gradients of a step of two micro-batches, then the loss's state, by the loop of docs/examples."""
    for i, (x, y) in enumerate(zip(*batches)):
        with ExitStack() as stack:
            for module in accumulating if i == 0 else ():
                stack.enter_context(module.no_sync())
            loss = F.cross_entropy(student(x), y) + sscl(x)
            (loss / 2).backward()


def _gradients(*modules):
    return [p.grad.clone() for module in modules for p in module.parameters()]


def _on_a_process(rank):
    student, sscl = _models(seed=rank)  # DDP sends the first process's
    wrapped = DDP(student), DDP(sscl)
    x, y = _batches()
    rows = slice(6 * rank, 6 * rank + 6)
    _step(*wrapped, (x[:, rows], y[:, rows]), wrapped)
    return _gradients(student, sscl), sscl.criterion.queue, sscl.stats


def test_gradients_of_processes_and_micro_batches_are_those_of_one_process(tmp_path):
    student, sscl = _models()
    _step(student, sscl, _batches(), ())
    expected = _gradients(student, sscl)
    assert all(g.abs().max() > 0 for g in expected)
    for gradients, queue, stats in run_processes(_on_a_process, 2, tmp_path):
        for gradient, one in zip(gradients, expected):
            torch.testing.assert_close(gradient, one, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(queue, sscl.criterion.queue, rtol=1e-9, atol=1e-12)
        assert {k: round(v['cka_running'], 6) for k, v in stats.items()} == {
            k: round(v['cka_running'], 6) for k, v in sscl.stats.items()}


def _warnings_on_a_process(rank):
    said = {}
    for name, seed, wrap_loss in (('both', rank, True), ('student', rank, False), ('same_start', 0, False)):
        messages = []
        handler = logging.Handler()
        handler.emit = lambda record: messages.append(record.getMessage())
        logging.getLogger('timm_sscl').addHandler(handler)
        student, sscl = _models(seed)
        model, loss = DDP(student), DDP(sscl) if wrap_loss else sscl
        optimizer = torch.optim.SGD([*student.parameters(), *sscl.parameters()], lr=.1)
        for _ in range(3):
            x = torch.randn(6, 3, 8, 8, dtype=torch.float64) * (1 + rank)
            (model(x).square().mean() + loss(x)).backward()
            optimizer.step()
        logging.getLogger('timm_sscl').removeHandler(handler)
        said[name] = sum('wrap the loss' in message for message in messages)
    return said


def test_a_loss_that_is_not_wrapped_says_so(tmp_path):
    for said in run_processes(_warnings_on_a_process, 2, tmp_path):
        assert said['both'] == 0 and said['student'] == 1
        # the processes' projections start alike and get the gradient of their own rows, summed over the processes
        assert said['same_start'] == 1
