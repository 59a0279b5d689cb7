"""Values that are not finite stay out of the weights, processes agree to stop, and no step waits for the device."""
import copy
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn as nn
from torch.overrides import TorchFunctionMode

import timm_sscl
import train
from processes import run_processes
from timm_sscl.training.saving.checkpoint import Position
from timm_sscl.training.exits import NonFiniteLoss, OtherProcessFailed
from timm_sscl.training.steps.guard import settle
from timm_sscl.training.steps.loop import batches_left, begin_epoch, end_step
from timm_sscl.training.steps.meters import Meters
from timm_sscl.training.command_line.options import parse_args
from timm_sscl.training.processes import create_accelerator
from timm_sscl.training.session import Session
from timm_sscl.training.saving.state import start_training
from timm_sscl.training.steps.step_check import StepCheck
from timm_sscl.training.steps.stop_vote import StopVote
from timm_sscl.training.task import create_task
from timm_sscl.distillation.teacher_input import TeacherInput
from tiny_training import BASE, loaders_of

PACKAGE, SCRIPT = Path(timm_sscl.__file__).parent, Path(train.__file__)
READS = {'item', 'tolist', '__bool__', '__float__', '__int__', '__index__', 'cpu', 'numpy', 'nonzero', 'equal'}


# ---- no step waits

class _OurReads(TorchFunctionMode):
    """Lists the reads of tensors whose calling line is this project's. HostCopy reads what has arrived on the host."""

    def __init__(self):
        self.places = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, '__name__', '') in READS:
            frame = sys._getframe(1)
            while '/torch/' in frame.f_code.co_filename:
                frame = frame.f_back
            file = Path(frame.f_code.co_filename)
            if (PACKAGE in file.parents or file == SCRIPT) and file.name != 'host_copy.py':
                self.places.append(f'{file.name}:{frame.f_lineno} {func.__name__}')
        return func(*args, **(kwargs or {}))


SSCL = [*(arg for arg in BASE if arg not in ('--distill', 'none')), '--model', 'spiking_test_resnet', '-T', '2',
        '--img-size', '32']


def _sscl_training(argv, digits, tmp_path):
    args = parse_args([*SSCL, *argv])[0]
    accelerator = create_accelerator(args)
    torch.manual_seed(0)
    student = timm.create_model('spiking_test_resnet', num_classes=10, timesteps=2)
    teacher = timm.create_model('test_resnet', num_classes=10)
    config, make_loaders = loaders_of(args, digits, student)
    session = Session(args, accelerator, make_loaders, SimpleNamespace(signal_number=None))
    task = create_task(args, student, teacher, TeacherInput(), config, torch.device('cpu'),
                       make_loaders().mixup is not None)
    return start_training(session, args, task, tmp_path, 'student', ema=args.model_ema)


@pytest.mark.parametrize('argv', [
    [], ['--clip-grad', '1', '--model-ema', '--opt', 'adamw'], ['--grad-accum-steps', '2', '--mixup', '0.5'],
    ['--amp', '--amp-dtype', 'bfloat16'], ['--loss', 'sscl=0.1,firing_rate=1,kd=1', '--pack-spikes']], ids=' '.join)
def test_whole_step_of_the_script_reads_no_number(argv, digits, tmp_path):
    training = _sscl_training(argv, digits, tmp_path)
    progress = begin_epoch(training, 0)
    steps = 0
    for epoch in range(2):  # the first call of a loss may look at its input
        training.position = Position(epoch, 0)
        for step, batch in batches_left(training):
            with _OurReads() as reads:
                stop = train.train_step(training, step, batch)
            assert epoch == 0 or not reads.places
            end_step(training, progress, step, batch[0], stop)
            steps += 1
    assert steps == 4 and math.isfinite(training.meters.means()['loss'])


def test_the_mode_sees_reads_of_the_project():
    meters = Meters()
    meters.update_stats({'a': torch.ones(())}, 1)
    with _OurReads() as reads:
        meters.means()
    assert len(reads.places) == 1 and 'meters.py' in reads.places[0] and 'tolist' in reads.places[0]


# ---- values that are not finite

