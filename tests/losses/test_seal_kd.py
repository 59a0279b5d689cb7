"""SeAl-KD against loops: corrected logits at wrong predictions, and agreement between timesteps."""
import math

import pytest
import torch
from loops import LABELS, assert_equal_with_gradient, kl, make_step, randn, softmax

from timm_sscl import create_loss
from timm_sscl.losses import error_aware_loss, kd_step_loss, step_agreement_loss, tet_loss


def _logits(timesteps=3):
    return (2 * randn(timesteps, 6, 5)).requires_grad_(), 2 * randn(6, 5, seed=1)


def _error_aware(o, teacher, temperature):
    total, wrong = 0., 0
    for step in o:
        for row, a, y in zip(step, teacher, LABELS.tolist()):
            row, a, predicted = list(row), list(a), row.argmax().item()
            if predicted != y:
                row[predicted] = row[y]
                a[predicted] = a[y] = min(a[predicted], a[y])
                wrong += 1
            total = total + kl(softmax(a, temperature), softmax(row, temperature))
    assert wrong > 3
    return temperature ** 2 * total / (len(o) * 6)


def _agreement(o, temperature):
    total = 0.
    for b in range(6):
        rows = [row.detach() for row in o[:, b]]
        confidence = []
        for row in rows:
            p = softmax(row)
            confidence.append(1 + sum(x * torch.log(x) for x in p) / math.log(5))
        for i in range(len(o)):
            others = [j for j in range(len(o)) if j != i]
            scores = [confidence[j] * (rows[i] @ rows[j]) / (rows[i].norm() * rows[j].norm()) for j in others]
            mean = sum(w * rows[j] for w, j in zip(softmax(scores), others))
            total = total + kl(softmax(mean, temperature), softmax(o[i, b], temperature))
    return temperature ** 2 * total / (len(o) * 6)


@pytest.mark.parametrize('timesteps', [1, 3])
def test_error_aware_against_loops(timesteps):
    o, teacher = _logits(timesteps)
    assert_equal_with_gradient(error_aware_loss(o, teacher, LABELS, 2.), _error_aware(o, teacher, 2.), [o])


def test_agreement_against_loops():
    o, _ = _logits()
    assert_equal_with_gradient(step_agreement_loss(o, 2.), _agreement(o, 2.), [o])


def test_right_predictions_leave_kd_step():
    o, teacher = _logits()
    right = o.detach() + 20 * torch.eye(5, dtype=torch.float64)[LABELS]
    assert error_aware_loss(right, teacher, LABELS).item() == pytest.approx(
        kd_step_loss(right, teacher, 3.).item(), rel=1e-12)


def test_agreeing_steps_and_a_single_one_are_zero():
    o = 2 * randn(6, 5)
    assert step_agreement_loss(o.repeat(3, 1, 1)).item() == pytest.approx(0., abs=1e-12)  # round-off
    assert step_agreement_loss(o.repeat(1, 1, 1)).item() == 0.


def test_silent_steps_are_finite():
    """A student that fires nothing has equal logits, of no direction."""
    o = torch.zeros(2, 6, 5, requires_grad=True)
    loss = step_agreement_loss(o)
    loss.backward()
    assert loss.item() == 0. and o.grad.isfinite().all()


def test_sum():
    o, teacher = _logits()
    loss = create_loss('seal_kd', error_weight=2., agreement_weight=3., temperature=2.)
    expected = tet_loss(o, LABELS, 0.) + 2 * _error_aware(o, teacher, 2.) + 3 * _agreement(o, 2.)
    assert_equal_with_gradient(loss(make_step(o, teacher)), expected, [o])
    with pytest.raises(ValueError, match='temperature=0'):
        create_loss('seal_kd', temperature=0)
