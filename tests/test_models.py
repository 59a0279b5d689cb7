import pytest
import timm
import torch

import timm_sscl  # registers the models
from timm_sscl.taps import find_taps


@pytest.mark.parametrize('num_classes, parameters', [(10, 11_247_946), (100, 11_294_116)])
def test_resnet20_cifar_has_the_papers_parameters(num_classes, parameters):
    model = timm.create_model('resnet20_cifar', num_classes=num_classes)
    # by the layer list: stem, then per block two 3x3 convolutions and a 1x1 shortcut where the width changes
    expected = 3 * 64 * 9 + 2 * 64 * 64 * 9 + 3 * 2 * 64 + 512 * num_classes + num_classes
    inplanes = 64
    for planes in (64, 128, 256, 512):
        expected += inplanes * planes * 9 + 3 * planes * planes * 9 + 4 * 2 * planes
        expected += (inplanes * planes + 2 * planes) if inplanes != planes else 0
        inplanes = planes
    assert sum(p.numel() for p in model.parameters()) == expected == parameters


def test_resnet20_cifar_stages_width_and_spiking_twin():
    model = timm.create_model('spiking_resnet20_cifar', width=8, timesteps=3, num_classes=5)
    final, stages = model.forward_intermediates(torch.randn(2, 3, 32, 32))
    assert [tuple(s.shape[1:]) for s in stages] == [(8, 32, 32), (8, 16, 16), (16, 8, 8), (32, 4, 4), (64, 2, 2)]
    assert [32 // s.shape[-1] for s in stages] == [info['reduction'] for info in model.feature_info]
    assert [s.shape[1] for s in stages] == [info['num_chs'] for info in model.feature_info]
    assert [tap.channels for tap in find_taps(model)] == [8, 16, 32, 64, 64]


def test_resnet20_cifar_rejects_an_odd_width():
    with pytest.raises(ValueError, match='width=7'):
        timm.create_model('resnet20_cifar', width=7)


def test_last_norm_of_a_block_starts_at_zero():
    model = timm.create_model('resnet20_cifar', width=8)
    assert all((block.bn2.weight == 0).all() for stage in (model.layer1, model.layer4) for block in stage)
