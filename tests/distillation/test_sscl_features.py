"""SSCLLoss always takes the features of this step, also under gradient checkpointing, and keeps nothing alive."""
import copy
import gc
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3

from sscl_reference import (
    BATCH_ONLY, T, attach, create, gradients, hsic_terms, images_of, outputs_of, resnets, rows, tapped,
    teacher_features)


# ---- always this step's features

class _Disturb:
    """What happens in loops between student(x) and sscl(x)."""

    @staticmethod
    def nothing(student, teacher, ema):
        pass

    @staticmethod
    def validation(student, teacher, ema):
        student.eval()
        with torch.no_grad():
            student(images_of(5, seed=7))
        student.train()

    @staticmethod
    def evaluation_mode_with_gradients(student, teacher, ema):
        student.eval()
        student(images_of(5, seed=7))
        student.train()

    @staticmethod
    def training_mode_without_gradients(student, teacher, ema):
        with torch.no_grad():
            student(images_of(5, seed=7))

    @staticmethod
    def ema_copy_in_training_mode(student, teacher, ema):
        ema.module.train()
        ema.module(images_of(8, seed=7))
        ema.update(student)

    @staticmethod
    def copy_made_now(student, teacher, ema):
        copy.deepcopy(student).train()(images_of(8, seed=7))

    @staticmethod
    def second_training_forward(student, teacher, ema):
        student(images_of(8, seed=7))

    @staticmethod
    def second_training_forward_of_another_size(student, teacher, ema):
        student(images_of(3, seed=7))

    @staticmethod
    def teacher_on_other_images(student, teacher, ema):
        with torch.no_grad():
            teacher(images_of(8, seed=7))

    @staticmethod
    def teacher_in_training_mode(student, teacher, ema):
        teacher.train()

    @staticmethod
    def forward_that_fails(student, teacher, ema):
        with pytest.raises(RuntimeError):
            student(torch.zeros(2, 7, 32, 32, dtype=torch.float64))

    @staticmethod
    def part_of_the_student(student, teacher, ema):
        student.forward_features(images_of(8, seed=7))
        with student.time_folded():
            student.layer4[-1](torch.zeros(4, 96, 2, 2, dtype=torch.float64))


@pytest.mark.parametrize('name', [name for name in vars(_Disturb) if not name.startswith('_')])
def test_nothing_between_the_two_lines_changes_the_features(name):
    student, teacher = resnets()
    sscl = attach(student, teacher, **BATCH_ONLY)
    ema = ModelEmaV3(student, decay=0.5)
    x = images_of()
    a = teacher_features(teacher, x)
    other = sscl.from_features(_features_of(student, images_of(8, seed=7)), a).item()
    with outputs_of(*tapped(student)) as features:
        student(x)
    features = list(features)
    getattr(_Disturb, name)(student, teacher, ema)
    value = sscl(x)
    expected = sscl.from_features(features, a)
    assert value.item() == expected.item()
    assert abs(value.item() - other) > 1e-3  # the disturbance's features would have shown
    value.backward(retain_graph=True)
    grads = [g.clone() for g in gradients(student) if g is not None]
    student.zero_grad()
    expected.backward()
    assert grads and all(torch.equal(g, e) for g, e in zip(grads, [g for g in gradients(student) if g is not None]))


def _features_of(student, x):
    """Training features of a copy, so that the student itself has not run."""
    twin = copy.deepcopy(student).train()
    with outputs_of(*tapped(twin)) as seen:
        twin(x)
    return seen


def test_second_call_without_a_forward_raises():
    student, teacher = resnets()
    sscl = attach(student, teacher)
    x = images_of()
    student(x)
    sscl(x)
    with pytest.raises(RuntimeError, match='no forward'):
        sscl(x)


def test_call_before_any_forward_raises():
    student, teacher = resnets()
    with pytest.raises(RuntimeError, match='no forward'):
        attach(student, teacher)(images_of())


def test_forward_in_evaluation_mode_is_no_training_step():
    student, teacher = resnets()
    sscl = attach(student, teacher)
    x = images_of()
    student.eval()
    student(x)
    with pytest.raises(RuntimeError, match='training'):
        sscl(x)


def test_images_that_the_student_did_not_see_raise():
    student, teacher = resnets()
    sscl = attach(student, teacher)
    student(images_of(8, seed=0))
    with pytest.raises(RuntimeError, match='not on this input'):
        sscl(images_of(8, seed=1))


def test_images_changed_in_place_after_the_student_raise():
    # the student saw the old content, the teacher would see the new
    student, teacher = resnets()
    sscl = attach(student, teacher)
    x = images_of(8, seed=0)
    student(x)
    x.copy_(images_of(8, seed=1))
    with pytest.raises(RuntimeError):
        sscl(x)


def test_step_without_the_loss_is_forgotten():
    student, teacher = resnets()
    sscl = attach(student, teacher, **BATCH_ONLY)
    student(images_of(8, seed=1))
    x = images_of(8, seed=2)
    with outputs_of(*tapped(student)) as features:
        student(x)
    assert sscl(x).item() == sscl.from_features(features, teacher_features(teacher, x)).item()


@pytest.mark.parametrize('reuse', ['same images', 'same buffer'])
def test_step_without_the_loss_on_the_same_tensor_is_forgotten(reuse):
    # a loss taken every second step, on one overfitted batch or out of a buffer that the loader fills again
    student, teacher = resnets()
    sscl = attach(student, teacher, **BATCH_ONLY)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    x = images_of(8, seed=1)
    student(x).square().mean().backward()
    optimizer.step()
    if reuse == 'same buffer':
        x.copy_(images_of(8, seed=2))
    with outputs_of(*tapped(student)) as features:
        student(x)
    assert sscl(x).item() == sscl.from_features(features, teacher_features(teacher, x)).item()


