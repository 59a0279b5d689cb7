"""SSCLLoss in somebody else's training loop: the features of this step, the number they give, and nothing left behind.

Networks are tiny and mostly float64; the reference value is recomputed with loops from features that the test's own
hooks collect.
"""
import copy
import gc
import io
import logging
import math
import pickle
import weakref
from contextlib import contextmanager

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.utils import ModelEmaV3

import timm_sscl  # noqa: F401  registers the spiking_ names
from timm_sscl import SSCLLoss

T = 2
STAGES = ['layer1', 'layer2', 'layer3', 'layer4']
BATCH_ONLY = dict(cka_momentum=1.)  # the loss then depends on this step's features alone


def _images(n=8, seed=0, size=32, dtype=torch.float64):
    """Noisy copies of three prototypes, so that features of two networks are similar at all."""
    generator = torch.Generator().manual_seed(seed)
    prototypes = torch.randn(3, 3, size, size, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, 3, size, size, generator=generator, dtype=torch.float64)
    return (prototypes[torch.arange(n) % 3] + 0.3 * noise).to(dtype)


def _create(name, seed=0, dtype=torch.float64, **kwargs):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if name.startswith('spiking_'):
            kwargs.setdefault('timesteps', T)
        if name.endswith('test_resnet'):
            # else a block is an identity at first, its convolutions without gradient
            kwargs.setdefault('zero_init_last', False)
        return timm.create_model(name, num_classes=5, **kwargs).to(dtype)


def _resnets(seed=0, dtype=torch.float64, layers=(2, 1, 1, 2)):
    """A spiking student in training mode and a teacher whose weights it starts from; stages 1 and 4 hold two blocks."""
    student = _create('spiking_test_resnet', seed, dtype, layers=layers).train()
    return student, _create('test_resnet', seed, dtype, layers=layers)


def _attach(student, teacher, **options):
    dtype = next(student.parameters()).dtype
    return SSCLLoss(student, teacher, **{'temperature': 0.1, **options}).to(dtype)  # as _nce's


def _tapped(model):
    return [getattr(model, stage)[-1] for stage in STAGES] + [model.global_pool]


