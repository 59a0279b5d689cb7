"""BKDSNN: the weighted logits and the restored feature against loops, its masks, and training in a task."""
import math

import pytest
import timm
import torch
import torch.nn as nn
from loops import LABELS, assert_equal_with_gradient, cross_entropy, make_step, randn, softmax

from timm_sscl import SSCLTask, create_loss
from timm_sscl.losses import kd_loss, weighted_soft_loss

SHAPES = [(3, 4, 4), (4,)]


def _loss(teacher_channels=(5, 4), **options):
    return create_loss(
        'bkdsnn', names=['map', 'pooled'], student_channels=(3, 4), teacher_channels=teacher_channels,
        student_shapes=[(2, *shape) for shape in SHAPES], teacher_shapes=[(1, *shape) for shape in SHAPES],
        **options).double()


def _step(timesteps=2, channels=5):
    student = [randn(timesteps, 6, 3, 4, 4, seed=3).requires_grad_(), randn(timesteps, 6, 4, seed=4).requires_grad_()]
    teacher = [randn(1, 6, channels, 4, 4, seed=5), randn(1, 6, 4, seed=6)]
    return make_step(2 * randn(timesteps, 6, 5).requires_grad_(), 2 * randn(6, 5, seed=1),
                     student_features=student, teacher_features=teacher)


def test_weighted_soft_loss_against_loops():
    logits, teacher = (2 * randn(6, 5)).requires_grad_(), 2 * randn(6, 5, seed=1)
    total = 0.
    for o, a, y in zip(logits, teacher, LABELS):
        weight = 1 - torch.exp(torch.log(softmax(o)[y]) / -torch.log(softmax(a)[y]))
        total = total + weight.detach() * cross_entropy(softmax(a, 2.), softmax(o, 2.))
    assert_equal_with_gradient(weighted_soft_loss(logits, teacher, LABELS), 4 * total / 6, [logits])


def test_weight_is_that_of_equal_cross_entropies():
    """CE_S = CE_A gives w = 1 - 1/e, and the gradient is that of kd at any w."""
    teacher = 2 * randn(6, 5)
    logits = teacher.clone().requires_grad_()
    loss = weighted_soft_loss(logits, teacher, LABELS, 2.)
    entropy = sum(cross_entropy(softmax(a, 2.), softmax(a, 2.)) for a in teacher) / 6
    assert loss.item() == pytest.approx((1 - math.exp(-1)) * 4 * entropy.item(), rel=1e-12)
    gradient, = torch.autograd.grad(loss, logits)
    assert gradient.abs().max() < 1e-12  # round-off


def test_a_sample_that_the_student_knows_weighs_nothing():
    logits = 1e3 * torch.eye(5, dtype=torch.float64)[LABELS].requires_grad_()
    assert weighted_soft_loss(logits, randn(6, 5), LABELS).item() == pytest.approx(0., abs=1e-12)
    certain = 1e3 * torch.eye(5, dtype=torch.float64)[LABELS]  # the teacher's cross-entropy is 0
    soft = weighted_soft_loss(randn(6, 5), certain, LABELS, 1.)
    assert soft.item() == pytest.approx(kd_loss(randn(6, 5), certain, 1.).item(), rel=1e-12)  # w = 1, entropy 0


def test_soft_targets_weigh_alike():
    logits, teacher = 2 * randn(6, 5), 2 * randn(6, 5, seed=1)
    soft = torch.eye(5)[LABELS]
    assert weighted_soft_loss(logits, teacher, soft).item() == pytest.approx(
        weighted_soft_loss(logits, teacher, LABELS).item(), rel=1e-12)


def test_loss_against_loops():
    """In evaluation there is no mask; the generator is two zero-padded convolutions."""
    loss, step = _loss(feature_weight=2., logit_weight=.5).eval(), _step()
    first, second = loss.generator[0], loss.generator[2]

    def convolve(layer, image):
        channels, size = image.shape[0], image.shape[-1]
        out = []
        for k in range(layer.weight.shape[0]):
            for i in range(size):
                for j in range(size):
                    out.append(layer.bias[k] + sum(
                        layer.weight[k, c, di + 1, dj + 1] * image[c, i + di, j + dj]
                        for c in range(channels) for di in (-1, 0, 1) for dj in (-1, 0, 1)
                        if 0 <= i + di < size and 0 <= j + dj < size))
        return torch.stack(out).view(-1, size, size)

    student, teacher, total = step.student_features[0], step.teacher_features[0][0], 0.
    for b in range(2):
        mean = sum(student[t, b] for t in range(2)) / 2
        total = total + (convolve(second, convolve(first, mean).clamp(min=0)) - teacher[b]).square().sum()
    part = make_step(step.step_logits[:, :2], step.teacher_logits[:2], LABELS[:2],
                     student_features=[s[:, :2] for s in step.student_features],
                     teacher_features=[a[:, :2] for a in step.teacher_features])
    logits = weighted_soft_loss(part.logits, part.teacher_logits, LABELS[:2])
    expected = 2. * total / (2 * 5 * 16) + .5 * logits
    assert_equal_with_gradient(loss(part), expected, [student, first.weight, second.weight])


def test_masks_leave_out_channels_of_samples_in_training_only():
    loss, step = _loss(mask=.4, logit_weight=0.), _step()
    step.student_features = [step.student_features[0].abs() + 1., step.student_features[1]]
    seen = []
    loss.generator.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    torch.manual_seed(0)
    for _ in range(200):
        loss.train()(step)
    mean = step.student_features[0].mean(0)
    kept = torch.stack([(x / mean).flatten(2) for x in seen])
    assert ((kept == 0) | (kept == 1)).all() and (kept == kept[..., :1]).all()  # whole channels
    share = 1 - kept[..., 0].mean().item()
    assert abs(share - .4) < 4 * math.sqrt(.4 * .6 / (200 * 6 * 3))  # four standard errors
    loss.eval()(step)
    assert torch.equal(seen[-1], mean)


def test_the_last_tap_with_spatial_axes_is_restored():
    assert [type(layer) for layer in _loss().generator] == [nn.Conv2d, nn.ReLU, nn.Conv2d]
    taps = dict(names=['a'], student_channels=[3], teacher_channels=[4])
    assert isinstance(create_loss('bkdsnn', **taps, student_shapes=[(2, 3)], teacher_shapes=[(1, 4)]).generator[0],
                      nn.Linear)
    with pytest.raises(ValueError, match='mask=1.5'):
        _loss(mask=1.5)


def test_generator_is_trained_in_a_task():
    torch.manual_seed(0)
    student = timm.create_model('spiking_test_resnet', num_classes=5, timesteps=2)
    task = SSCLTask(student, timm.create_model('test_resnet', num_classes=5), {'bkdsnn': 1.}, verbose=False,
                    input_size=(3, 32, 32)).train()
    loss = task.trainable_module.losses['bkdsnn']
    assert loss.tap == 3  # of four stages and the pooled feature
    task(torch.randn(4, 3, 32, 32), torch.arange(4))['loss'].backward()
    assert all(p.grad.abs().max() > 0 for p in loss.parameters())