def test_equal_values_in_another_tensor_are_accepted():
    student, teacher = resnets()
    sscl = attach(student, teacher, **BATCH_ONLY)
    x = images_of()
    student(x)
    value = sscl(x.clone()).item()
    student(x=x)  # by keyword
    assert sscl(x).item() == value


def test_teacher_of_another_normalisation():
    student, teacher = resnets()
    sscl = attach(student, teacher, **BATCH_ONLY)
    x = images_of()
    shifted = (x - 0.5) / 2
    with outputs_of(*tapped(student)) as features:
        student(x)
    value = sscl(x, teacher_input=shifted).item()
    assert value == sscl.from_features(features, teacher_features(teacher, shifted)).item()
    assert value != sscl.from_features(features, teacher_features(teacher, x)).item()


def test_spiking_teacher_and_event_frames():
    student, _ = resnets()
    teacher = create('spiking_test_resnet', seed=1, layers=(2, 1, 1, 2))
    sscl = attach(student, teacher, **BATCH_ONLY)
    x = torch.stack([images_of(8, seed=0), images_of(8, seed=1)], 1)  # (B, T, C, H, W)
    with outputs_of(*tapped(student)) as features:
        student(x)
    a = teacher_features(teacher, x)
    assert sscl(x).item() == sscl.from_features(features, a).item()
    terms = hsic_terms(rows(features[1], T), rows(a[1], T))
    # a float32 statistic
    assert sscl.stats['layer2']['cka'] == pytest.approx(terms[0] / math.sqrt(terms[1] * terms[2]), rel=1e-5, abs=1e-6)


# ---- gradient checkpointing

def _checkpointed_pair(family):
    if family == 'resnet':
        return resnets()
    return create('spiking_test_vit', img_size=32).train(), create('test_vit', img_size=32)


@pytest.mark.parametrize('reentrant', [False, True])
@pytest.mark.parametrize('family', ['resnet', 'vit'])
def test_gradient_checkpointing(family, reentrant, set_reentrant):
    set_reentrant(reentrant)
    results = []
    for checkpointing in (False, True):
        student, teacher = _checkpointed_pair(family)
        sscl = attach(student, teacher, cka_floor=0.05)
        student.set_grad_checkpointing(checkpointing)
        steps = []
        for step in range(3):
            x = images_of(8, seed=step)
            loss = F.cross_entropy(student(x), torch.arange(8) % 5) + sscl(x)
            student.zero_grad()
            sscl.zero_grad()
            loss.backward()  # recomputes the blocks, whose hooks fire again
            steps.append((loss.item(), [g.clone() for g in gradients(student, sscl) if g is not None]))
        with pytest.raises(RuntimeError, match='no forward'):  # the recomputation has left no record
            sscl(x)
        results.append(steps)
    for (loss, grads), (checkpointed_loss, checkpointed_grads) in zip(*results):
        assert loss == checkpointed_loss
        assert len(grads) == len(checkpointed_grads) > 20
        for g, c in zip(grads, checkpointed_grads):
            torch.testing.assert_close(c, g, rtol=1e-9, atol=1e-12)  # the same terms, added in another order


# ---- nothing kept alive

def _references_in(module):
    """Weak references to what a module returns, and the hook's handle."""
    references = []
    handle = module.register_forward_hook(lambda _m, _a, out: references.append(weakref.ref(out)))
    return references, handle


def _alive(references):
    gc.collect()
    return [r for r in references if r() is not None]


def test_step_leaves_no_graph_behind():
    student, teacher = resnets()
    sscl = attach(student, teacher)
    references = [
        r for m in (student.layer1[-1], student.layer4[-1], teacher.layer2[-1]) for r in [_references_in(m)[0]]]
    x = images_of()
    student(x)
    assert all(_alive(r) for r in references[:2])  # held for the loss to come
    loss = sscl(x)
    loss.backward()
    del loss
    assert all(len(r) == 1 for r in references)
    assert not any(_alive(r) for r in references)
    assert sscl.stats  # which stay


def test_forward_only_loss_leaves_no_graph_behind():
    student, teacher = resnets()
    sscl = attach(student, teacher)
    references, _ = _references_in(student.layer3[-1].conv2)  # kept by the norm behind it; spikes are kept as bits
    x = images_of()
    student(x)
    loss = sscl(x)
    assert _alive(references)  # by the loss's graph
    del loss
    assert not _alive(references)


def test_validation_is_not_recorded():
    student, teacher = resnets()
    sscl = attach(student, teacher)
    references, _ = _references_in(student.layer1[-1])
    student.eval()
    with torch.no_grad():
        for seed in range(3):
            student(images_of(4, seed=seed))
    student(images_of(4))  # with gradients
    assert len(references) == 4 and not _alive(references)
    with pytest.raises(RuntimeError, match='no forward'):
        sscl(images_of(4))


def test_teachers_own_evaluation_is_not_held():
    student, teacher = resnets()
    sscl = attach(student, teacher)
    references, _ = _references_in(teacher.layer1[-1])
    with torch.no_grad():
        for seed in range(3):
            teacher(images_of(4, seed=seed))
    assert len(references) == 3 and not _alive(references)
    assert sscl.taps


def test_training_forwards_without_the_loss_do_not_pile_up():
    student, teacher = resnets()
    sscl = attach(student, teacher)
    references, _ = _references_in(student.layer1[-1])
    for seed in range(5):
        student(images_of(4, seed=seed))
    assert len(references) == 5 and len(_alive(references)) <= 2
    sscl.close()
    assert not _alive(references)