@contextmanager
def _seen(*modules):
    """Outputs of modules during the block, by the test's own hooks; removed afterwards."""
    outputs = [None] * len(modules)
    handles = [m.register_forward_hook(lambda _m, _a, out, i=i: outputs.__setitem__(i, out))
               for i, m in enumerate(modules)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _teacher_features(teacher, x):
    with torch.no_grad(), _seen(*_tapped(teacher)) as seen:
        teacher.eval()(x)
    return seen


def _gradients(*modules):
    return [p.grad for m in modules for p in m.parameters()]


def _num_hooks(model):
    names = ('_forward_hooks', '_forward_pre_hooks', '_forward_hooks_with_kwargs', '_forward_pre_hooks_with_kwargs',
             '_forward_hooks_always_called', '_backward_hooks', '_backward_pre_hooks')
    return sum(len(getattr(m, name)) for m in model.modules() for name in names)


# ---- the reference, in loops

def _rows(feature, timesteps):
    """(T * B, ...), time-major, as a list of B vectors with time flattened in."""
    f = feature.detach().double().unflatten(0, (timesteps, -1))
    return [f[:, i].flatten() for i in range(f.shape[1])]


def _hsic(k, l):
    n = len(k)
    trace = sum(k[i][j] * l[j][i] for i in range(n) for j in range(n))
    totals = sum(map(sum, k)) * sum(map(sum, l)) / ((n - 1) * (n - 2))
    cross = sum(k[i][j] * l[j][m] for i in range(n) for j in range(n) for m in range(n)) * 2 / (n - 2)
    return (trace + totals - cross) / (n * (n - 3))


def _hsic_terms(s_rows, a_rows):
    k, l = ([[0. if i == j else float(u @ v) for j, v in enumerate(rows)] for i, u in enumerate(rows)]
            for rows in (s_rows, a_rows))
    return _hsic(k, l), _hsic(k, k), _hsic(l, l)


def _project(feature, timesteps, g):
    """Mean over time and space, the linear map, and unit length, row by row."""
    rows = []
    f = feature.detach().double().unflatten(0, (timesteps, -1))
    for i in range(f.shape[1]):
        pooled = f[:, i].flatten(2).mean(2).mean(0) if f.ndim > 3 else f[:, i].mean(0)
        v = g.weight.detach().double() @ pooled + g.bias.detach().double()
        rows.append(v / math.sqrt(float(v @ v)))
    return rows


def _nce(s, a, critic, t=0.1):
    n = len(s)
    e = [[math.exp(float(u @ v) / t) for v in a] for u in s]
    if critic == 'infonce':
        rows = [-math.log(e[i][i] / sum(e[i])) for i in range(n)]
        columns = [-math.log(e[i][i] / sum(e[j][i] for j in range(n))) for i in range(n)]
        return (sum(rows) + sum(columns)) / (2 * n)
    if critic == 'literal':
        c = n / n ** 2  # N / M, M = N^2 pairs
    else:
        c = (n - 1) * sum(e[i][j] for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    # log h and log(1 - h) of h = e / (e + c)
    return -sum(math.log(e[i][j] / (e[i][j] + c)) if i == j else math.log(c / (e[i][j] + c))
                for i in range(n) for j in range(n)) / n


def _reference(sscl, steps, critic='infonce', weighting='cka', floor=0.1, momentum=0.1):
    """Loss of the last of the steps, and per layer (cka, running cka, weight, nce); steps: (student, teacher)."""
    layers = []
    for i in range(len(steps[-1][0])):
        terms = [_hsic_terms(_rows(s[i], T), _rows(a[i], 1)) for s, a in steps]
        shares = [momentum * (1 - momentum) ** (len(steps) - 1 - step) for step in range(len(steps))]
        means = [sum(w * t[k] for w, t in zip(shares, terms)) / sum(shares) for k in range(3)]
        last = terms[-1]
        cka, running = last[0] / math.sqrt(last[1] * last[2]), means[0] / math.sqrt(means[1] * means[2])
        s, a = steps[-1][0][i], steps[-1][1][i]
        nce = _nce(_project(s, T, sscl.criterion.g_student[i]), _project(a, 1, sscl.criterion.g_teacher[i]), critic)
        weight = 1 / max(running, floor) if weighting == 'cka' else 1.
        layers.append((cka, running, weight, nce))
    return sum(weight * nce for _, _, weight, nce in layers), layers


# The reference keeps the features as they are, uncentred: float64's 1e-16 grows by the 1e6 that HSIC cancels out of its
# Gram matrices. A wrong formula would be off by 1e-3 and more.
REFERENCE_TOL = dict(rel=1e-8, abs=1e-12)


# ---- the value

@pytest.mark.parametrize('options', [
    dict(), dict(critic='literal'), dict(critic='normalized'), dict(weighting='uniform'), dict(cka_momentum=1.),
    dict(critic='literal', weighting='uniform')], ids=str)
def test_value_is_the_papers_formula(options):
    student, teacher = _resnets()
    sscl = _attach(student, teacher, cka_floor=0.02, **options)
    x = _images()
    with _seen(*_tapped(student)) as features:
        student(x)
    value = sscl(x)
    expected, layers = _reference(
        sscl, [(features, _teacher_features(teacher, x))], options.get('critic', 'infonce'),
        options.get('weighting', 'cka'), floor=0.02)
    assert value.ndim == 0
    assert value.item() == pytest.approx(expected, **REFERENCE_TOL)
    # the batch must not sit on the floor everywhere, or a wrong CKA would pass
    assert sum(cka > 0.02 for cka, *_ in layers) >= 3, layers


def test_value_over_three_steps_uses_running_means_of_the_hsic_terms():
    student, teacher = _resnets()
    sscl = _attach(student, teacher, cka_floor=0.01, cka_momentum=0.3)
    steps = []
    for step in range(3):
        x = _images(6 + step, seed=step)
        with _seen(*_tapped(student)) as features:
            student(x)
        value = sscl(x)
        steps.append((features, _teacher_features(teacher, x)))
        expected, layers = _reference(sscl, steps, floor=0.01, momentum=0.3)
        assert value.item() == pytest.approx(expected, **REFERENCE_TOL)
        for values, (cka, running, weight, nce) in zip(sscl.stats.values(), layers):
            # the statistics are reported as float32
            assert values['cka'] == pytest.approx(cka, rel=1e-5, abs=1e-6)
            assert values['cka_running'] == pytest.approx(running, rel=1e-5, abs=1e-6)
            assert values['weight'] == pytest.approx(weight, rel=1e-5)
            assert values['nce'] == pytest.approx(nce, rel=1e-5)
    assert any(abs(running - cka) > 0.01 for cka, running, *_ in layers)  # the running form is another number


def test_value_in_float32_and_temperature_and_dim():
    student, teacher = _resnets(dtype=torch.float32)
    sscl = _attach(student, teacher, weighting='uniform', temperature=0.5, dim=16)
    x = _images(dtype=torch.float32)
    with _seen(*_tapped(student)) as features:
        student(x)
    value = sscl(x)
    a = _teacher_features(teacher, x)
    expected = sum(
        _nce(_project(features[i], T, sscl.criterion.g_student[i]), _project(a[i], 1, sscl.criterion.g_teacher[i]),
             'infonce', t=0.5) for i in range(5))
    assert value.item() == pytest.approx(expected, rel=1e-5)  # float32's 1e-7 through two norms and a temperature


def test_evaluation_mode_leaves_the_running_cka_alone():
    student, teacher = _resnets()
    sscl = _attach(student, teacher)
    x, other = _images(seed=0), _images(seed=1)
    student(x)
    sscl(x)
    before = {k: v.clone() for k, v in sscl.state_dict().items()}
    running = {name: values['cka_running'] for name, values in sscl.stats.items()}
    sscl.eval()
    student(other)
    sscl(other)
    assert {name: values['cka_running'] for name, values in sscl.stats.items()} == running
    assert all(torch.equal(v, before[k]) for k, v in sscl.state_dict().items())


def test_batch_permutation_does_not_matter():
    student, teacher = _resnets()
    sscl = _attach(student, teacher, **BATCH_ONLY)
    x = _images()
    permuted = x[torch.tensor([3, 0, 7, 1, 6, 2, 5, 4])]
    values = []
    for images in (x, permuted):
        student(images)
        values.append(sscl(images).item())
    # BatchNorm's and HSIC's sums run in another order
    assert values[0] == pytest.approx(values[1], **REFERENCE_TOL)


def test_statistics():
    student, teacher = _resnets(dtype=torch.float32)
    sscl = _attach(student, teacher, cka_floor=0.3)
    assert sscl.stats == {}
    x = _images(dtype=torch.float32)
    student(x)
    loss = sscl(x)
    stats = sscl.stats
    assert list(stats) == STAGES + ['pooled'] == [tap.name for tap in sscl.taps]
    for values in stats.values():
        assert set(values) == {'cka', 'cka_running', 'weight', 'nce', 'mi_bound'}
        assert all(isinstance(v, float) and math.isfinite(v) for v in values.values())
        assert values['weight'] == pytest.approx(1 / max(values['cka_running'], 0.3), rel=1e-6)
        assert values['mi_bound'] == pytest.approx(math.log(len(x)) - values['nce'], abs=1e-5)
    assert loss.item() == pytest.approx(sum(v['weight'] * v['nce'] for v in stats.values()), rel=1e-5)
    assert len({round(v['weight'], 3) for v in stats.values()}) > 1  # not all at the floor


# ---- gradients

def test_every_stage_learns_from_the_contrastive_term_alone_and_the_teacher_does_not():
    student, teacher = _resnets()
    teacher.train()
    sscl = _attach(student, teacher, weighting='uniform')
    sscl.train()
    x = _images()
    student(x)
    buffers = [b.clone() for b in teacher.buffers()]
    sscl(x).backward()
    for stage in STAGES:
        for name, module in getattr(student, stage).named_modules():
            if isinstance(module, nn.Conv2d):
                assert module.weight.grad.abs().sum() > 0, f'{stage}.{name}'
    assert student.conv1[0].weight.grad.abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for name, p in sscl.named_parameters() if name.endswith('weight'))
    assert len(list(sscl.parameters())) == 20  # weight and bias of g_S and g_A at five taps
    assert not any(m.training for m in teacher.modules())
    assert all(not p.requires_grad and p.grad is None for p in teacher.parameters())
    assert all(torch.equal(b, old) for b, old in zip(teacher.buffers(), buffers))


def test_cka_weight_carries_no_gradient():
    student, teacher = _resnets()
    x = _images()
    grads = []
    for weighting in ('uniform', 'cka'):
        sscl = _attach(student, teacher, taps=['layer2'], weighting=weighting, cka_floor=0.01)
        student.zero_grad()
        student(x)
        sscl(x).backward()
        grads.append([g for g in _gradients(student) if g is not None])
        weight = sscl.stats['layer2']['weight']
        sscl.close()
    assert weight != 1 and weight != 100
    # with one layer the gradient is the weight times the uniform one, exactly where the weight is a constant;
    # the weight comes from stats, a float32
    for uniform, weighted in zip(*grads):
        torch.testing.assert_close(weighted, weight * uniform, rtol=1e-6, atol=1e-12)


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
            student(_images(5, seed=7))
        student.train()

    @staticmethod
    def evaluation_mode_with_gradients(student, teacher, ema):
        student.eval()
        student(_images(5, seed=7))
        student.train()

    @staticmethod
    def training_mode_without_gradients(student, teacher, ema):
        with torch.no_grad():
            student(_images(5, seed=7))

    @staticmethod
    def ema_copy_in_training_mode(student, teacher, ema):
        ema.module.train()
        ema.module(_images(8, seed=7))
        ema.update(student)

    @staticmethod
    def copy_made_now(student, teacher, ema):
        copy.deepcopy(student).train()(_images(8, seed=7))

    @staticmethod
    def second_training_forward(student, teacher, ema):
        student(_images(8, seed=7))

    @staticmethod
    def second_training_forward_of_another_size(student, teacher, ema):
        student(_images(3, seed=7))

    @staticmethod
    def teacher_on_other_images(student, teacher, ema):
        with torch.no_grad():
            teacher(_images(8, seed=7))

    @staticmethod
    def teacher_in_training_mode(student, teacher, ema):
        teacher.train()

    @staticmethod
    def forward_that_fails(student, teacher, ema):
        with pytest.raises(RuntimeError):
            student(torch.zeros(2, 7, 32, 32, dtype=torch.float64))

    @staticmethod
    def part_of_the_student(student, teacher, ema):
        student.forward_features(_images(8, seed=7))
        with student.time_folded():
            student.layer4[-1](torch.zeros(4, 96, 2, 2, dtype=torch.float64))


@pytest.mark.parametrize('name', [name for name in vars(_Disturb) if not name.startswith('_')])
def test_nothing_between_the_two_lines_changes_the_features(name):
    student, teacher = _resnets()
    sscl = _attach(student, teacher, **BATCH_ONLY)
    ema = ModelEmaV3(student, decay=0.5)
    x = _images()
    a = _teacher_features(teacher, x)
    other = sscl.from_features(_features_of(student, _images(8, seed=7)), a).item()
    with _seen(*_tapped(student)) as features:
        student(x)
    features = list(features)
    getattr(_Disturb, name)(student, teacher, ema)
    value = sscl(x)
    expected = sscl.from_features(features, a)
    assert value.item() == expected.item()
    assert abs(value.item() - other) > 1e-3  # the disturbance's features would have shown
    value.backward(retain_graph=True)
    grads = [g.clone() for g in _gradients(student) if g is not None]
    student.zero_grad()
    expected.backward()
    assert grads and all(torch.equal(g, e) for g, e in zip(grads, [g for g in _gradients(student) if g is not None]))


def _features_of(student, x):
    """Training features of a copy, so that the student itself has not run."""
    twin = copy.deepcopy(student).train()
    with _seen(*_tapped(twin)) as seen:
        twin(x)
    return seen


def test_second_call_without_a_forward_raises():
    student, teacher = _resnets()
    sscl = _attach(student, teacher)
    x = _images()
    student(x)
    sscl(x)
    with pytest.raises(RuntimeError, match='no forward'):
        sscl(x)


def test_call_before_any_forward_raises():
    student, teacher = _resnets()
    with pytest.raises(RuntimeError, match='no forward'):
        _attach(student, teacher)(_images())


def test_forward_in_evaluation_mode_is_no_training_step():
    student, teacher = _resnets()
    sscl = _attach(student, teacher)
    x = _images()
    student.eval()
    student(x)
    with pytest.raises(RuntimeError, match='training'):
        sscl(x)


def test_images_that_the_student_did_not_see_raise():
    student, teacher = _resnets()
    sscl = _attach(student, teacher)
    student(_images(8, seed=0))
    with pytest.raises(RuntimeError, match='not on this input'):
        sscl(_images(8, seed=1))


def test_images_changed_in_place_after_the_student_raise():
    # the student saw the old content, the teacher would see the new
    student, teacher = _resnets()
    sscl = _attach(student, teacher)
    x = _images(8, seed=0)
    student(x)
    x.copy_(_images(8, seed=1))
    with pytest.raises(RuntimeError):
        sscl(x)


def test_step_without_the_loss_is_forgotten():
    student, teacher = _resnets()
    sscl = _attach(student, teacher, **BATCH_ONLY)
    student(_images(8, seed=1))
    x = _images(8, seed=2)
    with _seen(*_tapped(student)) as features:
        student(x)
    assert sscl(x).item() == sscl.from_features(features, _teacher_features(teacher, x)).item()


@pytest.mark.parametrize('reuse', ['same images', 'same buffer'])
def test_step_without_the_loss_on_the_same_tensor_is_forgotten(reuse):
    # a loss taken every second step, on one overfitted batch or out of a buffer that the loader fills again
    student, teacher = _resnets()
    sscl = _attach(student, teacher, **BATCH_ONLY)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    x = _images(8, seed=1)
    student(x).square().mean().backward()
    optimizer.step()
    if reuse == 'same buffer':
        x.copy_(_images(8, seed=2))
    with _seen(*_tapped(student)) as features:
        student(x)
    assert sscl(x).item() == sscl.from_features(features, _teacher_features(teacher, x)).item()


def test_equal_values_in_another_tensor_are_accepted():
    student, teacher = _resnets()
    sscl = _attach(student, teacher, **BATCH_ONLY)
    x = _images()
    student(x)
    value = sscl(x.clone()).item()
    student(x=x)  # by keyword
    assert sscl(x).item() == value


def test_teacher_of_another_normalisation():
    student, teacher = _resnets()
    sscl = _attach(student, teacher, **BATCH_ONLY)
    x = _images()
    shifted = (x - 0.5) / 2
    with _seen(*_tapped(student)) as features:
        student(x)
    value = sscl(x, teacher_input=shifted).item()
    assert value == sscl.from_features(features, _teacher_features(teacher, shifted)).item()
    assert value != sscl.from_features(features, _teacher_features(teacher, x)).item()


def test_spiking_teacher_and_event_frames():
    student, _ = _resnets()
    teacher = _create('spiking_test_resnet', seed=1, layers=(2, 1, 1, 2))
    sscl = _attach(student, teacher, **BATCH_ONLY)
    x = torch.stack([_images(8, seed=0), _images(8, seed=1)], 1)  # (B, T, C, H, W)
    with _seen(*_tapped(student)) as features:
        student(x)
    a = _teacher_features(teacher, x)
    assert sscl(x).item() == sscl.from_features(features, a).item()
    terms = _hsic_terms(_rows(features[1], T), _rows(a[1], T))
    # a float32 statistic
    assert sscl.stats['layer2']['cka'] == pytest.approx(terms[0] / math.sqrt(terms[1] * terms[2]), rel=1e-5, abs=1e-6)


# ---- gradient checkpointing

def _checkpointed_pair(family):
    if family == 'resnet':
        return _resnets()
    return _create('spiking_test_vit', img_size=32).train(), _create('test_vit', img_size=32)


@pytest.mark.parametrize('reentrant', [False, True])
@pytest.mark.parametrize('family', ['resnet', 'vit'])
def test_gradient_checkpointing(family, reentrant, monkeypatch):
    monkeypatch.setattr('timm.layers.config._USE_REENTRANT_CKPT', reentrant)  # set_reentrant_ckpt, undone afterwards
    results = []
    for checkpointing in (False, True):
        student, teacher = _checkpointed_pair(family)
        sscl = _attach(student, teacher, cka_floor=0.05)
        student.set_grad_checkpointing(checkpointing)
        steps = []
        for step in range(3):
            x = _images(8, seed=step)
            loss = F.cross_entropy(student(x), torch.arange(8) % 5) + sscl(x)
            student.zero_grad()
            sscl.zero_grad()
            loss.backward()  # recomputes the blocks, whose hooks fire again
            steps.append((loss.item(), [g.clone() for g in _gradients(student, sscl) if g is not None]))
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
    student, teacher = _resnets()
    sscl = _attach(student, teacher)
    references = [
        r for m in (student.layer1[-1], student.layer4[-1], teacher.layer2[-1]) for r in [_references_in(m)[0]]]
    x = _images()
    student(x)
    assert all(_alive(r) for r in references[:2])  # held for the loss to come
    loss = sscl(x)
    loss.backward()
    del loss
    assert all(len(r) == 1 for r in references)
    assert not any(_alive(r) for r in references)
    assert sscl.stats  # which stay


def test_forward_only_loss_leaves_no_graph_behind():
    student, teacher = _resnets()
    sscl = _attach(student, teacher)
    references, _ = _references_in(student.layer3[-1].conv2)  # kept by the norm behind it; spikes are kept as bits
    x = _images()
    student(x)
    loss = sscl(x)
    assert _alive(references)  # by the loss's graph
    del loss
    assert not _alive(references)


def test_validation_is_not_recorded():
    student, teacher = _resnets()
    sscl = _attach(student, teacher)
    references, _ = _references_in(student.layer1[-1])
    student.eval()
    with torch.no_grad():
        for seed in range(3):
            student(_images(4, seed=seed))
    student(_images(4))  # with gradients
    assert len(references) == 4 and not _alive(references)
    with pytest.raises(RuntimeError, match='no forward'):
        sscl(_images(4))


def test_teachers_own_evaluation_is_not_held():
    student, teacher = _resnets()
    sscl = _attach(student, teacher)
    references, _ = _references_in(teacher.layer1[-1])
    with torch.no_grad():
        for seed in range(3):
            teacher(_images(4, seed=seed))
    assert len(references) == 3 and not _alive(references)
    assert sscl.taps


def test_training_forwards_without_the_loss_do_not_pile_up():
    student, teacher = _resnets()
    sscl = _attach(student, teacher)
    references, _ = _references_in(student.layer1[-1])
    for seed in range(5):
        student(_images(4, seed=seed))
    assert len(references) == 5 and len(_alive(references)) <= 2
    sscl.close()
    assert not _alive(references)


# ---- copies, files, removal

def test_copy_of_the_student_is_detached():
    student, teacher = _resnets()
    sscl = _attach(student, teacher)
    x = _images()
    for twin in (copy.deepcopy(student), ModelEmaV3(student).module, _saved_and_loaded(student)):
        assert torch.equal(twin.eval()(x), student.eval()(x))
        student.train()
        twin.train()(x)
        with pytest.raises(RuntimeError, match='no forward'):
            sscl(x)
    student(x)
    assert torch.isfinite(sscl(x))


def _saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize('duplicate', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _saved_and_loaded],
                         ids=['deepcopy', 'pickle', 'torch.save'])
