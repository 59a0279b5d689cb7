"""Which activations become neurons: include, exclude, groups, and what a checkpoint keeps of it."""
import functools
import logging

import pytest
import timm
import torch
import torch.nn as nn

from spiking_families import B, K, Net
from timm_sscl import LIF, convert_to_spiking


def _left(model):
    return {r.name for r in model.spiking_report() if r.now != 'LIF'}


def test_exclude_by_name_class_and_surrounding():
    create = functools.partial(timm.create_model, 'spiking_seresnet18', num_classes=K)
    every = {r.name for r in create().spiking_report()}
    gates = _left(create())
    assert _left(create(exclude='layer4')) - gates == {n for n in every if n.startswith('layer4.')} - gates
    assert _left(create(exclude=['layer1.0.act1', 'act1'])) - gates == {'layer1.0.act1', 'act1'}
    se = {n for n in every if '.se.' in n} - gates
    assert se and _left(create(exclude=['squeeze_excite'])) - gates == se == _left(create(exclude=['SEModule'])) - gates
    model = create(include=['layer*', 'act1'], exclude='SEModule')
    assert _left(model) == gates | se and isinstance(model.act1, LIF)
    assert _left(create(include='act1')) == every - {'act1'}
    assert isinstance(create(include=['*', 'Sigmoid']).layer1[0].se.gate, LIF)
    assert not isinstance(create(include='*').layer1[0].se.gate, LIF)


def test_groups_attention_and_head():
    model = timm.create_model('spiking_efficientvit_b0', exclude=['attention', 'head'])
    kernels = [n for n in _left(model) if 'context_module' in n]
    assert (kernels and any(n.startswith('head.') for n in _left(model))
            and not any('local_module' in n for n in _left(model)))
    plain = timm.create_model('spiking_efficientvit_b0')
    assert all(n.endswith('.div') for n in _left(plain))  # what linear attention divides by
    head = timm.create_model('spiking_mobilenetv3_small_050', exclude='head')
    assert 'act2' in _left(head) and 'bn1.act' not in _left(head)


@pytest.mark.parametrize('name', ['include', 'exclude'])
def test_pattern_that_matches_nothing_raises_and_changes_nothing(name):
    model = Net()
    with pytest.raises(ValueError, match="'layer9'.*act"):
        convert_to_spiking(model, **{name: ['*', 'layer9']})
    assert type(model) is Net and type(model.act) is nn.ReLU


def test_nothing_left_to_swap_raises():
    with pytest.raises(ValueError, match='nothing would spike'):
        convert_to_spiking(Net(), exclude='*')


@pytest.mark.parametrize('name,policy', [
    ('test_efficientnet', dict(exclude=('squeeze_excite', 'head'))), ('test_efficientnet_evos', dict(exclude=('bn1',))),
    ('test_resnet', dict(include=('layer2', 'layer3', 'layer4'))), ('test_resnet', {})])
def test_policy_travels_with_the_checkpoint(name, policy):
    torch.manual_seed(0)
    source = timm.create_model(f'spiking_{name}', num_classes=K, timesteps=2, **policy).eval()
    x = torch.randn(B, 3, 64, 64)
    for earlier in ({}, dict(exclude=('*1*',))):  # of a checkpoint that was loaded before
        other = timm.create_model(f'spiking_{name}', num_classes=K, **earlier)
        model = timm.create_model(f'spiking_{name}', num_classes=K).eval()
        model.load_state_dict(other.state_dict(), strict=True)
        assert model.settings.exclude == other.settings.exclude == earlier.get('exclude')
        model.load_state_dict(source.state_dict(), strict=True)
        assert torch.equal(model(x), source(x)) and _left(model) == _left(source)
    kept = timm.create_model(f'spiking_{name}', num_classes=K, exclude=('*1*',)).eval()
    kept.load_state_dict(source.state_dict(), strict=False)  # an EvoNorm that stays analog misses its v
    assert kept.settings.exclude == ('*1*',)  # what was asked for stays


def test_policy_holds_for_a_new_head():
    model = timm.create_model('spiking_efficientvit_b0', exclude='head', num_classes=K)
    model.reset_classifier(4)
    assert any(n.startswith('head.') for n in _left(model)) and not any(
        isinstance(m, LIF) for m in model.head.modules())
    assert len({r.name for r in model.spiking_report()}) == len(model.spiking_report())


def test_anns_parameters_of_swapped_activations_load_strictly(caplog):
    ann = timm.create_model('poolformerv2_s12', num_classes=K)
    model = timm.create_model('spiking_poolformerv2_s12', num_classes=K)
    starrelu = [n for n, m in ann.named_modules() if type(m).__name__ == 'StarReLU']
    assert starrelu
    with caplog.at_level(logging.INFO, logger='timm_sscl'):
        model.load_state_dict(ann.state_dict(), strict=True)
    assert f'{2 * len(starrelu)} parameters' in caplog.text
    with pytest.raises(RuntimeError, match='nonsense'):
        model.load_state_dict({**ann.state_dict(), 'nonsense': torch.ones(1)})
