"""Timm's options of the optimizer and the schedule: parameter groups, gradients and learning rates."""
from functools import partial

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.scheduler import (
    CosineLRScheduler, MultiStepLRScheduler, PlateauLRScheduler, PolyLRScheduler, StepLRScheduler, TanhLRScheduler)

from timm_options import observes
from tiny_training import Tiny, parse, rows
import train
from timm_sscl.training.steps import validation
from timm_sscl.training.datasets import create_datasets
from timm_sscl.training.steps.learning_rate import resolve_lr


# ---- optimizer

@observes('--opt', '--opt-eps', '--opt-betas', '--momentum', '--weight-decay', '--opt-kwargs')
def test_optimizer(fit):
    def group(*argv):
        optimizer = fit(argv).optimizer.optimizer
        decays = {g['weight_decay'] for g in optimizer.param_groups}
        return type(optimizer), {**optimizer.param_groups[0], 'decays': decays}
    kind, plain = group()
    assert kind is torch.optim.SGD and (plain['momentum'], plain['nesterov'], plain['decays']) == (.9, True, {0., 2e-5})
    assert group('--momentum', .5)[1]['momentum'] == .5
    assert group('--weight-decay', .3)[1]['decays'] == {0., .3}  # none for biases and norms
    assert group('--opt-kwargs', 'nesterov=False')[1]['nesterov'] is False
    kind, adamw = group('--opt', 'adamw')
    assert kind is torch.optim.AdamW and (adamw['eps'], tuple(adamw['betas'])) == (1e-8, (.9, .999))
    adamw = group('--opt', 'adamw', '--opt-eps', 1e-3, '--opt-betas', .8, .9)[1]
    assert (adamw['eps'], tuple(adamw['betas'])) == (1e-3, (.8, .9))


@observes('--layer-decay', '--layer-decay-min-scale', '--layer-decay-no-opt-scale')
def test_layer_decay(fit):
    def scales(*argv):
        run = fit(['--img-size', 32, *argv], timm.create_model('test_resnet', num_classes=10))
        names = {id(p): n for n, p in run.task.student.named_parameters()}
        return {names[id(p)]: g.get('lr_scale', 1.) for g in run.optimizer.param_groups for p in g['params']}
    assert set(scales().values()) == {1.}
    layers = ['conv1.0.weight', 'layer1.0.conv1.weight', 'layer2.0.conv1.weight', 'layer3.0.conv1.weight',
              'layer4.0.conv1.weight', 'fc.weight']
    found = scales('--layer-decay', .5)
    assert [found[name] for name in layers] == [.5 ** 5, .5 ** 4, .5 ** 3, .5 ** 2, .5, 1.]
    found = scales('--layer-decay', .5, '--layer-decay-min-scale', .2)
    assert [found[name] for name in layers] == [.2, .2, .2, .25, .5, 1.]
    found = scales('--layer-decay', .5, '--layer-decay-no-opt-scale', .2)
    assert [name in found for name in layers] == [False, False, False, True, True, True]


def gradients(run):
    """What the optimizer is given at the first step, by name."""
    found = {}
    run.optimizer.step = lambda: found.update({n: p.grad.clone() for n, p in run.task.student.named_parameters()})
    run.task.train()
    train.train_step(run, 0, next(iter(run.train_loader)))
    return found


@observes('--clip-grad', '--clip-mode')
def test_gradients_are_clipped(fit):
    plain = gradients(fit())
    norm = torch.cat([g.flatten() for g in plain.values()]).norm()
    assert norm > 0.1
    for name, grad in gradients(fit(['--clip-grad', .1])).items():
        assert torch.allclose(grad, plain[name] * .1 / norm, rtol=1e-5)  # torch adds 1e-6 to the norm
    for name, grad in gradients(fit(['--clip-grad', .01, '--clip-mode', 'value'])).items():
        assert torch.equal(grad, plain[name].clamp(-.01, .01))
    clipped, weights = gradients(fit(['--clip-grad', 1e-3, '--clip-mode', 'agc'])), dict(Tiny().named_parameters())
    for name in ('norm.weight', 'norm.bias'):  # Brock et al. 2021, Eq. 3, a vector as one unit
        most = 1e-3 * weights[name].norm().clamp(min=1e-3)
        assert torch.allclose(clipped[name], plain[name] * (most / plain[name].norm()).clamp(max=1.), rtol=1e-5)
    assert torch.equal(clipped['fc.weight'], plain['fc.weight'])  # the head is left alone
    assert not torch.equal(clipped['norm.weight'], plain['norm.weight'])