def test_copy_of_the_loss_is_detached_and_says_so(duplicate):
    student, teacher = _resnets()
    sscl = _attach(student, teacher, **BATCH_ONLY)
    x = _images()
    student(x)
    sscl(x)
    twin = duplicate(sscl)
    student(x)
    with pytest.raises(RuntimeError, match='copy'):
        twin(x)
    with _seen(*_tapped(student)) as features:
        student(x)
    value = sscl(x)  # the original goes on
    assert twin.from_features(features, _teacher_features(teacher, x)).item() == value.item()
    assert all(torch.equal(v, twin.state_dict()[k]) for k, v in sscl.state_dict().items())


def test_close_removes_every_hook():
    student, teacher = _resnets()
    before = _num_hooks(student), _num_hooks(teacher)
    sscl = _attach(student, teacher)
    assert _num_hooks(student) > before[0] and _num_hooks(teacher) > before[1]
    x = _images()
    student(x)
    sscl.close()
    assert (_num_hooks(student), _num_hooks(teacher)) == before == (0, 0)
    with pytest.raises(RuntimeError, match='removed'):
        sscl(x)
    student(x)
    with pytest.raises(RuntimeError, match='removed'):
        sscl(x)
    sscl.close()  # twice does no harm


def test_construction_leaves_nothing_but_hooks():
    student, teacher = _resnets()
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
    student, teacher = _resnets()
    first = _attach(student, teacher, taps=['layer1', 'layer3'], **BATCH_ONLY)
    second = _attach(student, teacher, taps=['layer3', 'pooled'], critic='infonce', **BATCH_ONLY)
    x, y = _images(8, seed=0), _images(8, seed=1)
    with _seen(*_tapped(student)) as features:
        student(x)
    a = _teacher_features(teacher, x)
    values = second(x).item(), first(x).item()
    assert values[1] == first.from_features([features[0], features[2]], [a[0], a[2]]).item()
    assert values[0] == second.from_features([features[2], features[4]], [a[2], a[4]]).item()
    first.close()
    student(y)
    assert torch.isfinite(second(y))  # closing one leaves the other
    with pytest.raises(RuntimeError):
        first(y)


