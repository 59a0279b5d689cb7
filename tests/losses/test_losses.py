"""Losses by name, distillation on the logits, and the arguments of the SSCL criterion."""
import logging
import math

import pytest
import timm
import torch
import torch.nn as nn

import timm_sscl  # noqa: F401  registers the spiking_ names
from timm_sscl import SSCLTask, create_loss, list_losses, register_loss
from timm_sscl.losses import KDLoss, SSCLCriterion, TrainStep, kd_loss, loss_needs


def _randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _step(logits, teacher_logits=None, **kwargs):
    """A training step whose per-step logits are (T, B, K)."""
    return TrainStep(torch.zeros(logits.shape[1], 3, 8, 8), torch.zeros(logits.shape[1], dtype=torch.long), logits,
                     nn.Linear(2, 2), teacher_logits, **kwargs)


def _task(losses, teacher=True, **kwargs):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student = timm.create_model('spiking_test_resnet', num_classes=5, timesteps=2)
        teacher = timm.create_model('test_resnet', num_classes=5) if teacher else None
    return SSCLTask(student, teacher, losses, verbose=False, **kwargs)


# ---- the registry

def test_built_in_losses():
    names = list_losses()
    assert {'sscl', 'contrastive', 'kd'} <= set(names)
    assert names == sorted(names)
    assert loss_needs('sscl') == loss_needs('contrastive') == dict(
        teacher=True, features=True, shapes=True, firing_rates=False)
    assert loss_needs('kd') == dict(teacher=True, features=False, shapes=False, firing_rates=False)


def test_function_as_a_loss():
    @register_loss('test_norm')
    def norm(step):
        return step.logits.square().mean()

    logits = _randn(2, 3, 5)
    loss = create_loss('test_norm')
    assert isinstance(loss, nn.Module) and 'test_norm' in list_losses()
    assert loss_needs('test_norm') == dict(teacher=False, features=False, shapes=False, firing_rates=False)
    assert loss(_step(logits)).item() == ((logits[0] + logits[1]) / 2).square().mean().item()
    assert norm(_step(logits)) is not None  # the function is still the user's
    with pytest.raises(ValueError, match='test_norm.*no options.*scale'):
        create_loss('test_norm', scale=2)


def test_class_as_a_loss_with_options():
    @register_loss('test_margin', needs_teacher=True)
    class Margin(nn.Module):
        def __init__(self, margin=1.):
            super().__init__()
            self.margin = margin

        def forward(self, step):
            return (step.logits - step.teacher_logits - self.margin).mean()

    assert isinstance(create_loss('test_margin'), Margin)
    assert loss_needs('test_margin') == dict(teacher=True, features=False, shapes=False, firing_rates=False)
    logits, teacher = _randn(2, 3, 5), _randn(3, 5, seed=1)
    difference = (create_loss('test_margin')(_step(logits, teacher))
                  - create_loss('test_margin', margin=3.)(_step(logits, teacher)))
    assert difference.item() == pytest.approx(2., abs=1e-12)
    with pytest.raises(ValueError, match='test_margin.*margni'):
        create_loss('test_margin', margni=2)


def test_needing_features_means_needing_the_teacher():
    register_loss('test_features', needs_features=True)(lambda step: step.student_features[0].mean())
    assert loss_needs('test_features') == dict(teacher=True, features=True, shapes=False, firing_rates=False)


def test_name_that_is_taken_raises():
    def first(step):
        return step.logits.mean()

    register_loss('test_taken')(first)
    register_loss('test_taken')(first)  # a module that is reloaded or run again registers the same object
    with pytest.raises(ValueError, match="'test_taken' is registered"):
        register_loss('test_taken')(lambda step: step.logits.sum())
    with pytest.raises(ValueError, match="'kd' is registered"):
        register_loss('kd')(first)
    assert isinstance(create_loss('kd'), KDLoss)


def test_unknown_name_raises_with_a_hint():
    with pytest.raises(ValueError, match=r"unknown loss 'scsl'.*contrastive.*kd.*sscl.*Did you mean 'sscl'"):
        create_loss('scsl')
    with pytest.raises(ValueError, match=r"unknown loss 'zzzz'") as error:
        loss_needs('zzzz')
    assert 'Did you mean' not in str(error.value)


@pytest.mark.parametrize('name,options,match', [
    ('kd', dict(temprature=2), 'temprature'),
    ('kd', dict(temperature=0), 'temperature=0'),
    ('kd', dict(temperature=math.nan), 'temperature=nan'),
    ('sscl', {}, 'names'),
    ('contrastive', dict(names=['a'], student_channels=[2], teacher_channels=[2], weighting='cka'), 'weighting'),
])
def test_options_that_do_not_fit_raise(name, options, match):
    with pytest.raises(ValueError, match=match):
        create_loss(name, **options)


# ---- a user's loss in a task

