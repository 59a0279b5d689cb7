"""What SSCLLoss refuses, and any pair of modules that it takes."""
import copy
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from sscl_reference import (
    BATCH_ONLY, Cnn, REFERENCE_TOL, attach, create, hsic_terms, images_of, nce_by_hand, num_hooks, outputs_of,
    plain, project, resnets, rows, tapped, teacher_features)
from timm_sscl import SSCLLoss


# ---- errors that say what is wrong

def test_small_batch():
    student, teacher = resnets()
    sscl = attach(student, teacher)
    x = images_of(3)
    student(x)
    with pytest.raises(ValueError, match='batch of 3.*at least 4'):
        sscl(x)
    uniform = attach(student, teacher, weighting='uniform')
    x = images_of(2)
    student(x)
    assert torch.isfinite(uniform(x))
    assert all(set(values) == {'nce', 'mi_bound', 'weight'} for values in uniform.stats.values())
    one = teacher_features(teacher, images_of(1))
    with pytest.raises(ValueError, match='at least 2'):
        uniform.from_features(one, one)


@pytest.mark.parametrize('which', ['wrapped student', 'student in place', 'part of the student', 'wrapped teacher'])
def test_compiled_model_raises(which):
    student, teacher = resnets()
    if which == 'wrapped student':
        student = torch.compile(student, backend='eager')
    elif which == 'student in place':
        student.compile(backend='eager')
    elif which == 'part of the student':
        student.layer3 = torch.compile(student.layer3, backend='eager')
    else:
        teacher = torch.compile(teacher, backend='eager')
    with pytest.raises(ValueError, match='compile'):
        SSCLLoss(student, teacher)


def test_student_as_its_own_teacher_raises():
    student, _ = resnets()
    with pytest.raises(ValueError, match='same'):
        SSCLLoss(student, student)
    assert all(p.requires_grad for p in student.parameters())  # it was not frozen first


@pytest.mark.parametrize('taps,teacher_taps,match', [
    (['layer9'], None, "'layer9'"),
    (['layer1', ''], None, "''"),
    (['layer1'], ['stage1'], "'stage1'"),
    (['layer1', 'layer2'], ['layer1'], 'pairs'),
    ([], None, 'pairs'),
    (None, ['layer1'], 'without taps'),
])
def test_taps_that_do_not_fit_raise(taps, teacher_taps, match):
    student, teacher = resnets()
    with pytest.raises(ValueError, match=match):
        SSCLLoss(student, teacher, taps=taps, teacher_taps=teacher_taps)
    assert (num_hooks(student), num_hooks(teacher)) == (0, 0)


@pytest.mark.parametrize('timesteps', [0, -1])
def test_timesteps_below_one_raise(timesteps):
    with pytest.raises(ValueError, match='timesteps'):
        SSCLLoss(*resnets(), timesteps=timesteps)


def test_wrong_timesteps_raise():
    student, teacher = resnets()
    sscl = attach(student, teacher, timesteps=3)
    x = images_of()
    student(x)
    with pytest.raises(ValueError, match='timesteps=3'):
        sscl(x)


def test_tap_that_did_not_run_is_named():
    student, teacher = resnets()
    sscl = attach(student, teacher)
    x = images_of()
    student(x)
    sscl(x)
    kept, student.layer3 = student.layer3, nn.Sequential(*[copy.deepcopy(block) for block in student.layer3])
    student(x)
    with pytest.raises(RuntimeError, match='did not run.*layer3'):
        sscl(x)  # and not the last step's tensor
    student.layer3 = kept
    student(x)
    assert torch.isfinite(sscl(x))


def test_from_features_of_another_number_raises():
    student, teacher = resnets()
    sscl = attach(student, teacher)
    a = teacher_features(teacher, images_of())
    with pytest.raises(ValueError, match='5 taps'):
        sscl.from_features(a[:4], a[:4])
    with pytest.raises(ValueError, match='5 taps'):
        sscl.from_features(a, a[:4])


class _Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.flatten = nn.Flatten()
        self.first = nn.Linear(3 * 16 * 16, 20)
        self.second = nn.Linear(20, 14)

    def forward(self, x):
        return self.second(F.relu(self.first(self.flatten(x))))