class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def _bad_at(training, call, kind):
    """Let the training's cross-entropy, or its gradient alone, not be finite at its call of this number."""
    calls, criterion = [], training.task.criterion

    def bad(output, target):
        calls.append(1)
        value = criterion(output, target)
        if len(calls) != call:
            return value
        # the root's slope at 0 is infinite
        return value * math.inf if kind == 'loss' else value + (output - output.detach()).abs().sqrt().sum()
    training.task.criterion = Call(bad)
    return training


@pytest.mark.parametrize('amp', [[], ['--amp', '--amp-dtype', 'bfloat16']], ids=['', 'amp'])
@pytest.mark.parametrize('kind', ['loss', 'gradient'])
def test_values_that_are_not_finite_reach_no_weight(kind, amp, fit):
    """Without momentum and weight decay the bad step moves nothing: weights and their average are as before it."""
    argv = ['--opt', 'momentum', '--momentum', '0', '--weight-decay', '0', '--model-ema', '--model-ema-decay', '0.5',
            *amp]
    training, seen = _bad_at(fit(argv), 4, kind), []
    for epoch in range(2):
        progress = begin_epoch(training, epoch)
        for step, batch in batches_left(training):
            stop = train.train_step(training, step, batch)
            parameters = [p.detach().clone() for p in training.module.parameters()]
            seen.append((parameters, copy.deepcopy(training.task.trainable_module_ema.state_dict())))
            if len(seen) < 4:
                end_step(training, progress, step, batch[0], stop)
    words = dict(loss='the loss is not finite at epoch 2, step 2: the cross-entropy (task_loss) is inf',
                 gradient="the gradients are not finite at epoch 2, step 2: the gradients of '")[kind]
    with pytest.raises(NonFiniteLoss) as error:
        end_step(training, progress, step, batch[0], stop)  # the epoch's last
    assert words in str(error.value) and 'No value that is not finite has reached a weight' in str(error.value)
    assert ('norm.weight' in str(error.value)) == (kind == 'gradient')
    (before, average_before), (after, average) = seen[2:]
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    assert not all(torch.equal(a, b) for a, b in zip(seen[1][0], before))  # other steps do move them
    assert all(torch.equal(average[key], value) for key, value in average_before.items())
    assert not list(training.folder.glob('recovery-1-2*'))


def test_bad_step_is_reported_at_the_next_one(fit):
    training = _bad_at(fit(), 1, 'gradient')
    begin_epoch(training, 0)
    (first, batch), (second, other) = list(batches_left(training))
    train.train_step(training, first, batch)
    weights = [p.detach().clone() for p in training.module.parameters()]
    with pytest.raises(NonFiniteLoss, match='epoch 1, step 1'):
        train.train_step(training, second, other)
    assert all(torch.equal(p, w) for p, w in zip(training.module.parameters(), weights))


def test_accumulated_step_of_a_bad_loss_moves_no_weight(fit):
    training = _bad_at(fit(['--grad-accum-steps', '2']), 1, 'loss')
    weights = [p.detach().clone() for p in training.module.parameters()]
    with pytest.raises(NonFiniteLoss, match='epoch 1, step 1: .*task_loss'):
        train.fit(training)
    assert all(torch.equal(p, w) for p, w in zip(training.module.parameters(), weights))


def test_weight_that_overflows_is_named(fit):
    training = _bad_at(fit(), 2, 'loss')
    begin_epoch(training, 0)
    (first, batch), (second, other) = list(batches_left(training))
    train.train_step(training, first, batch)
    with torch.no_grad():
        training.task.student.norm.weight[0] = math.inf
    train.train_step(training, second, other)
    with pytest.raises(NonFiniteLoss, match="norm.weight' is not finite at epoch 1, step 2.*overflow"):
        settle(training)


def _check(gradient, loss=1., scale=None, terms=None):
    check, parameter = StepCheck(), nn.Parameter(torch.ones(3))
    parameter.grad = torch.tensor(gradient)
    check.start(Position(0, 4), torch.tensor(loss), terms or {}, [('w', parameter)],
                None if scale is None else torch.tensor(scale))
    return check, parameter.grad


@pytest.mark.parametrize('value', [math.inf, -math.inf, math.nan])
def test_gradients_become_zero_on_the_device(value):
    check, gradient = _check([1., value, 2.])
    assert gradient.tolist() == [0, 0, 0] and not check.ok
    bad = check.read()
    assert bad.place == (0, 4) and bad.gradients == ('w',) and not bad.loss and bad.mine
    assert check.read() is None


