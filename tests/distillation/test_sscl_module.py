"""SSCLLoss as a module: copies, files, removal, parameters, and warnings about an optimizer that lacks them."""
import copy
import pickle

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.utils import ModelEmaV3

from sscl_reference import (
    BATCH_ONLY, attach, create, images_of, messages, num_hooks, outputs_of, resnets, saved_and_loaded, tapped,
    teacher_features)
from timm_sscl import SSCLLoss


# ---- copies, files, removal

def test_copy_of_the_student_is_detached():
    student, teacher = resnets()
    sscl = attach(student, teacher)
    x = images_of()
    for twin in (copy.deepcopy(student), ModelEmaV3(student).module, saved_and_loaded(student)):
        assert torch.equal(twin.eval()(x), student.eval()(x))
        student.train()
        twin.train()(x)
        with pytest.raises(RuntimeError, match='no forward'):
            sscl(x)
    student(x)
    assert torch.isfinite(sscl(x))


@pytest.mark.parametrize('duplicate', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded],
                         ids=['deepcopy', 'pickle', 'torch.save'])
def test_copy_of_the_loss_is_detached_and_says_so(duplicate):
    student, teacher = resnets()
    sscl = attach(student, teacher, **BATCH_ONLY)
    x = images_of()
    student(x)
    sscl(x)
    twin = duplicate(sscl)
    student(x)
    with pytest.raises(RuntimeError, match='copy'):
        twin(x)
    with outputs_of(*tapped(student)) as features:
        student(x)
    value = sscl(x)  # the original goes on
    assert twin.from_features(features, teacher_features(teacher, x)).item() == value.item()
    assert all(torch.equal(v, twin.state_dict()[k]) for k, v in sscl.state_dict().items())


def test_close_removes_every_hook():
    student, teacher = resnets()
    before = num_hooks(student), num_hooks(teacher)
    sscl = attach(student, teacher)
    assert num_hooks(student) > before[0] and num_hooks(teacher) > before[1]
    x = images_of()
    student(x)
    sscl.close()
    assert (num_hooks(student), num_hooks(teacher)) == before == (0, 0)
    with pytest.raises(RuntimeError, match='removed'):
        sscl(x)
    student(x)
    with pytest.raises(RuntimeError, match='removed'):
        sscl(x)
    sscl.close()  # twice does no harm


def test_construction_leaves_nothing_but_hooks():
    student, teacher = resnets()
    student.layer2.eval()
    state = {k: v.clone() for m in (student, teacher) for k, v in m.state_dict().items()}
    modes = [m.training for m in student.modules()]
    rng = torch.get_rng_state()
    SSCLLoss(student, teacher)
    assert torch.equal(torch.get_rng_state(), rng)
    assert [m.training for m in student.modules()] == modes
    assert all(torch.equal(v, state[k]) for m in (teacher, student) for k, v in m.state_dict().items()
               if m is teacher or k in student.state_dict())
    assert all(p.requires_grad and p.grad is None for p in student.parameters())


def test_two_losses_on_one_student():
    student, teacher = resnets()
    first = attach(student, teacher, taps=['layer1', 'layer3'], **BATCH_ONLY)
    second = attach(student, teacher, taps=['layer3', 'pooled'], critic='infonce', **BATCH_ONLY)
    x, y = images_of(8, seed=0), images_of(8, seed=1)
    with outputs_of(*tapped(student)) as features:
        student(x)
    a = teacher_features(teacher, x)
    values = second(x).item(), first(x).item()
    assert values[1] == first.from_features([features[0], features[2]], [a[0], a[2]]).item()
    assert values[0] == second.from_features([features[2], features[4]], [a[2], a[4]]).item()
    first.close()
    student(y)
    assert torch.isfinite(second(y))  # closing one leaves the other
    with pytest.raises(RuntimeError):
        first(y)


