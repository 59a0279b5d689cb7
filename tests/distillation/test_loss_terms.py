"""What a loss of a user's own may return and read, and that it leaves the step of the other losses as it is."""
import copy

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

import timm_sscl  # noqa: F401  registers the spiking_ names
from timm_sscl import SSCLTask, register_loss, unregister_loss
from timm_sscl.distillation.loss_terms import WrongLoss


def _net():
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 5))


def _batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 3, 2, 2, generator=generator), torch.arange(6) % 5


def _run(loss, student=None, calls=1, **needs):
    """Results of a task of one loss, at a weight of 1."""
    register_loss('test_det', **needs)(loss)
    try:
        task = SSCLTask(student or _net(), None, {'test_det': 1.}, verbose=False).train()
        return [task(*_batch()) for _ in range(calls)]
    finally:
        unregister_loss('test_det')


@pytest.mark.parametrize('loss, words', [
    (lambda step: step.logits.square().mean(1), r'a tensor of torch.float32 and shape \(6,\)'),
    (lambda step: step.logits.mean()[None], r'shape \(1,\)'),
    (lambda step: (step.logits > 0).sum(), r'a tensor of torch.int64 and shape \(\)'),
    (lambda step: step.logits.mean().to(torch.complex64), 'torch.complex64'),
    (lambda step: 0.5, r'0.5 \(float\)'), (lambda step: None, 'None'), (lambda step: [step.logits.mean()], 'a list'),
])
def test_a_loss_returns_a_number_of_its_own_type(loss, words):
    with pytest.raises(WrongLoss, match=f"loss 'test_det' returns .*{words}.*must return a 0-d floating"):
        _run(loss)


@pytest.mark.parametrize('loss', [
    lambda step: step.logits.detach().mean(), lambda step: (step.logits > 0).float().mean() + 1,
    lambda step: torch.tensor(3.)])
def test_a_loss_without_a_gradient_is_refused(loss):
    with pytest.raises(WrongLoss, match="loss 'test_det' has no gradient, so it would train nothing"):
        _run(loss)
    frozen = _net().requires_grad_(False)  # nothing is trained: there is no gradient to lose
    assert torch.isfinite(_run(loss, student=frozen)[0]['loss'])
    with torch.no_grad():
        assert torch.isfinite(_run(loss)[0]['loss'])


def test_a_loss_that_is_turned_off_is_said_once(caplog):
    results = _run(lambda step: step.logits.new_zeros(()), calls=3)
    assert caplog.text.count("Loss 'test_det' is 0 without a gradient: it trains nothing") == 1
    assert all(r['loss'] == r['task_loss'] for r in results)


def test_a_loss_with_a_gradient_is_added():
    result, = _run(lambda step: step.logits.square().mean())
    expected = F.cross_entropy(result['output'], _batch()[1]) + result['output'].square().mean()
    torch.testing.assert_close(result['loss'], expected)


def _assign(step):
    step.step_logits = step.step_logits * 0
    return step.logits.mean()


def _in_list(step):
    step.student_features[0] = step.student_features[0] * 0
    return step.logits.mean()


@pytest.mark.parametrize('change, name, needs', [
    (lambda step: step.step_logits.mul_(0).mean(), 'step_logits', {}),
    (lambda step: step.step_logits[0].fill_(1.).mean(), 'step_logits', {}),
    (lambda step: step.input.add_(1.).mean() + step.logits.mean(), 'input', {}),
    (lambda step: step.target.zero_().sum() + step.logits.mean(), 'target', {}),
    (lambda step: step.teacher_logits.div_(2.).mean() + step.logits.mean(), 'teacher_logits', dict(needs_teacher=True)),
    (_assign, 'step_logits', {}), (_in_list, r'student_features\[0\]', dict(needs_features=True)),
    (lambda step: step.student_features[-1].relu_().mean(), r'student_features\[4\]', dict(needs_features=True)),
    (lambda step: step.teacher_features[1].abs_().mean() + step.logits.mean(), r'teacher_features\[1\]',
     dict(needs_features=True)),
])
def test_a_loss_that_changes_the_step_is_refused(change, name, needs):
    student, teacher = (timm.create_model('test_resnet', num_classes=5) for _ in range(2))
    register_loss('test_det', **needs)(change)
    try:
        task = SSCLTask(student, teacher, {'test_det': 1., 'kd': 1.}, verbose=False, input_size=(3, 32, 32)).train()
        with pytest.raises(WrongLoss, match=f"loss 'test_det' changes step.{name} in place.*clone"):
            task(torch.randn(6, 3, 32, 32), _batch()[1])
    finally:
        unregister_loss('test_det')