@observes('--grad-accum-steps')
def test_accumulated_steps_are_those_of_their_mean_loss(fit, monkeypatch):
    train_step = train.train_step
    datasets = create_datasets(parse(['--train-num-samples', 20]))
    argv = ['--epochs', 1, '--lr', .1, '--opt', 'momentum', '--momentum', 0, '--weight-decay', 0, '--smoothing', 0]
    for accumulated, groups in ((1, [[0], [1], [2], [3], [4]]), (2, [[0, 1], [2, 3], [4]]), (3, [[0, 1, 2], [3, 4]])):
        run, batches = fit([*argv, '--grad-accum-steps', accumulated], datasets=datasets), []
        monkeypatch.setattr(train, 'train_step', lambda training, step, batch: (
            batches.append((batch[0].clone(), batch[1])) or train_step(training, step, batch)))
        train.fit(run)
        model = Tiny()
        optimizer = torch.optim.SGD(model.parameters(), lr=.1)
        for group in groups:
            optimizer.zero_grad()
            for i in group:
                (F.cross_entropy(model(batches[i][0]), batches[i][1]) / len(group)).backward()
            optimizer.step()
        assert run.num_updates == len(groups)
        for a, b in zip(run.task.student.parameters(), model.parameters()):
            assert torch.allclose(a, b, atol=1e-6)  # float32, sums in another order


# ---- schedule

def _cosine(optimizer, t_initial=6, **kwargs):
    given = dict(lr_min=0., cycle_decay=.5, warmup_lr_init=1e-5)
    return CosineLRScheduler(optimizer, t_initial, **{**given, **kwargs})


def _step(optimizer, decay_t=2., decay_rate=.1, **kwargs):
    return StepLRScheduler(optimizer, decay_t, decay_rate, warmup_lr_init=1e-5, warmup_prefix=False, **kwargs)

NOISE = ['--lr-noise', '0.2', '0.9']
STEP = ['--sched', 'step', '--decay-epochs', '2']
PLATEAU = ['--sched', 'plateau', '--patience-epochs', '1']