def test_two_students_of_one_teacher():
    student, teacher = _resnets()
    other = _create('spiking_test_resnet', seed=3, layers=(2, 1, 1, 2)).train()
    first, second = _attach(student, teacher, **BATCH_ONLY), _attach(other, teacher, **BATCH_ONLY)
    x, y = _images(8, seed=0), _images(8, seed=1)
    with _seen(*_tapped(student), *_tapped(other)) as features:
        student(x)
        other(y)
    values = first(x).item(), second(y).item()
    assert values[0] == first.from_features(features[:5], _teacher_features(teacher, x)).item()
    assert values[1] == second.from_features(features[5:], _teacher_features(teacher, y)).item()


# ---- a module of its own

def test_student_and_teacher_are_no_submodules():
    student, teacher = _resnets()
    sscl = _attach(student, teacher, dim=16)
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
    student, teacher = _resnets(dtype=torch.float32)
    sscl = SSCLLoss(student, teacher)
    sscl.to(torch.float64)
    assert {p.dtype for p in teacher.parameters()} == {p.dtype for p in sscl.parameters()} == {torch.float64}
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    nn.ModuleList([sscl]).float()  # as part of another module as well
    assert {p.dtype for p in teacher.parameters()} == {p.dtype for p in sscl.parameters()} == {torch.float32}