def test_a_loss_may_change_a_copy():
    def loss(step):
        return step.step_logits.clone().mul_(2).mean()

    result, = _run(loss)
    torch.testing.assert_close(result['test_det_loss'], 2 * result['output'].mean())


@pytest.mark.parametrize('loss, attribute, flag', [
    (lambda step: (step.teacher_logits - step.logits).mean(), 'teacher_logits', 'needs_teacher=True'),
    (lambda step: F.mse_loss(step.logits, step.teacher_logits), 'teacher_logits', 'needs_teacher=True'),
    (lambda step: step.teacher_logits.mean(), 'teacher_logits', 'needs_teacher=True'),
    (lambda step: sum(f.mean() for f in step.student_features), 'student_features', 'needs_features=True'),
    (lambda step: torch.stack(list(step.firing_rates.values())).mean(), 'firing_rates', 'needs_firing_rates=True'),
    (lambda step: step.teacher_head(step.logits).mean(), 'teacher_head', 'needs_teacher_head=True'),
])
def test_what_a_loss_forgot_to_ask_for_is_named(loss, attribute, flag):
    words = rf"loss 'test_det': step.{attribute} is None .*test_loss_terms.py, line \d+.*\('test_det', {flag}"
    with pytest.raises(WrongLoss, match=words):
        _run(loss)


def test_other_errors_of_a_loss_are_its_own():
    nothing = None
    for loss in (lambda step: step.logits.no_such_method(), lambda step: nothing + step.logits):
        with pytest.raises((AttributeError, TypeError)) as caught:
            _run(loss)
        assert not isinstance(caught.value, WrongLoss)


@pytest.mark.parametrize('weight', ['1', None, -1., float('nan')])
def test_a_weight_is_a_number(weight):
    with pytest.raises(ValueError, match="the weight of loss 'tet' is .*; it must be a number, 0 or more"):
        SSCLTask(_net(), None, {'tet': weight}, verbose=False)


def test_options_of_losses_that_do_not_run(caplog):
    def make(options, losses):
        return SSCLTask(_net(), None, losses, options, verbose=False)

    with pytest.raises(ValueError, match="loss 'kd' has no option 'temprature'.*Did you mean 'temperature'"):
        make({'kd': {'temprature': 3}}, {'tet': 1.})
    with pytest.raises(ValueError, match="unknown loss 'tett'.*Did you mean 'tet'"):
        make({'tett': {'mse_share': 0.1}}, {'tet': 1.})
    make({'kd': {'temperature': 3.}, 'tet': {'mse_share': 0.}}, {'tet': 1., 'kd': 0.})  # a weight of 0 turns it off
    assert not caplog.text
    make({'kd': {'temperature': 3.}}, 'none')
    assert 'loss_options: kd.temperature changes nothing, since the losses are none' in caplog.text


def test_a_copied_task_checks_as_well():
    register_loss('test_det')(lambda step: step.logits.detach().mean())
    try:
        task = copy.deepcopy(SSCLTask(_net(), None, {'test_det': 1.}, verbose=False))
        with pytest.raises(WrongLoss, match='no gradient'):
            task(*_batch())
    finally:
        unregister_loss('test_det')
