"""MEOM against loops: the prediction of the next timestep, and a teacher per timestep."""
import pytest
import timm
import torch
import torch.nn as nn
from loops import LABELS, assert_equal_with_gradient, cross_entropy, kl, make_step, randn, softmax

from timm_sscl import SSCLTask, create_loss
from timm_sscl.losses import kd_step_loss, next_step_loss, tet_loss


def _loss(timesteps=3, **options):
    return create_loss(
        'meom', names=['pooled'], student_channels=[4], teacher_channels=[7],
        student_shapes=[(timesteps, 4)], teacher_shapes=[(1, 7)], **options).double()


def _step(timesteps=3):
    torch.manual_seed(0)
    head = nn.Linear(7, 5).double().requires_grad_(False)
    return make_step(
        (2 * randn(timesteps, 6, 5)).requires_grad_(), 2 * randn(6, 5, seed=1),
        student_features=[randn(timesteps, 6, 4, seed=2)], teacher_features=[randn(1, 6, 7, seed=3)],
        teacher_head=head)


def _next_step(o):
    total = 0.
    for b in range(o.shape[1]):
        for t in range(1, len(o)):
            now, after = (softmax([sum(o[i, b, k] for i in range(n)) / n for k in range(5)]) for n in (t, t + 1))
            total = total + cross_entropy([p.detach() for p in after], now)
    return total / (o.shape[1] * (len(o) - 1))


def test_next_step_against_loops():
    o = (2 * randn(3, 6, 5)).requires_grad_()
    assert_equal_with_gradient(next_step_loss(o), _next_step(o), [o])


def test_equal_timesteps_have_their_entropy():
    o = 2 * randn(6, 5)
    entropy = sum(cross_entropy(softmax(row), softmax(row)) for row in o) / 6
    assert next_step_loss(o.repeat(4, 1, 1)).item() == pytest.approx(entropy.item(), rel=1e-12)
    assert next_step_loss(o.repeat(1, 1, 1)).item() == 0.


def test_loss_against_loops():
    loss, step = _loss(mix=.3, mask=.4, temperature=2.), _step()
    o, head, masks = step.step_logits, step.teacher_head, loss.masks
    assert masks.shape == (3, 7) and set(masks.unique().tolist()) == {0., 1.}
    assert not torch.equal(masks[0], masks[1])
    total = 0.
    for t in range(3):
        for b, y in enumerate(LABELS):
            masked = [f * m for f, m in zip(step.teacher_features[0][0, b], masks[t])]
            others = [sum(w * f for w, f in zip(row, masked)) + bias for row, bias in zip(head.weight, head.bias)]
            teacher = [.7 * a + .3 * z for a, z in zip(step.teacher_logits[b], others)]
            total = total - torch.log(softmax(o[t, b])[y])
            total = total + .5 * 4 * kl(softmax(teacher, 2.), softmax(o[t, b], 2.))
    assert_equal_with_gradient(loss(step), total / 18 + .3 * _next_step(o), [o])


def test_without_the_masked_teacher_it_is_kd_step():
    step = _step()
    expected = (tet_loss(step.step_logits, LABELS, 0.) + .5 * kd_step_loss(step.step_logits, step.teacher_logits, 3.)
                + .3 * next_step_loss(step.step_logits))
    assert _loss(mix=0.)(step).item() == pytest.approx(expected.item(), rel=1e-12)


def test_masks_are_state_and_fixed():
    loss, step = _loss(mask=.5), _step()
    masks = loss.masks.clone()
    loss.train()(step)
    assert torch.equal(loss.masks, masks) and 'masks' in loss.state_dict()
    assert loss(_step(2)).isfinite()  # fewer timesteps use the first masks
    with pytest.raises(ValueError, match="loss 'meom': 4 timesteps, but it was built for 3"):
        loss(_step(4))
    for option in ('mix', 'mask'):
        with pytest.raises(ValueError, match=f'{option}=2'):
            _loss(**{option: 2.})


def test_in_a_task():
    torch.manual_seed(0)
    student = timm.create_model('spiking_test_resnet', num_classes=5, timesteps=2)
    teacher = timm.create_model('test_resnet', num_classes=5)
    task = SSCLTask(student, teacher, {'meom': 1.}, task_loss_weight=0., verbose=False, input_size=(3, 32, 32)).train()
    loss = task.trainable_module.losses['meom']
    assert loss.masks.shape == (2, teacher.num_features)
    task(torch.randn(4, 3, 32, 32), torch.arange(4))['loss'].backward()
    assert student.fc.weight.grad.abs().max() > 0
