"""SSCL takes spikes of all kinds: ternary, of several levels, with amplitudes, analog; against the loss by loops."""
import pytest
import torch
from sscl_reference import (
    BATCH_ONLY, REFERENCE_TOL, attach, create, gradients, images_of, outputs_of, reference, tapped, teacher_features)

from timm_sscl import calibrate

LEVELS = {'ternary': {-1., 0., 1.}, 'mlf': {0., 1., 2., 3.}, 'ilif': {0., 1., 2., 3., 4.}, 'real_spike': {0., 1.}}


@pytest.mark.parametrize('neuron', [*LEVELS, 'liaf'])
def test_value_and_gradients(neuron):
    student, teacher = create('spiking_test_resnet', neuron=neuron).train(), create('test_resnet')
    x = images_of()
    calibrate(student, x)
    sscl = attach(student, teacher, cka_floor=.02, **BATCH_ONLY)
    with outputs_of(*tapped(student)) as features:
        student(x)
    if neuron in LEVELS:
        seen = set(torch.cat([f.flatten() for f in features[:4]]).unique().tolist())
        assert seen <= LEVELS[neuron] and len(seen) >= min(3, len(LEVELS[neuron]))  # levels beyond 0 and 1 occur
    value = sscl(x)
    expected, layers = reference(sscl, [(features, teacher_features(teacher, x))], floor=.02, momentum=1.)
    assert value.item() == pytest.approx(expected, **REFERENCE_TOL)
    assert sum(cka > .02 for cka, *_ in layers) >= 3  # not all on the floor, where a wrong CKA would pass
    value.backward()
    inside = [module for name, module in student.named_modules() if name in ('conv1', 'layer1', 'layer2', 'layer4')]
    assert all(grad.isfinite().all() for grad in gradients(*inside)) and any(g.any() for g in gradients(*inside))
