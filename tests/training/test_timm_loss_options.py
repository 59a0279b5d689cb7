"""Timm's options of the loss, of mixup, of distillation and of the weights' moving average."""
import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.task import LogitDistillationTask
from timm.task.task import TrainingTask

from timm_options import observes
from tiny_training import BASE, Tiny, loaders_of, parse, rows, task_of
import train
from timm_sscl.training.command_line.options import OptionError, parse_args
from timm_sscl.training.teachers.teacher import teacher_name


# ---- loss, mixup, distillation

def criterion_of(argv):
    return task_of(parse(argv), Tiny()).criterion


def _bce(logits, target, reduce=torch.mean, weight=1.):
    p = torch.sigmoid(logits.double())
    terms = -(weight * target * p.log() + (1 - target) * (1 - p).log())
    return reduce(terms) if reduce is torch.mean else terms.sum(-1).mean()


@pytest.mark.parametrize('argv, loss', [
    (['--smoothing', '0'], lambda z, y: F.nll_loss(z.double().log_softmax(-1), y)),
    (['--smoothing', '0.3'], lambda z, y: -((F.one_hot(y, 10) * .7 + .03) * z.double().log_softmax(-1)).sum(-1).mean()),
    (['--bce-loss'], lambda z, y: _bce(z, F.one_hot(y, 10) * .9 + .01)),
    (['--bce-loss', '--bce-sum'], lambda z, y: _bce(z, F.one_hot(y, 10) * .9 + .01, reduce=None)),
    (['--bce-loss', '--bce-pos-weight', '3'], lambda z, y: _bce(z, F.one_hot(y, 10) * .9 + .01, weight=3.)),
    (['--bce-loss', '--bce-target-thresh', '0.2'], lambda z, y: _bce(z, F.one_hot(y, 10).double())),
    (['--mixup', '1'], lambda z, y: -(F.one_hot(y, 10) * z.double().log_softmax(-1)).sum(-1).mean()),
], ids=lambda x: ' '.join(x) if isinstance(x, list) else '')
@observes('--smoothing', '--bce-loss', '--bce-sum', '--bce-pos-weight', '--bce-target-thresh')
def test_classification_loss(argv, loss):
    logits, labels = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)), torch.arange(6)
    target = F.one_hot(labels, 10).float() if '--mixup' in argv else labels
    found = criterion_of(argv)(logits, target)
    assert found.item() == pytest.approx(loss(logits, labels).item(), rel=1e-5)  # float32 against float64
    others = [criterion_of(a)(logits, labels).item() for a in ([], ['--bce-loss']) if a != argv]
    assert all(abs(found.item() - other) > 1e-4 for other in others)


def mixed(argv, digits):
    """A batch of four constant images before and after, with its targets."""
    mixup = loaders_of(parse(argv), digits)[1]().mixup
    x = torch.arange(1., 5.)[:, None, None, None].expand(4, 3, 8, 8).clone()
    np.random.seed(3)
    return x.clone(), *mixup(x, torch.arange(4))


@observes('--mixup', '--cutmix', '--cutmix-minmax', '--mixup-prob', '--mixup-switch-prob', '--mixup-mode')
def test_mixup_and_cutmix(digits):
    assert loaders_of(parse([]), digits)[1]().mixup is None
    smoothed = .9 * torch.eye(4, 10) + .01

    x, mix, target = mixed(['--mixup', 1], digits)
    lam = (target[0, 0] - .01) / .9
    assert 0 < lam < 1 and torch.allclose(target, lam * smoothed + (1 - lam) * smoothed.flip(0), atol=1e-6)
    assert torch.allclose(mix, lam * x + (1 - lam) * x.flip(0), atol=1e-5)

    for argv in (['--cutmix', 1], ['--cutmix', 1, '--mixup', 1, '--mixup-switch-prob', 1]):
        x, mix, target = mixed(argv, digits)
        kept = (mix == x).float().mean()
        assert ((mix == x) | (mix == x.flip(0))).all() and 0 < kept < 1
        assert torch.allclose(target, kept * smoothed + (1 - kept) * smoothed.flip(0), atol=1e-6)
    x, mix, _ = mixed(['--cutmix', 1, '--mixup', 1, '--mixup-switch-prob', 0], digits)
    assert not ((mix == x) | (mix == x.flip(0))).all()  # mixup

    x, mix, _ = mixed(['--cutmix-minmax', .5, .7], digits)  # a box of 4 x 4 in 8 x 8
    assert (mix != x).float().mean() == .25
    x, mix, target = mixed(['--mixup', 1, '--mixup-prob', 0], digits)
    assert torch.equal(mix, x) and torch.allclose(target, smoothed)
    shares = mixed(['--mixup', 1, '--mixup-mode', 'elem'], digits)[2].max(-1).values
    assert len(set(mixed(['--mixup', 1], digits)[2].max(-1).values.tolist())) == 1 < len(set(shares.tolist()))


