"""SEW, MS and DS: their blocks by hand, identities to the bit, ANN weights, checkpoints, and where they are refused."""
import copy

import pytest
import timm
import torch
import torch.nn as nn

from timm_sscl import LIF, SpikingNeuron, calibrate, convert_ann, convert_to_spiking, register_neuron, share_stem
from timm_sscl.report import count_macs

T, B, K = 2, 3, 4
KINDS = [('sew', dict(connect='add')), ('sew', dict(connect='and')), ('sew', dict(connect='iand')), ('ms', {})]
IDS = ['add', 'and', 'iand', 'ms']


def _create(residual=None, options=(), name='test_resnet', **kwargs):
    torch.manual_seed(0)
    return timm.create_model(f'spiking_{name}', num_classes=K, timesteps=T, residual=residual,
                             residual_kwargs=dict(options), **kwargs)


def _images(n=B):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def _blocks(model):
    """Blocks in the order in which they run."""
    return [m for m in model.modules() if isinstance(m, (timm.models.resnet.BasicBlock, timm.models.resnet.Bottleneck))]


def _awake(model):
    """With parameters other than the initial ones, and statistics of the images."""
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    calibrate(model, _images())
    for _ in range(5):
        model.train()(_images(8))
    return model.eval()


def _logits(model):
    with torch.no_grad():
        return model(_images(), per_step=True)


def _neuron(neuron, x):
    """A LIF by its recursion: hard reset to 0."""
    x = x if neuron.gain is None else x * neuron.gain
    v, out = 0., []
    for x_t in x.unflatten(0, (T, -1)):
        u = neuron.tau * v + x_t
        s = (u >= neuron.v_threshold).to(u)
        out.append(s)
        v = u * (1 - s)
    return torch.cat(out)


def _branch(block, x, last):
    """The residual branch by hand; `last` of the neurons is left out."""
    n = 3 if hasattr(block, 'conv3') else 2
    for i in range(1, n + 1):
        x = getattr(block, f'bn{i}')(getattr(block, f'conv{i}')(x))
        if i < n:
            x = _neuron(getattr(block, f'act{i}'), x)
    return x if block.se is None else block.se(x)


def _block(residual, connect, block, x):
    """A block as the papers draw it."""
    last = block.act3 if hasattr(block, 'conv3') else block.act2
    convs = [m for m in block.downsample or () if not isinstance(m, SpikingNeuron)]
    shortcut = nn.Sequential(*convs)(x)
    if residual == 'ms':
        return shortcut + _branch(block, _neuron(last, x), last)
    if convs:
        shortcut = _neuron(block.downsample[-1], shortcut)
    spikes = _neuron(last, _branch(block, x, last))
    return {'add': spikes + shortcut, 'and': spikes * shortcut, 'iand': shortcut * (1 - spikes)}[connect]


@pytest.mark.parametrize('residual, options', KINDS, ids=IDS)
def test_blocks_by_hand(residual, options):
    model = _awake(_create(residual, options))
    seen = []
    for block in _blocks(model):
        block.register_forward_hook(lambda m, args, out: seen.append((m, args[0].clone(), out)))
    _logits(model)
    assert len(seen) == 4 and {hasattr(m, 'conv3') for m, _, _ in seen} == {False, True}  # of both kinds
    active = 0
    with torch.no_grad():
        for block, x, out in seen:
            expected = _block(residual, options.get('connect'), block, x)
            assert torch.equal(out, expected)
            active += bool(out.any())
            if options.get('connect') in ('and', 'iand'):
                assert set(out.unique().tolist()) <= {0., 1.}
            elif residual == 'sew':
                assert torch.equal(out, out.round()) and 0 <= out.min() and out.max() <= 2
    assert active == 4 or options.get('connect') == 'and'  # a conjunction is sparse


def test_gradient_of_a_block_with_a_shortcut_of_membranes():
    model = _create('ms')
    block = next(b for b in _blocks(model) if b.downsample is None)
    last = block.bn3 if hasattr(block, 'bn3') else block.bn2
    nn.init.zeros_(last.weight)
    x = torch.randn(T * B, block.conv1.in_channels, 4, 4, requires_grad=True)
    with model.time_folded():
        out = block(x)
    assert torch.equal(out, x)
    grad, = torch.autograd.grad(out.sum(), x)
    assert torch.equal(grad, torch.ones_like(x))