@pytest.mark.parametrize('argv, base, epochs, scheduler', [
    (['--sched', 'tanh'], [], 6, lambda o: TanhLRScheduler(o, 6, cycle_decay=.5)),
    (['--sched', 'poly', '--decay-rate', '2'], [], 6, lambda o: PolyLRScheduler(o, 6, power=2., cycle_decay=.5)),
    (['--sched', 'none'], [], 6, None),
    (['--epochs', '3'], [], 3, partial(_cosine, t_initial=3)),
    (['--lr', '0.3'], [], 6, _cosine),
    (['--min-lr', '0.01'], [], 6, partial(_cosine, lr_min=.01)),
    (['--lr-k-decay', '2'], [], 6, partial(_cosine, k_decay=2.)),
    (['--lr-cycle-limit', '2'], ['--epochs', '3'], 6, partial(_cosine, t_initial=3, cycle_limit=2)),
    (['--lr-cycle-mul', '2'], ['--epochs', '2', '--lr-cycle-limit', '2'], 6,
     partial(_cosine, t_initial=2, cycle_limit=2, cycle_mul=2.)),
    (['--lr-cycle-decay', '0.1'], ['--epochs', '3', '--lr-cycle-limit', '2'], 6,
     partial(_cosine, t_initial=3, cycle_limit=2, cycle_decay=.1)),
    (['--warmup-epochs', '2'], [], 6, partial(_cosine, warmup_t=2)),
    (['--warmup-lr', '0.05'], ['--warmup-epochs', '2'], 6, partial(_cosine, warmup_t=2, warmup_lr_init=.05)),
    (['--warmup-prefix'], ['--warmup-epochs', '2'], 8, partial(_cosine, warmup_t=2, warmup_prefix=True)),
    (['--cooldown-epochs', '2'], [], 8, _cosine),
    (NOISE, [], 6, partial(_cosine, noise_range_t=[1.2, 5.4])),
    (['--lr-noise-pct', '0.1'], NOISE, 6, partial(_cosine, noise_range_t=[1.2, 5.4], noise_pct=.1)),
    (['--lr-noise-std', '0.2'], NOISE, 6, partial(_cosine, noise_range_t=[1.2, 5.4], noise_std=.2)),
    (['--decay-epochs', '3'], STEP, 6, partial(_step, decay_t=3.)),
    (['--decay-rate', '0.5'], STEP, 6, partial(_step, decay_rate=.5)),
    (['--decay-milestones', '1', '4'], ['--sched', 'multistep'], 6,
     lambda o: MultiStepLRScheduler(o, [1, 4], .1, warmup_prefix=False)),
    (['--patience-epochs', '2'], PLATEAU, 6, lambda o: PlateauLRScheduler(o, .1, patience_t=2)),
    (['--sched-on-updates'], [], 6, partial(_cosine, t_initial=12, t_in_epochs=False)),
], ids=lambda x: ' '.join(x) if isinstance(x, list) else '')
@observes('--sched', '--epochs', '--lr', '--min-lr', '--lr-k-decay', '--lr-cycle-limit', '--lr-cycle-mul',
          '--lr-cycle-decay', '--warmup-epochs', '--warmup-lr', '--warmup-prefix', '--cooldown-epochs', '--lr-noise',
          '--lr-noise-pct', '--lr-noise-std', '--decay-epochs', '--decay-rate', '--decay-milestones',
          '--patience-epochs', '--sched-on-updates')
def test_learning_rates_are_those_of_timms_scheduler(argv, base, epochs, scheduler, fit, monkeypatch):
    monkeypatch.setattr(validation, 'evaluate', lambda *args: dict(loss=1., top1=50., top5=60.))

    def rates(argv):
        run = fit(['--lr', .1, '--epochs', 6, *argv])
        monkeypatch.setattr(train, 'train_step', lambda training, step, batch: _update_only(training)[1])
        train.fit(run)
        return [float(row['lr']) for row in rows(run)]

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=.3 if '--lr' in argv else .1)
    by_hand, expected = scheduler(optimizer) if scheduler else None, []
    for epoch in range(epochs):
        for update in range(2):
            if by_hand:
                by_hand.step_update(2 * epoch + update + 1)
        expected.append(optimizer.param_groups[0]['lr'])
        if by_hand:
            by_hand.step(epoch + 1, 50.)
    found = rates([*base, *argv])
    assert found == pytest.approx(expected, rel=1e-12)  # the same formulas in float64
    assert found != rates(base)


def _update_only(run):
    """A step that trains nothing but counts."""
    run.num_updates += 1
    if run.scheduler is not None:
        run.scheduler.step_update(num_updates=run.num_updates, metric=None)
    return 4, False


@observes('--lr-base', '--lr-base-size', '--lr-base-scale')
def test_learning_rate_follows_the_global_batch():
    def lr(*argv, processes=2):
        return resolve_lr(parse(['--batch-size', 32, '--grad-accum-steps', 2, *argv]), processes)
    assert lr() == pytest.approx(.1 * 128 / 256)
    assert lr('--lr-base', .5) == pytest.approx(.5 * 128 / 256)
    assert lr('--lr-base-size', 512) == pytest.approx(.1 * 128 / 512)
    assert lr('--lr-base-scale', 'sqrt') == lr('--opt', 'adamw') == lr('--opt', 'lamb') == pytest.approx(.1 * .5 ** .5)
    assert lr('--opt', 'adamw', '--lr-base-scale', 'linear') == pytest.approx(.1 * .5)
    assert lr('--lr', .7) == .7