class _Tokens(nn.Module):
    """Patches as tokens (B, N, C), a transformer layer, tokens out."""

    def __init__(self, width=12):
        super().__init__()
        self.patch = nn.Conv2d(3, width, 8, 8)
        self.layer = nn.TransformerEncoderLayer(width, 2, 16, dropout=0., batch_first=True)
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        return self.head(self.layer(self.patch(x).flatten(2).mT).mean(1))


def _plain_value(sscl, s, a, weighting='uniform'):
    return sum(nce_by_hand(project(u, 1, g), project(v, 1, h), 'infonce')
               for u, v, g, h in zip(s, a, sscl.criterion.g_student, sscl.criterion.g_teacher))


def test_plain_modules_of_different_architecture():
    student, teacher = plain(Cnn, 0).train(), plain(_Mlp, 1)
    sscl = attach(student, teacher, taps=['stem', 'body', 'neck'], teacher_taps=['first', 'second', 'second'],
                   weighting='uniform', input_size=None)
    assert [tuple(g.weight.shape) for g in sscl.criterion.g_student] == [(128, 6), (128, 12), (128, 10)]
    assert [tuple(g.weight.shape) for g in sscl.criterion.g_teacher] == [(128, 20), (128, 14), (128, 14)]
    x = images_of(8, size=16)
    with outputs_of(student.stem, student.body, student.neck) as s:
        student(x)
    value = sscl(x)
    with outputs_of(teacher.first, teacher.second, teacher.second) as a:
        teacher(x)
    a = [a[0], a[2], a[2]]
    assert value.item() == pytest.approx(_plain_value(sscl, s, a), **REFERENCE_TOL)
    assert sscl.from_features(s, a).item() == value.item()
    value.backward()
    assert student.stem.weight.grad.abs().sum() > 0 and student.head.weight.grad is None
    assert list(sscl.stats) == ['stem', 'body', 'neck']


def test_token_features_of_plain_modules():
    student, teacher = plain(_Tokens, 0).train(), plain(Cnn, 1)
    sscl = attach(student, teacher, taps=['layer'], teacher_taps=['body'], cka_floor=1e-3)
    x = images_of(8, size=16)
    with outputs_of(student.layer) as s:
        student(x)
    value = sscl(x)
    with torch.no_grad(), outputs_of(teacher.body) as a:
        teacher(x)
    assert s[0].shape == (8, 4, 12)
    nce = _plain_value(sscl, [s[0].mT], a)
    terms = hsic_terms(rows(s[0], 1), rows(a[0], 1))
    cka = terms[0] / math.sqrt(terms[1] * terms[2])
    assert cka > 0.01  # above the floor
    assert value.item() == pytest.approx(nce / cka, **REFERENCE_TOL)


def test_sequential_networks_and_a_single_name():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Sequential(nn.Linear(9, 6), nn.Tanh())).double()
        teacher = nn.Sequential(nn.Linear(7, 11), nn.Tanh()).double()
    sscl = attach(student, teacher, taps='2', teacher_taps='1', weighting='uniform')
    x = torch.randn(6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = student(x)
    with torch.no_grad():
        expected = _plain_value(sscl, [out], [teacher(x)])
    assert sscl(x).item() == pytest.approx(expected, **REFERENCE_TOL)


def test_different_timm_architectures_by_default():
    student = create('spiking_test_resnet').train()
    teacher = create('test_convnext', seed=1)
    sscl = attach(student, teacher, **BATCH_ONLY)
    x = images_of()
    with outputs_of(*tapped(student)) as s:
        student(x)
    with torch.no_grad(), outputs_of(*teacher.stages, teacher.head.flatten) as a:
        teacher.eval()(x)
    assert sscl(x).item() == sscl.from_features(s, a).item()
    assert [g.in_features for g in sscl.criterion.g_teacher] == [24, 32, 48, 64, 64]


def test_fewer_stages_pair_by_relative_depth():
    student = create('spiking_test_resnet').train()
    teacher = create('test_vit', seed=1, img_size=32, depth=2)
    sscl = attach(student, teacher)
    assert [tap.name for tap in sscl.taps] == ['layer2', 'layer4', 'pooled']
    x = images_of()
    student(x)
    assert torch.isfinite(sscl(x))
    assert [g.in_features for g in sscl.criterion.g_student] == [48, 96, 96]