@observes('--mixup-off-epoch')
def test_mixup_ends_at_its_epoch(fit, monkeypatch):
    for argv, expected in (([], [True] * 3), (['--mixup-off-epoch', 2], [True, True, False])):
        run, seen = fit(['--mixup', 1, '--epochs', 3, *argv]), []
        monkeypatch.setattr(train, 'train_step', lambda training, *_: seen.append(training.mixup.mixup_enabled))
        train.fit(run)
        assert seen[::2] == expected


@pytest.mark.parametrize('argv', [
    [], ['--kd-temperature', '2'], ['--distill-loss-weight', '3'], ['--task-loss-weight', '0.3'],
    ['--distill-loss-weight', '3', '--task-loss-weight', '0.3'], ['--kd-loss-type', 'kl', '--kd-distill-type', 'logit'],
], ids=' '.join)
@observes('--kd-model-name', '--kd-temperature', '--distill-loss-weight', '--task-loss-weight', '--kd-loss-type',
          '--kd-distill-type')
def test_kd_options_are_timms_logit_distillation(argv):
    args = parse_args([*BASE[:4], '--num-classes', '10', '--kd-model-name', 'test_vit', *argv])[0]
    assert teacher_name(args) == 'test_vit' and list(args.losses) == ['kd']
    model, teacher = Tiny(0), Tiny(1)
    task = task_of(args, model, teacher)
    given = {a[2:].replace('-', '_'): float(v) for a, v in zip(argv[::2], argv[1::2]) if 'type' not in a}
    timms = LogitDistillationTask(
        copy.deepcopy(model), teacher, criterion_kwargs=dict(smoothing=.1), temperature=given.pop('kd_temperature', 4.),
        verbose=False, **given)
    x, y = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(6)
    assert task(x, y)['loss'].item() == pytest.approx(timms.train()(x, y)['loss'].item(), rel=1e-5)  # float32
    for refused in (['--kd-distill-type', 'feature'], ['--kd-loss-type', 'mse']):
        with pytest.raises(OptionError, match=refused[1]):
            parse(refused)


# ---- weights' moving average

@observes('--model-ema', '--model-ema-decay', '--model-ema-warmup', '--model-ema-force-cpu')
def test_model_ema(fit, monkeypatch):
    def averaged(*argv):
        run, weights = fit(['--model-ema', '--model-ema-decay', .7, '--lr', .1, *argv]), []
        update = run.task.update_ema
        run.task.update_ema = lambda step: weights.append(run.task.student.fc.weight.detach().clone()) or update(step)
        train.fit(run)
        return run, weights, run.task.get_eval_model(ema=True).fc.weight
    for argv, decays in (((), [0., .7, .7, .7]), (('--model-ema-decay', .2), [0., .2, .2, .2]),
                         (('--model-ema-warmup',), [0., *(min(.7, 1 - (1 + n) ** (-2 / 3)) for n in (1, 2, 3))])):
        run, weights, found = averaged(*argv)
        expected = torch.zeros(10, 192)
        for decay, weight in zip(decays, weights):
            expected = decay * expected + (1 - decay) * weight
        assert len(weights) == 4 and torch.allclose(found, expected, atol=1e-6)  # float32
        assert 'eval_top1_ema' in rows(run)[0] and not torch.equal(found, weights[-1])
    run, _, _ = averaged('--model-ema-force-cpu')
    assert 'eval_top1_ema' not in rows(run)[0]  # as in timm, which keeps it off the device and unvalidated
    devices = []
    setup = TrainingTask.setup_ema
    monkeypatch.setattr(
        TrainingTask, 'setup_ema', lambda task, device, **kw: devices.append(device) or setup(task, **kw))
    for argv in ([], ['--model-ema-force-cpu']):
        fit(['--model-ema', *argv])
    assert devices == [None, torch.device('cpu')]
    assert not fit([]).task.has_ema()
