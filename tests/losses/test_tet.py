"""Per-step cross-entropy (TET) against loops, and in a task."""
import math

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import Mixup

import timm_sscl  # noqa: F401  registers the spiking_ names
from timm_sscl import SSCLTask, create_loss
from timm_sscl.losses import TrainStep, loss_needs, tet_loss
from timm_sscl.training.command_line.options import OptionError, parse_args


def _randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _reference(logits, targets, mse_share, level=1.):
    """Loops over steps and samples; targets are probabilities (B, K)."""
    cross_entropy, square, count = 0., 0., 0
    for step in logits.tolist():
        for o, y in zip(step, targets.tolist()):
            log_sum = math.log(sum(math.exp(v) for v in o))
            cross_entropy -= sum(p * (v - log_sum) for p, v in zip(y, o))
            square += sum((v - level) ** 2 for v in o)
            count += len(o)
    rows = logits.shape[0] * logits.shape[1]
    return (1 - mse_share) * cross_entropy / rows + mse_share * square / count


LABELS = torch.tensor([0, 3, 4, 1, 3, 2])


@pytest.mark.parametrize('mse_share', [0., 0.05, 1.])
def test_labels_against_loops(mse_share):
    logits = 2 * _randn(3, 6, 5)
    expected = _reference(logits, F.one_hot(LABELS, 5).double(), mse_share)
    assert tet_loss(logits, LABELS, mse_share).item() == pytest.approx(expected, rel=1e-12)


def test_smoothing_and_soft_targets_against_loops():
    logits = 2 * _randn(3, 6, 5)
    smoothed = 0.8 * F.one_hot(LABELS, 5).double() + 0.2 / 5
    expected = _reference(logits, smoothed, 0.05)
    assert tet_loss(logits, LABELS, smoothing=0.2).item() == pytest.approx(expected, rel=1e-12)
    soft = torch.softmax(_randn(6, 5, seed=1), 1)
    expected = _reference(logits, soft, 0.05)
    for smoothing in (0., 0.2):  # mixup has smoothed them already
        assert tet_loss(logits, soft, smoothing=smoothing).item() == pytest.approx(expected, rel=1e-12)


def test_one_step_without_the_level_is_cross_entropy():
    logits = _randn(1, 6, 5)
    assert tet_loss(logits, LABELS, 0.).item() == F.cross_entropy(logits[0], LABELS).item()


def test_every_step_gets_its_own_gradient():
    """Unlike cross-entropy of the mean: a step that is right already is left alone, a wrong one is not."""
    logits = torch.zeros(2, 1, 5, dtype=torch.float64)
    logits[0, 0, 3] = 20.
    logits.requires_grad_()
    tet_loss(logits, torch.tensor([3]), 0.).backward()
    assert logits.grad[0].abs().max() < 1e-7 < 0.05 < logits.grad[1].abs().max()


@pytest.mark.parametrize('options,match', [
    (dict(mse_share=-0.1), 'mse_share=-0.1'), (dict(mse_share=1.1), 'mse_share=1.1'),
    (dict(mse_share=math.nan), 'mse_share=nan'), (dict(smoothing=1.), 'smoothing=1.0'),
    (dict(smoothing=-1.), 'smoothing=-1.0')], ids=str)
def test_options_out_of_range_raise(options, match):
    with pytest.raises(ValueError, match=match):
        create_loss('tet', **options)


def test_registered_loss_needs_no_teacher():
    assert not any(loss_needs('tet').values())
    logits = _randn(3, 6, 5)
    step = TrainStep(torch.zeros(6, 3, 8, 8), LABELS, logits, nn.Linear(2, 2))
    assert create_loss('tet', mse_share=0.3, smoothing=0.1)(step).item() == tet_loss(logits, LABELS, 0.3, 0.1).item()


def test_in_a_task_with_mixup_and_instead_of_the_task_loss():
    student = timm.create_model('spiking_test_resnet', num_classes=5, timesteps=3)
    task = SSCLTask(student, None, {'tet': 1.}, {'tet': dict(mse_share=0.)}, task_loss_weight=0., verbose=False,
                    criterion_kwargs=dict(soft_targets=True)).train()
    x, y = Mixup(mixup_alpha=1., label_smoothing=0.1, num_classes=5)(torch.randn(6, 3, 32, 32), LABELS)
    result = task(x, y)
    assert result['loss'].item() == result['tet_loss'].item()
    # each step's is at least the mean logits' (convex), and differs from it where the steps differ
    assert result['tet_loss'] > result['task_loss']
    result['loss'].backward()
    assert all(torch.isfinite(p.grad).all() for p in student.parameters())


def test_command_line():
    args, _ = parse_args(['--loss', 'sscl=0.1,tet=1', '--tet-lambda', '0.001', '--smoothing', '0.2'])
    assert args.losses == dict(sscl=0.1, tet=1.) and args.loss_options['tet'] == dict(mse_share=0.001, smoothing=0.2)
    with pytest.raises(OptionError, match="'tet'.*mse_share=2"):  # not after the teacher's training
        parse_args(['--loss', 'tet=1', '--tet-lambda', '2'])