@pytest.mark.parametrize('residual, options', [KINDS[0], KINDS[2], KINDS[3]], ids=['add', 'iand', 'ms'])
def test_zero_scale_makes_the_identity_and_calibration_keeps_it(residual, options, caplog):
    model = _create(residual, options, name='resnet20_cifar', width=8)
    last = [b.bn2 for b in _blocks(model)]
    assert not any(norm.weight.any() for norm in last)  # timm's initialisation
    with caplog.at_level('INFO', logger='timm_sscl'):
        calibrate(model, _images())
    assert not any(norm.weight.any() for norm in last) and 'never fire' not in caplog.text
    assert ('8 neuron layers have no current yet' in caplog.text) == (residual == 'sew')
    plain = [b for b in _blocks(model) if b.downsample is None]
    assert len(plain) == 5
    seen = []
    for block in plain:
        block.register_forward_hook(lambda m, args, out: seen.append(torch.equal(args[0], out) and bool(out.any())))
    model.train()(_images())
    assert seen == [True] * 5
    out = model(_images()).square().sum()
    out.backward()
    assert all(norm.weight.grad is not None for norm in last)


def test_zero_scale_of_a_conjunction_is_revived():
    model = _create('sew', dict(connect='and'), name='resnet20_cifar', width=8)
    calibrate(model, _images())
    assert all(b.bn2.weight.any() for b in _blocks(model))