def test_two_students_of_one_teacher():
    student, teacher = resnets()
    other = create('spiking_test_resnet', seed=3, layers=(2, 1, 1, 2)).train()
    first, second = attach(student, teacher, **BATCH_ONLY), attach(other, teacher, **BATCH_ONLY)
    x, y = images_of(8, seed=0), images_of(8, seed=1)
    with outputs_of(*tapped(student), *tapped(other)) as features:
        student(x)
        other(y)
    values = first(x).item(), second(y).item()
    assert values[0] == first.from_features(features[:5], teacher_features(teacher, x)).item()
    assert values[1] == second.from_features(features[5:], teacher_features(teacher, y)).item()


# ---- a module of its own

def test_student_and_teacher_are_no_submodules():
    student, teacher = resnets()
    sscl = attach(student, teacher, dim=16)
    channels = [32, 48, 192, 96, 96]
    assert sum(p.numel() for p in sscl.parameters()) == 2 * sum((c + 1) * 16 for c in channels)
    others = {id(p) for m in (student, teacher) for p in m.parameters()}
    assert not any(id(p) in others for p in sscl.parameters())
    assert not set(sscl.state_dict()) & {*student.state_dict(), *teacher.state_dict()}
    sizes = sum(v.numel() for v in sscl.state_dict().values())
    assert sizes == sum(p.numel() for p in sscl.parameters()) + 5 * 4  # and the running CKA: three terms and a weight
    modules = set(sscl.modules())
    assert student not in modules and teacher not in modules


def test_to_moves_the_teacher_and_not_the_student():
    student, teacher = resnets(dtype=torch.float32)
    sscl = SSCLLoss(student, teacher)
    sscl.to(torch.float64)
    assert {p.dtype for p in teacher.parameters()} == {p.dtype for p in sscl.parameters()} == {torch.float64}
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    nn.ModuleList([sscl]).float()  # as part of another module as well
    assert {p.dtype for p in teacher.parameters()} == {p.dtype for p in sscl.parameters()} == {torch.float32}


def test_state_dict_round_trip_keeps_projections_and_running_cka():
    student, teacher = resnets()
    sscl = attach(student, teacher, cka_floor=0.01)
    for seed in range(2):
        x = images_of(8, seed=seed)
        student(x)
        sscl(x)
    state = copy.deepcopy(sscl.state_dict())
    x = images_of(8, seed=2)
    student(x)
    value = sscl(x)
    fresh = attach(student, teacher, cka_floor=0.01)
    for p in fresh.parameters():
        nn.init.normal_(p)
    fresh.load_state_dict(state)
    student(x)
    assert fresh(x).item() == value.item()
    assert fresh.stats == sscl.stats


OPTIMIZERS = [lambda p: torch.optim.SGD(p, lr=0.01), lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
              lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True)]


def _train(student, sscl, optimizer, steps=4, accumulate=1):
    for step in range(steps):
        x = images_of(6, seed=step, dtype=torch.float32)
        (F.cross_entropy(student(x), torch.arange(6) % 5) + sscl(x)).backward()
        if (step + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize('create', OPTIMIZERS, ids=['sgd', 'foreach', 'fused'])
def test_warning_where_the_projections_are_not_trained(caplog, create):
    student, teacher = resnets(dtype=torch.float32)
    sscl = SSCLLoss(student, teacher)
    _train(student, sscl, create(student.parameters()))
    assert len(messages(caplog, 'projections')) == 1
    assert 'sscl.parameters()' in messages(caplog, 'projections')[0]


@pytest.mark.parametrize('accumulate', [1, 2])
@pytest.mark.parametrize('create', OPTIMIZERS, ids=['sgd', 'foreach', 'fused'])
def test_no_warning_where_both_are_trained(caplog, create, accumulate):
    student, teacher = resnets(dtype=torch.float32)
    sscl = SSCLLoss(student, teacher)
    _train(student, sscl, create([*student.parameters(), *sscl.parameters()]), accumulate=accumulate)
    assert not messages(caplog, 'projections')


def test_no_warning_where_nothing_is_trained_yet(caplog):
    student, teacher = resnets(dtype=torch.float32)
    sscl = SSCLLoss(student, teacher)
    _train(student, sscl, torch.optim.SGD(student.parameters(), lr=0.01), steps=3, accumulate=10)
    assert not messages(caplog, 'projections')