def test_state_dict_round_trip_keeps_projections_and_running_cka():
    student, teacher = _resnets()
    sscl = _attach(student, teacher, cka_floor=0.01)
    for seed in range(2):
        x = _images(8, seed=seed)
        student(x)
        sscl(x)
    state = copy.deepcopy(sscl.state_dict())
    x = _images(8, seed=2)
    student(x)
    value = sscl(x)
    fresh = _attach(student, teacher, cka_floor=0.01)
    for p in fresh.parameters():
        nn.init.normal_(p)
    fresh.load_state_dict(state)
    student(x)
    assert fresh(x).item() == value.item()
    assert fresh.stats == sscl.stats


def _messages(caplog, words):
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and words in r.getMessage()]


OPTIMIZERS = [lambda p: torch.optim.SGD(p, lr=0.01), lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
              lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True)]


def _train(student, sscl, optimizer, steps=4, accumulate=1):
    for step in range(steps):
        x = _images(6, seed=step, dtype=torch.float32)
        (F.cross_entropy(student(x), torch.arange(6) % 5) + sscl(x)).backward()
        if (step + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize('create', OPTIMIZERS, ids=['sgd', 'foreach', 'fused'])
def test_warning_where_the_projections_are_not_trained(caplog, create):
    student, teacher = _resnets(dtype=torch.float32)
    sscl = SSCLLoss(student, teacher)
    _train(student, sscl, create(student.parameters()))
    assert len(_messages(caplog, 'projections')) == 1
    assert 'sscl.parameters()' in _messages(caplog, 'projections')[0]


@pytest.mark.parametrize('accumulate', [1, 2])
@pytest.mark.parametrize('create', OPTIMIZERS, ids=['sgd', 'foreach', 'fused'])
def test_no_warning_where_both_are_trained(caplog, create, accumulate):
    student, teacher = _resnets(dtype=torch.float32)
    sscl = SSCLLoss(student, teacher)
    _train(student, sscl, create([*student.parameters(), *sscl.parameters()]), accumulate=accumulate)
    assert not _messages(caplog, 'projections')


def test_no_warning_where_nothing_is_trained_yet(caplog):
    student, teacher = _resnets(dtype=torch.float32)
    sscl = SSCLLoss(student, teacher)
    _train(student, sscl, torch.optim.SGD(student.parameters(), lr=0.01), steps=3, accumulate=10)
    assert not _messages(caplog, 'projections')


# ---- errors that say what is wrong

def test_small_batch():
    student, teacher = _resnets()
    sscl = _attach(student, teacher)
    x = _images(3)
    student(x)
    with pytest.raises(ValueError, match='batch of 3.*at least 4'):
        sscl(x)
    uniform = _attach(student, teacher, weighting='uniform')
    x = _images(2)
    student(x)
    assert torch.isfinite(uniform(x))
    assert all(set(values) == {'nce', 'mi_bound', 'weight'} for values in uniform.stats.values())
    one = _teacher_features(teacher, _images(1))
    with pytest.raises(ValueError, match='at least 2'):
        uniform.from_features(one, one)


@pytest.mark.parametrize('which', ['wrapped student', 'student in place', 'part of the student', 'wrapped teacher'])
def test_compiled_model_raises(which):
    student, teacher = _resnets()
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
    student, _ = _resnets()
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
    student, teacher = _resnets()
    with pytest.raises(ValueError, match=match):
        SSCLLoss(student, teacher, taps=taps, teacher_taps=teacher_taps)
    assert (_num_hooks(student), _num_hooks(teacher)) == (0, 0)


@pytest.mark.parametrize('timesteps', [0, -1])
def test_timesteps_below_one_raise(timesteps):
    with pytest.raises(ValueError, match='timesteps'):
        SSCLLoss(*_resnets(), timesteps=timesteps)


def test_wrong_timesteps_raise():
    student, teacher = _resnets()
    sscl = _attach(student, teacher, timesteps=3)
    x = _images()
    student(x)
    with pytest.raises(ValueError, match='timesteps=3'):
        sscl(x)


def test_tap_that_did_not_run_is_named():
    student, teacher = _resnets()
    sscl = _attach(student, teacher)
    x = _images()
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
    student, teacher = _resnets()
    sscl = _attach(student, teacher)
    a = _teacher_features(teacher, _images())
    with pytest.raises(ValueError, match='5 taps'):
        sscl.from_features(a[:4], a[:4])
    with pytest.raises(ValueError, match='5 taps'):
        sscl.from_features(a, a[:4])


# ---- any nn.Module

class _Cnn(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 2, 1)
        self.body = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ReLU(), nn.AvgPool2d(2))
        self.neck = nn.Linear(2 * width, 10)
        self.head = nn.Linear(10, 5)

    def forward(self, x):
        return self.head(F.relu(self.neck(self.body(F.relu(self.stem(x))).mean((2, 3)))))


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