def test_users_function_in_a_task():
    @register_loss('test_rate')
    def rate(step):
        assert step.input.shape == (4, 3, 32, 32) and step.target.shape == (4,)
        assert step.teacher_logits is None and step.student_features is None
        return (step.step_logits[0] - step.step_logits[1]).square().mean() + step.student.fc.bias.square().sum()

    task = _task({'test_rate': 0.5}, teacher=False)
    result = task(_randn(4, 3, 32, 32).float(), torch.arange(4))
    assert result['loss'].item() == pytest.approx(
        result['task_loss'].item() + 0.5 * result['test_rate_loss'].item(), rel=1e-6)
    assert result['test_rate_loss'] > 0


def test_users_class_with_features_parameters_and_stats_in_a_task():
    @register_loss('test_fitnet', needs_features=True)
    class FitNet(nn.Module):
        def __init__(self, names, student_channels, teacher_channels, power=2.):
            super().__init__()
            self.names, self.power = names, power
            self.maps = nn.ModuleList(nn.Linear(s, t) for s, t in zip(student_channels, teacher_channels))
            self.stats = {}

        def forward(self, step):
            terms = [(m(s.flatten(3).mean((0, 3)) if s.ndim > 3 else s.mean(0))
                      - (a.flatten(3).mean((0, 3)) if a.ndim > 3 else a.mean(0))).abs().pow(self.power).mean()
                     for m, s, a in zip(self.maps, step.student_features, step.teacher_features)]
            self.stats = {name: {'fit': term.item()} for name, term in zip(self.names, terms)}
            return sum(terms)

    task = _task({'test_fitnet': 2., 'kd': 1.}, taps=2, loss_options={'test_fitnet': dict(power=1.)})
    result = task(_randn(4, 3, 32, 32).float(), torch.arange(4))
    assert list(task.stats) == ['layer3', 'layer4', 'pooled']
    assert sum(v['fit'] for v in task.stats.values()) == pytest.approx(result['test_fitnet_loss'].item(), rel=1e-6)
    result['loss'].backward()
    maps = [p for name, p in task.trainable_module.named_parameters() if 'maps' in name]
    assert len(maps) == 6 and all(p.grad is not None for p in maps)
    assert any('maps' in name for name in task.get_task_state()['losses'])  # in the checkpoint as well


def test_users_function_with_features_in_a_task():
    @register_loss('test_feature_mean', needs_features=True)
    def feature_mean(step):
        return sum((s.mean() - a.mean()).square() for s, a in zip(step.student_features, step.teacher_features))

    task = _task({'test_feature_mean': 1.})
    result = task(_randn(4, 3, 32, 32).float(), torch.arange(4))
    assert result['test_feature_mean_loss'] > 0


# ---- distillation on the logits

def _kd_reference(logits, teacher, temperature):
    total = 0.
    for s, a in zip(logits.tolist(), teacher.tolist()):
        p = [math.exp(v / temperature) for v in a]
        q = [math.exp(v / temperature) for v in s]
        p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
        total += sum(x * math.log(x / y) for x, y in zip(p, q))
    return total / len(logits) * temperature ** 2


@pytest.mark.parametrize('temperature', [1., 4., 10.])
def test_kd_loss_against_loops(temperature):
    logits, teacher = 3 * _randn(6, 5), 3 * _randn(6, 5, seed=1)
    # computed in float32: 1e-7 relative, some ten times that after the difference of logarithms
    assert kd_loss(logits, teacher, temperature).item() == pytest.approx(
        _kd_reference(logits, teacher, temperature), rel=1e-5)


def test_kd_loss_of_equal_logits_is_zero():
    logits = (3 * _randn(6, 5)).float().requires_grad_()
    loss = kd_loss(logits, logits.detach() + 2)  # softmax does not see a shift
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-5)  # 16 times a few float32 round-offs
    assert logits.grad.abs().max() < 1e-5


def test_kd_gradient_does_not_shrink_with_temperature():
    # softened, the loss's gradient falls like 1 / temperature^2; the factor in front holds it
    grads = []
    for temperature in (50., 100.):
        logits = _randn(6, 5).requires_grad_()
        kd_loss(logits, _randn(6, 5, seed=1), temperature).backward()
        grads.append(logits.grad)
    # the limit for high temperature is (logits - teacher, centred) / (B K)
    difference = _randn(6, 5) - _randn(6, 5, seed=1)
    limit = (difference - difference.mean(1, keepdim=True)) / 30
    for grad, temperature in zip(grads, (50., 100.)):
        # the next order is logit / temperature
        torch.testing.assert_close(grad, limit, rtol=0, atol=3 / temperature * limit.abs().max().item())
    assert grads[1].norm() / grads[0].norm() == pytest.approx(1, abs=0.05)


