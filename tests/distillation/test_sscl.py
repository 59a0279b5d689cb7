"""SSCLLoss in somebody else's training loop: its value, by loops over the samples, its gradients and its statistics."""
import copy
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from sscl_reference import (
    BATCH_ONLY, Cnn, REFERENCE_TOL, STAGES, T, attach, create, gradients, images_of, messages, nce_by_hand,
    outputs_of, plain, project, reference, resnets, tapped, teacher_features)
from spiking_families import short_resnet
from timm_sscl import SSCLLoss


# ---- the value

@pytest.mark.parametrize('options', [
    dict(), dict(critic='literal'), dict(critic='normalized'), dict(weighting='uniform'), dict(cka_momentum=1.),
    dict(critic='literal', weighting='uniform')], ids=str)
def test_value_is_the_papers_formula(options):
    student, teacher = resnets()
    sscl = attach(student, teacher, cka_floor=0.02, **options)
    x = images_of()
    with outputs_of(*tapped(student)) as features:
        student(x)
    value = sscl(x)
    expected, layers = reference(
        sscl, [(features, teacher_features(teacher, x))], options.get('critic', 'infonce'),
        options.get('weighting', 'cka'), floor=0.02)
    assert value.ndim == 0
    assert value.item() == pytest.approx(expected, **REFERENCE_TOL)
    # the batch must not sit on the floor everywhere, or a wrong CKA would pass
    assert sum(cka > 0.02 for cka, *_ in layers) >= 3, layers


def test_value_over_three_steps_uses_running_means_of_the_hsic_terms():
    student, teacher = resnets()
    sscl = attach(student, teacher, cka_floor=0.01, cka_momentum=0.3)
    steps = []
    for step in range(3):
        x = images_of(6 + step, seed=step)
        with outputs_of(*tapped(student)) as features:
            student(x)
        value = sscl(x)
        steps.append((features, teacher_features(teacher, x)))
        expected, layers = reference(sscl, steps, floor=0.01, momentum=0.3)
        assert value.item() == pytest.approx(expected, **REFERENCE_TOL)
        for values, (cka, running, weight, nce) in zip(sscl.stats.values(), layers):
            # the statistics are reported as float32
            assert values['cka'] == pytest.approx(cka, rel=1e-5, abs=1e-6)
            assert values['cka_running'] == pytest.approx(running, rel=1e-5, abs=1e-6)
            assert values['weight'] == pytest.approx(weight, rel=1e-5)
            assert values['nce'] == pytest.approx(nce, rel=1e-5)
    assert any(abs(running - cka) > 0.01 for cka, running, *_ in layers)  # the running form is another number


def test_value_in_float32_and_temperature_and_dim():
    student, teacher = resnets(dtype=torch.float32)
    sscl = attach(student, teacher, weighting='uniform', temperature=0.5, dim=16)
    x = images_of(dtype=torch.float32)
    with outputs_of(*tapped(student)) as features:
        student(x)
    value = sscl(x)
    a = teacher_features(teacher, x)
    expected = sum(
        nce_by_hand(project(features[i], T, sscl.criterion.g_student[i]), project(a[i], 1, sscl.criterion.g_teacher[i]),
             'infonce', t=0.5) for i in range(5))
    assert value.item() == pytest.approx(expected, rel=1e-5)  # float32's 1e-7 through two norms and a temperature


def test_evaluation_mode_leaves_the_running_cka_alone():
    student, teacher = resnets()
    sscl = attach(student, teacher)
    x, other = images_of(seed=0), images_of(seed=1)
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
    student, teacher = resnets()
    sscl = attach(student, teacher, **BATCH_ONLY)
    x = images_of()
    permuted = x[torch.tensor([3, 0, 7, 1, 6, 2, 5, 4])]
    values = []
    for images in (x, permuted):
        student(images)
        values.append(sscl(images).item())
    # BatchNorm's and HSIC's sums run in another order
    assert values[0] == pytest.approx(values[1], **REFERENCE_TOL)