@pytest.mark.parametrize('gradient', [[1., -2., 3e38], [0., 0., 0.]])
def test_finite_gradients_stay_to_the_bit(gradient):
    check, got = _check(gradient)  # 3e38: a sum of squares would overflow
    assert torch.equal(got, torch.tensor(gradient)) and check.ok and check.read() is None


def test_loss_scale_that_still_falls_is_no_failure():
    """The scaler skips such a step. At a scale of 1 there is nothing left to try."""
    for scale, failed in ((1024., False), (1., True), (.5, True)):
        check, gradient = _check([math.inf, 0., 0.], scale=scale)
        assert not check.ok and gradient.tolist() == [0, 0, 0]
        assert (check.read() is not None) == failed
    check, _ = _check([math.inf, 0., 0.], loss=math.nan, scale=1024., terms=dict(a=torch.tensor(math.nan)))
    assert check.read().reason({}) == 'a is nan'


def test_sum_that_overflows_is_said():
    check, _ = _check([1., 1., 1.], loss=math.inf, terms=dict(a=torch.tensor(3e38)))
    assert check.read().reason({}) == 'the sum of its terms is inf'


# ---- several processes

def _vote(rank):
    vote, results = StopVote(), []
    for step in range(4):
        results.append(vote.read())
        vote.cast(failed=(step, rank) == (2, 0), stop=(step, rank) == (1, 1))
    return [*results, vote.read()]


def test_processes_read_the_same_result_one_step_later(tmp_path):
    for results in run_processes(_vote, 2, tmp_path):
        assert results == [(False, False), (False, False), (False, True), (True, False), (False, False)]


def test_single_process_reads_its_own_vote():
    vote = StopVote()
    assert vote.read() == (False, False)
    vote.cast(False, True)
    assert vote.read() == (False, True) and vote.read() == (False, False)


def _check_of_processes(rank):
    """Process 1 has a bad loss; both learn of it at the same step, and whose it is."""
    check = StepCheck()
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    check.start(Position(0, 0), torch.tensor(math.nan if rank else 1.), {}, [('w', parameter)])
    bad = check.read()
    return bad.loss, bad.mine, parameter.grad.tolist()


def test_bad_loss_of_one_process_stops_both(tmp_path):
    assert run_processes(_check_of_processes, 2, tmp_path) == [(True, False, [0, 0]), (True, True, [0, 0])]


def test_process_without_a_bad_value_says_so(fit):
    training = fit()
    training.check = SimpleNamespace(read=lambda: SimpleNamespace(mine=False))
    with pytest.raises(OtherProcessFailed):
        settle(training)


# ---- means of the epoch

def _stats(seed, names='abc'):
    values = torch.randn(len(names), generator=torch.Generator().manual_seed(seed))
    values[seed % len(names)] = math.nan if seed % 3 == 0 else values[0]
    return dict(zip(names, values))


def test_means_of_statistics_are_sums_of_python_floats():
    """To the bit: float64 in the order of the steps, whatever is read or restored in between."""
    sums, counts, meters = {}, {}, Meters()
    for seed in range(12):
        stats = _stats(seed, 'abc' if seed < 7 else 'bcd')
        for name, value in ((k, v.item()) for k, v in stats.items()):
            if value == value:
                sums[name] = sums.get(name, 0.) + value * 5
                counts[name] = counts.get(name, 0) + 5
        meters.update_stats(stats, 5)
        if seed % 4 == 1:
            meters.means()
        if seed % 5 == 2:
            state, meters = meters.state_dict(), Meters()
            meters.load_state_dict(state)
    assert meters.means() == {name: sums[name] / counts[name] for name in sums}
    assert meters.state_dict() == dict(sums=sums, counts=counts)
    assert all(type(count) is int for count in meters.state_dict()['counts'].values())


def test_statistic_that_was_never_defined_has_no_mean():
    meters = Meters()
    meters.update(dict(loss=torch.tensor(2.)), 3)
    meters.update_stats(dict(a=torch.tensor(math.nan), b=torch.tensor(1.)), 3)
    assert meters.means() == dict(loss=2., b=1.)