@pytest.mark.parametrize('residual, options', KINDS, ids=IDS)
def test_weights_of_an_ann_checkpoints_and_copies(residual, options, tmp_path):
    ann = timm.create_model('test_resnet', num_classes=K)
    model = _create(residual, options)
    model.load_state_dict(ann.state_dict(), strict=True)
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in ann.state_dict().items())
    model = _awake(model)
    expected = _logits(model)
    loaded = timm.create_model('spiking_test_resnet', num_classes=K).eval()
    loaded.load_state_dict(model.state_dict())
    assert dict(loaded.settings.residual_kwargs) == options
    torch.save(model.state_dict(), tmp_path / 'm.pth')
    overlay = dict(file=str(tmp_path / 'm.pth'), num_classes=K)
    pretrained = timm.create_model(
        'spiking_test_resnet', num_classes=K, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    for other in loaded, pretrained, copy.deepcopy(model):
        assert other.settings == model.settings and torch.equal(_logits(other), expected)
        assert other.state_dict().keys() == model.state_dict().keys()
    plain = timm.create_model('spiking_test_resnet', num_classes=K).eval()
    loaded._explicit = frozenset()
    loaded.load_state_dict(plain.state_dict())
    assert loaded.settings.residual is None and torch.equal(_logits(loaded), _logits(plain))
    assert loaded.state_dict().keys() == plain.state_dict().keys()
    assert [r.now for r in loaded.spiking_report()] == [r.now for r in plain.spiking_report()]


@pytest.mark.parametrize('residual, options', KINDS, ids=IDS)
def test_timesteps_another_neuron_and_gradients(residual, options):
    model = _create(residual, options)
    model.set_timesteps(3)
    assert {n.timesteps for n in model.neurons().values()} == {3} and len(_logits(model)) == 3
    calibrate(model, _images())
    model.train()(_images(4)).square().sum().backward()
    grads = [p.grad for p in model.parameters()]
    assert all(g is not None for g in grads) and sum(bool(g.any()) for g in grads) > len(grads) / 2

    class Other(LIF):
        pass

    register_neuron('other_lif')(Other)
    model.load_state_dict(_create(residual, options, neuron='other_lif').state_dict())
    assert {type(n) for n in model.neurons().values()} == {Other}
    assert set(model.neurons()) == set(_create(residual, options).neurons())


def test_report_names_what_was_added_and_taken():
    sew, ms = (_create(residual, name='resnet18').spiking_report() for residual in ('sew', 'ms'))
    assert {r.name for r in sew if r.reason == "added by residual='sew'"} == {
        f'layer{i}.0.downsample.2' for i in (2, 3, 4)} <= {r.name for r in sew.neurons}
    taken, = [r for r in ms if r.name == 'act1']
    assert taken.now == 'NoNeuron' and "residual='ms'" in taken.reason and taken not in ms.neurons
    assert [r.name for r in ms if r.reason == "added by residual='ms'"] == ['layer4.act']
    assert 'convolutions of shortcuts are multiply-accumulates' in str(ms)
    assert 'SEW: ' in str(sew) and 'MS: ' in str(ms) and {r.now for r in ms.variants['residual']} == {'MS'}


def test_macs_of_sums_are_additions_and_those_of_analog_shortcuts_are_not():
    model = _awake(_create('sew', name='resnet18'))
    macs = count_macs(model, _images(1))
    assert macs.by_module['layer1.1.conv1']['analog'] == 0 and macs.by_module['layer2.0.downsample.0']['analog'] == 0
    model = _awake(_create('ms', name='resnet18'))
    macs = count_macs(model, _images(1))
    assert macs.by_module['layer1.1.conv1']['analog'] == 0 < macs.by_module['layer1.1.conv1']['binary']
    assert macs.by_module['layer2.0.downsample.0']['binary'] == 0 < macs.by_module['layer2.0.downsample.0']['analog']


def test_tdbn_knows_where_spikes_are_added():
    def alphas(**options):
        report = timm.create_model('spiking_resnet18', norm='tdbn', num_classes=K, **options).spiking_report()
        return {r.alpha for r in report.norms}

    assert alphas() == {1., .5 ** .5} == alphas(residual='ms') and alphas(residual='sew') == {1.}


def test_with_norms_and_the_stem():
    model = _create('ms', norm='tebn')
    assert len(_logits(model)) == T
    with pytest.raises(ValueError):  # its stem reaches the shortcut as it is
        share_stem(_create('ms', name='resnet18'))
    assert share_stem(_create('sew', name='resnet18')).settings.stem == 'act1'
    with pytest.raises(ValueError, match='SEW|MS'):
        convert_ann(_create('ms', name='resnet18'), _images())


def test_ds_takes_neurons_of_several_levels():
    with pytest.raises(ValueError, match="residual='ds': needs a neuron of several levels.*'lif' is binary"):
        _create('ds')
    model = _awake(_create('ds', neuron='mlf', norm='tdbn'))
    outs = []
    for block in _blocks(model):
        block.register_forward_hook(lambda m, args, out: outs.append(out))
    _logits(model)
    assert all(set(out.unique().tolist()) <= set(range(7)) for out in outs)  # two summands of 0 to 3
    assert max(out.max() for out in outs) > 2
    assert {r.now for r in model.spiking_report().variants['residual']} == {'DS'}


@pytest.mark.parametrize('name, message', [
    ('test_vit', 'VisionTransformer is no ResNet'), ('hrnet_w18_small', 'HighResolutionNet is no ResNet'),
    ('res2net50_14w_8s', r'layer1\.0 is a Bottle2neck'), ('vgg11_bn', 'VGG is no ResNet'),
    ('skresnet18', r'layer1\.0 is a SelectiveKernelBasic')])
@pytest.mark.parametrize('residual', ['sew', 'ms'])
def test_other_models_are_refused_by_name(name, message, residual):
    with torch.device('meta'):
        ann = timm.create_model(name)
    before = [type(m) for m in ann.modules()]
    with pytest.raises(ValueError, match=f"residual='{residual}': {message}"):
        convert_to_spiking(ann, residual=residual)
    assert [type(m) for m in ann.modules()] == before


def test_what_does_not_go_together_is_refused():
    for options, message in (
            (dict(residual='sew', residual_kwargs=dict(connect='or')), "connect='or': must be one of add, and, iand"),
            (dict(residual='sew', residual_kwargs=dict(connect='and'), drop_path_rate=.1), 'stochastic depth would'),
            (dict(residual='sew', exclude=['layer2.0.act2']), r'layer2\.0\.act2 is no neuron')):
        with pytest.raises(ValueError, match=message):
            timm.create_model('spiking_resnet18', **options)
    model = timm.create_model('spiking_resnet18', residual='sew', drop_path_rate=.1, timesteps=T, num_classes=K)
    assert torch.isfinite(model.train()(_images())).all()


@pytest.mark.parametrize('name', ['resnet50', 'resnet19_cifar', 'seresnet18', 'resnet18d', 'resnext50_32x4d'])
@pytest.mark.parametrize('residual', ['sew', 'ms'])
def test_resnets_of_timm_convert(name, residual):
    with torch.device('meta'):
        model = timm.create_model(f'spiking_{name}', residual=residual)
    neurons = model.neurons()
    assert ('act1' in neurons) == (residual == 'sew')
    assert any(name.endswith(('.act', 'downsample.2', 'downsample.3')) for name in neurons)
