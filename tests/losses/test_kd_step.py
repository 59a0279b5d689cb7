"""Per-step distillation against loops, and its place in a task."""
import math

import pytest
import timm
import torch
import torch.nn as nn

import timm_sscl  # noqa: F401  registers the spiking_ names
from timm_sscl import SSCLTask, create_loss
from timm_sscl.losses import TrainStep, kd_loss, kd_step_loss, loss_needs, tet_loss
from timm_sscl.training.command_line.options import OptionError, parse_args


def _randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _softmax(logits, temperature):
    e = [math.exp(v / temperature) for v in logits]
    return [v / sum(e) for v in e]


def _reference(step_logits, teacher, temperature):
    terms = []
    for step in step_logits.tolist():
        for o, a in zip(step, teacher.tolist()):
            p, q = _softmax(a, temperature), _softmax(o, temperature)
            terms.append(sum(x * math.log(x / y) for x, y in zip(p, q)) * temperature ** 2)
    return sum(terms) / len(terms)


@pytest.mark.parametrize('temperature', [1., 3., 10.])
def test_against_loops(temperature):
    logits, teacher = 3 * _randn(4, 6, 5), 3 * _randn(6, 5, seed=1)
    # computed in float32: 1e-7 relative, some ten times that after the difference of logarithms
    assert kd_step_loss(logits, teacher, temperature).item() == pytest.approx(
        _reference(logits, teacher, temperature), rel=1e-5)


def test_equals_kd_where_the_steps_agree_and_exceeds_it_where_they_do_not():
    logits, teacher = 3 * _randn(4, 6, 5), 3 * _randn(6, 5, seed=1)
    assert kd_step_loss(logits[:1], teacher, 2.).item() == kd_loss(logits[0], teacher, 2.).item()
    assert kd_step_loss(logits[:1].expand(3, 6, 5), teacher).item() == pytest.approx(
        kd_loss(logits[0], teacher, 3.).item(), rel=1e-6)
    assert kd_step_loss(logits, teacher) > 1.1 * kd_loss(logits.mean(0), teacher, 3.)


def test_registered_loss():
    assert loss_needs('kd_step') == dict(teacher=True, features=False, shapes=False, firing_rates=False)
    logits, teacher = _randn(3, 6, 5).requires_grad_(), _randn(6, 5, seed=1)
    step = TrainStep(torch.zeros(6, 3, 8, 8), torch.zeros(6, dtype=torch.long), logits, nn.Linear(2, 2), teacher)
    loss = create_loss('kd_step', temperature=2.)(step)
    assert loss.item() == kd_step_loss(logits, teacher, 2.).item()
    loss.backward()
    assert not torch.equal(logits.grad[0], logits.grad[1])  # kd gives all steps the same
    for temperature in (0., -1., math.nan):
        with pytest.raises(ValueError, match='temperature='):
            create_loss('kd_step', temperature=temperature)


def test_first_two_terms_of_twsnn_beside_sscl():
    torch.manual_seed(0)
    student = timm.create_model('spiking_test_resnet', num_classes=5, timesteps=3)
    teacher = timm.create_model('test_resnet', num_classes=5)
    task = SSCLTask(student, teacher, {'tet': 1., 'kd_step': 0.2, 'sscl': 0.1}, {'tet': dict(mse_share=0.)},
                    task_loss_weight=0., verbose=False).train()
    x, y = torch.randn(6, 3, 32, 32), torch.arange(6) % 5
    result = task(x, y)
    step_logits = student(x, per_step=True)
    with torch.no_grad():
        teacher_logits = teacher(x)
    assert result['tet_loss'].item() == pytest.approx(tet_loss(step_logits, y, 0.).item(), rel=1e-5)  # float32
    assert result['kd_step_loss'].item() == pytest.approx(kd_step_loss(step_logits, teacher_logits).item(), rel=1e-4)
    assert result['loss'].item() == pytest.approx(
        (result['tet_loss'] + 0.2 * result['kd_step_loss'] + 0.1 * result['sscl_loss']).item(), rel=1e-6)
    result['loss'].backward()
    assert all(torch.isfinite(p.grad).all() for p in task.trainable_module.parameters())


def test_command_line():
    args, _ = parse_args(['--loss', 'sscl=0.1,kd_step=0.2', '--kd-step-temperature', '2'])
    assert args.losses == dict(sscl=0.1, kd_step=0.2) and args.loss_options['kd_step'] == dict(temperature=2.)
    with pytest.raises(OptionError, match="'kd_step'.*temperature=0"):
        parse_args(['--loss', 'kd_step=1', '--kd-step-temperature', '0'])