def test_statistics():
    student, teacher = resnets(dtype=torch.float32)
    sscl = attach(student, teacher, cka_floor=0.3)
    assert sscl.stats == {}
    x = images_of(dtype=torch.float32)
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
    student, teacher = resnets()
    teacher.train()
    sscl = attach(student, teacher, weighting='uniform')
    sscl.train()
    x = images_of()
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
    student, teacher = resnets()
    x = images_of()
    grads = []
    for weighting in ('uniform', 'cka'):
        sscl = attach(student, teacher, taps=['layer2'], weighting=weighting, cka_floor=0.01)
        student.zero_grad()
        student(x)
        sscl(x).backward()
        grads.append([g for g in gradients(student) if g is not None])
        weight = sscl.stats['layer2']['weight']
        sscl.close()
    assert weight != 1 and weight != 100
    # with one layer the gradient is the weight times the uniform one, exactly where the weight is a constant;
    # the weight comes from stats, a float32
    for uniform, weighted in zip(*grads):
        torch.testing.assert_close(weighted, weight * uniform, rtol=1e-6, atol=1e-12)


# ---- hard cases

class _Silenced(nn.Module):
    """A stage whose neurons never fire: zeros, with a graph."""

    def __init__(self, stage):
        super().__init__()
        self.stage = stage

    def forward(self, x):
        return self.stage(x) * 0


def test_silent_tap(caplog):
    student, teacher = plain(Cnn, 0).train(), plain(Cnn, 1)
    student.stem = _Silenced(student.stem)
    sscl = attach(student, teacher, taps=['stem', 'neck'], cka_floor=0.25)
    for seed in range(3):
        x = images_of(8, seed=seed, size=16)
        student(x)
        loss = sscl(x)
        loss.backward()
        assert torch.isfinite(loss)
        assert all(torch.isfinite(g).all() for g in gradients(student, sscl) if g is not None)
        assert sscl.stats['stem']['weight'] == 4
    assert len(messages(caplog, "'stem'")) == 1


def test_silent_spiking_stage(caplog):
    student, teacher = resnets()
    for module in student.layer4.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    sscl = attach(student, teacher)
    for seed in range(2):
        x = images_of(8, seed=seed)
        with outputs_of(student.layer4[-1]) as features:
            out = student(x)
        assert features[0].abs().sum() == 0
        loss = F.cross_entropy(out, torch.arange(8) % 5) + sscl(x)
        loss.backward()
        assert torch.isfinite(loss)
    assert all(torch.isfinite(g).all() for g in gradients(student, sscl) if g is not None)
    assert sscl.stats['layer4']['weight'] == sscl.stats['pooled']['weight'] == pytest.approx(10)
    assert len(messages(caplog, "'layer4'")) == len(messages(caplog, "'pooled'")) == 1


def test_bfloat16_autocast_of_an_ann_is_near_float32():
    student, teacher = create('test_resnet', 1, torch.float32).train(), create('test_resnet', 0, torch.float32)
    sscl = SSCLLoss(student, teacher, cka_floor=0.05, **BATCH_ONLY)
    x = images_of(dtype=torch.float32)
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
    student, teacher = resnets(dtype=torch.float32)
    sscl = SSCLLoss(student, teacher)
    x = images_of(dtype=torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        loss = F.cross_entropy(student(x), torch.arange(8) % 5) + sscl(x)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(g).all() for g in gradients(student, sscl) if g is not None)
    assert student.layer1[0].conv1.weight.grad.abs().sum() > 0


# ---- the two lines in a plain loop

def test_plain_training_loop():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(16, 1, 32, 32, generator=generator), torch.arange(16) % 4
    student = create('spiking_test_efficientnet', 0, torch.float32, in_chans=1)
    teacher = create('test_efficientnet', 1, torch.float32, in_chans=1).train()
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
    student, teacher = short_resnet(timesteps=T).double().train(), short_resnet().double()
    x = images_of()
    torch.compile(copy.deepcopy(student), fullgraph=True, backend='eager')(x)
    sscl = attach(student, teacher)
    student(x)
    expected = sscl(x)
    compiled = torch.compile(student, backend='eager')
    for _ in range(2):
        compiled(x)
        torch.testing.assert_close(sscl(x), expected, rtol=1e-12, atol=0)