def test_kd_takes_the_mean_logits_and_leaves_the_teacher_alone():
    step_logits = (3 * _randn(4, 6, 5)).requires_grad_()
    teacher = (3 * _randn(6, 5, seed=1))
    loss = create_loss('kd', temperature=2.)(_step(step_logits, teacher))
    assert loss.item() == pytest.approx(_kd_reference(step_logits.detach().mean(0), teacher, 2.), rel=1e-5)
    loss.backward()
    assert all(torch.equal(g, step_logits.grad[0]) for g in step_logits.grad)  # every step alike
    assert not teacher.requires_grad


# ---- the criterion

@pytest.mark.parametrize('options,match', [
    (dict(critic='normalised'), "critic='normalised'.*normalized, literal, infonce"),
    (dict(weighting='CKA'), "weighting='CKA'.*cka, uniform"),
    (dict(cka_floor=0.), 'cka_floor=0.0'),
    (dict(cka_floor=1.5), 'cka_floor=1.5'),
    (dict(cka_floor=math.nan), 'cka_floor=nan'),
    (dict(cka_momentum=0.), 'momentum=0.0'),
    (dict(cka_momentum=1.1), 'momentum=1.1'),
    (dict(temperature=0.), 'temperature=0.0'),
    (dict(temperature=-1.), 'temperature=-1.0'),
    (dict(dim=0), 'dim=0'),
    (dict(names=['a']), '1 layers'),
    (dict(student_channels=[3]), '1 student'),
    (dict(teacher_channels=[3, 4, 5]), '3 teacher'),
    (dict(names=[], student_channels=[], teacher_channels=[]), '0 layers'),
], ids=str)
def test_criterion_arguments(options, match):
    defaults = dict(names=['a', 'b'], student_channels=[3, 4], teacher_channels=[5, 6])
    with pytest.raises(ValueError, match=match):
        SSCLCriterion(**{**defaults, **options})


def _criterion(**options):
    return SSCLCriterion(['a', 'b'], [3, 4], [5, 6], **options).double()


def _features(n=6, seed=0):
    student = [_randn(2, n, 3, 4, 4, seed=seed), _randn(2, n, 4, seed=seed + 1)]
    return student, [_randn(1, n, 5, 4, 4, seed=seed + 2), _randn(1, n, 6, seed=seed + 3)]


def test_criterion_features_that_do_not_fit_raise():
    criterion = _criterion()
    student, teacher = _features()
    assert torch.isfinite(criterion(student, teacher))
    with pytest.raises(ValueError, match='1 student and 2 teacher features for 2 layers'):
        criterion(student[:1], teacher)
    with pytest.raises(ValueError, match=r"student feature 'b'.*expected \(T, B, 4"):
        criterion([student[0], student[0]], teacher)
    with pytest.raises(ValueError, match="teacher feature 'a'"):
        criterion(student, teacher[::-1])
    with pytest.raises(ValueError, match="student feature 'a'"):
        criterion([student[0].flatten(0, 1)[:, :, 0, 0], student[1]], teacher)  # not unfolded: no time axis
    with pytest.raises(ValueError, match="'b'.*6 samples.*5"):
        criterion(student, [teacher[0], teacher[1][:, :5]])
    with pytest.raises(ValueError, match="batch of 3.*at least 4.*weighting='uniform'"):
        criterion(*_features(3))


def test_criterion_is_the_weighted_sum_and_does_not_touch_the_global_random_state():
    rng = torch.get_rng_state()
    criterion = _criterion(cka_floor=1e-3)
    assert torch.equal(torch.get_rng_state(), rng)
    loss = criterion(*_features())
    stats = criterion.stats
    # stats are float32
    assert loss.item() == pytest.approx(sum(v['weight'] * v['nce'] for v in stats.values()), rel=1e-5)
    uniform = _criterion(weighting='uniform')
    uniform.load_state_dict(criterion.state_dict())
    assert uniform(*_features()).item() == pytest.approx(sum(v['nce'] for v in stats.values()), rel=1e-5)
    assert all(v['weight'] == 1 for v in uniform.stats.values())


def test_literal_critic_is_another_loss_and_infonce_a_third():
    state = _criterion().state_dict()
    values = set()
    for critic in ('normalized', 'literal', 'infonce'):
        criterion = _criterion(critic=critic, weighting='uniform')
        criterion.load_state_dict(state)
        values.add(round(criterion(*_features()).item(), 3))
    assert len(values) == 3


def test_floor_is_reported_when_a_layer_falls_under_it(caplog):
    criterion = _criterion(cka_floor=0.5, cka_momentum=1.)
    student, teacher = _features()
    # similar to the teacher: above the floor
    alike = [teacher[0].repeat(1, 1, 1, 1, 1)[:, :, :3], teacher[1][:, :, :4]]

    def messages():
        return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]

    for _ in range(3):
        criterion(student, teacher)
    assert len(messages()) == 2 and "'a'" in messages()[0] and "'b'" in messages()[1]
    criterion(alike, teacher)
    assert all(v['cka'] > 0.5 for v in criterion.stats.values())
    criterion(student, teacher)
    assert len(messages()) == 4  # it fell again