def _plain(cls, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return cls().double()


def _plain_value(sscl, s, a, weighting='uniform'):
    return sum(_nce(_project(u, 1, g), _project(v, 1, h), 'infonce')
               for u, v, g, h in zip(s, a, sscl.criterion.g_student, sscl.criterion.g_teacher))


def test_plain_modules_of_different_architecture():
    student, teacher = _plain(_Cnn, 0).train(), _plain(_Mlp, 1)
    sscl = _attach(student, teacher, taps=['stem', 'body', 'neck'], teacher_taps=['first', 'second', 'second'],
                   weighting='uniform', input_size=None)
    assert [tuple(g.weight.shape) for g in sscl.criterion.g_student] == [(128, 6), (128, 12), (128, 10)]
    assert [tuple(g.weight.shape) for g in sscl.criterion.g_teacher] == [(128, 20), (128, 14), (128, 14)]
    x = _images(8, size=16)
    with _seen(student.stem, student.body, student.neck) as s:
        student(x)
    value = sscl(x)
    with _seen(teacher.first, teacher.second, teacher.second) as a:
        teacher(x)
    a = [a[0], a[2], a[2]]
    assert value.item() == pytest.approx(_plain_value(sscl, s, a), **REFERENCE_TOL)
    assert sscl.from_features(s, a).item() == value.item()
    value.backward()
    assert student.stem.weight.grad.abs().sum() > 0 and student.head.weight.grad is None
    assert list(sscl.stats) == ['stem', 'body', 'neck']


def test_token_features_of_plain_modules():
    student, teacher = _plain(_Tokens, 0).train(), _plain(_Cnn, 1)
    sscl = _attach(student, teacher, taps=['layer'], teacher_taps=['body'], cka_floor=1e-3)
    x = _images(8, size=16)
    with _seen(student.layer) as s:
        student(x)
    value = sscl(x)
    with torch.no_grad(), _seen(teacher.body) as a:
        teacher(x)
    assert s[0].shape == (8, 4, 12)
    nce = _plain_value(sscl, [s[0].mT], a)
    terms = _hsic_terms(_rows(s[0], 1), _rows(a[0], 1))
    cka = terms[0] / math.sqrt(terms[1] * terms[2])
    assert cka > 0.01  # above the floor
    assert value.item() == pytest.approx(nce / cka, **REFERENCE_TOL)


def test_sequential_networks_and_a_single_name():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Sequential(nn.Linear(9, 6), nn.Tanh())).double()
        teacher = nn.Sequential(nn.Linear(7, 11), nn.Tanh()).double()
    sscl = _attach(student, teacher, taps='2', teacher_taps='1', weighting='uniform')
    x = torch.randn(6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = student(x)
    with torch.no_grad():
        expected = _plain_value(sscl, [out], [teacher(x)])
    assert sscl(x).item() == pytest.approx(expected, **REFERENCE_TOL)


def test_different_timm_architectures_by_default():
    student = _create('spiking_test_resnet').train()
    teacher = _create('test_convnext', seed=1)
    sscl = _attach(student, teacher, **BATCH_ONLY)
    x = _images()
    with _seen(*_tapped(student)) as s:
        student(x)
    with torch.no_grad(), _seen(*teacher.stages, teacher.head.flatten) as a:
        teacher.eval()(x)
    assert sscl(x).item() == sscl.from_features(s, a).item()
    assert [g.in_features for g in sscl.criterion.g_teacher] == [24, 32, 48, 64, 64]


def test_fewer_stages_pair_by_relative_depth():
    student = _create('spiking_test_resnet').train()
    teacher = _create('test_vit', seed=1, img_size=32, depth=2)
    sscl = _attach(student, teacher)
    assert [tap.name for tap in sscl.taps] == ['layer2', 'layer4', 'pooled']
    x = _images()
    student(x)
    assert torch.isfinite(sscl(x))
    assert [g.in_features for g in sscl.criterion.g_student] == [48, 96, 96]


# ---- hard cases

class _Silenced(nn.Module):
    """A stage whose neurons never fire: zeros, with a graph."""

    def __init__(self, stage):
        super().__init__()
        self.stage = stage

    def forward(self, x):
        return self.stage(x) * 0


def test_silent_tap(caplog):
    student, teacher = _plain(_Cnn, 0).train(), _plain(_Cnn, 1)
    student.stem = _Silenced(student.stem)
    sscl = _attach(student, teacher, taps=['stem', 'neck'], cka_floor=0.25)
    for seed in range(3):
        x = _images(8, seed=seed, size=16)
        student(x)
        loss = sscl(x)
        loss.backward()
        assert torch.isfinite(loss)
        assert all(torch.isfinite(g).all() for g in _gradients(student, sscl) if g is not None)
        assert sscl.stats['stem']['weight'] == 4
    assert len(_messages(caplog, "'stem'")) == 1


def test_silent_spiking_stage(caplog):
    student, teacher = _resnets()
    for module in student.layer4.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    sscl = _attach(student, teacher)
    for seed in range(2):
        x = _images(8, seed=seed)
        with _seen(student.layer4[-1]) as features:
            out = student(x)
        assert features[0].abs().sum() == 0
        loss = F.cross_entropy(out, torch.arange(8) % 5) + sscl(x)
        loss.backward()
        assert torch.isfinite(loss)
    assert all(torch.isfinite(g).all() for g in _gradients(student, sscl) if g is not None)
    assert sscl.stats['layer4']['weight'] == sscl.stats['pooled']['weight'] == pytest.approx(10)
    assert len(_messages(caplog, "'layer4'")) == len(_messages(caplog, "'pooled'")) == 1


def test_bfloat16_autocast_of_an_ann_is_near_float32():
    student, teacher = _create('test_resnet', 1, torch.float32).train(), _create('test_resnet', 0, torch.float32)
    sscl = SSCLLoss(student, teacher, cka_floor=0.05, **BATCH_ONLY)
    x = _images(dtype=torch.float32)
    values = []
    for enabled in (False, True):
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            student(x)
            loss = sscl(x)
        assert loss.dtype == torch.float32
        values.append((loss.item(), {k: v['nce'] for k, v in sscl.stats.items()}))
    # bfloat16 keeps 8 bits: 0.4 % per rounding, some ten roundings deep, times 1 / temperature on scores that stay
    # under 0.5; the weights 1 / CKA add the same again
    assert values[1][0] == pytest.approx(values[0][0], rel=0.2)
    assert values[1][1] == pytest.approx(values[0][1], rel=0.1)
    assert values[1][0] != values[0][0]  # autocast was on


def test_bfloat16_autocast_of_a_spiking_student_trains():
    student, teacher = _resnets(dtype=torch.float32)
    sscl = SSCLLoss(student, teacher)
    x = _images(dtype=torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        loss = F.cross_entropy(student(x), torch.arange(8) % 5) + sscl(x)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(g).all() for g in _gradients(student, sscl) if g is not None)
    assert student.layer1[0].conv1.weight.grad.abs().sum() > 0


# ---- the two lines in a plain loop

def test_plain_training_loop():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(16, 1, 32, 32, generator=generator), torch.arange(16) % 4
    student = _create('spiking_test_efficientnet', 0, torch.float32, in_chans=1)
    teacher = _create('test_efficientnet', 1, torch.float32, in_chans=1).train()
    with torch.no_grad():
        for _ in range(30):
            teacher(x)  # BatchNorm's statistics, so that its features differ from image to image

    sscl = SSCLLoss(student, teacher)
    optimizer = torch.optim.AdamW([*student.parameters(), *sscl.parameters()], lr=0.01)
    student.train()
    losses, terms = [], []
    for _ in range(10):
        loss = F.cross_entropy(student(x), y) + 0.1 * sscl(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        terms.append(sum(values['nce'] for values in sscl.stats.values()))

    assert all(math.isfinite(loss) for loss in losses)
    # two thirds and less here; guessing alone would leave the terms at 5 * (log 16 + 15 log 16/15) = 18.7
    assert losses[-1] < 0.85 * losses[0]
    assert terms[-1] < 0.85 * terms[0] and terms[-1] < 17


def test_student_compiled_after_the_loss_was_built():
    """Hooks are part of the graph where they were there first, also when a twin without hooks was compiled before."""
    student, teacher = _resnets()
    x = _images()
    torch.compile(copy.deepcopy(student), fullgraph=True, backend='aot_eager')(x)
    sscl = _attach(student, teacher)
    student(x)
    expected = sscl(x)
    compiled = torch.compile(student, backend='aot_eager')
    for _ in range(2):
        compiled(x)
        torch.testing.assert_close(sscl(x), expected, rtol=1e-12, atol=0)
