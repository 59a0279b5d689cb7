"""timm_sscl.load: a model from its file alone, with equal logits, and what it says where the file does not suffice."""
import argparse
import tarfile

import pytest
import safetensors.torch
import timm
import torch
import torch.nn as nn
from data_0_1_0 import make

from timm_sscl import (
    SpikingNeuron, accept_frames, calibrate, convert_ann, convert_to_spiking, load, register_neuron, share_stem,
    unregister_neuron)
from timm_sscl.conversion.settings import SETTINGS_KEY
from timm_sscl.export import save_for_hub
from timm_sscl.models.loading import DESCRIPTION_KEY, describe_model

TAKES = 'load takes a checkpoint of train.py .*state dict .*folder with a config.json'
NAME, WIDTH = 'spiking_resnet20_cifar', dict(width=8, layers=(1, 1), num_classes=5)


def images(batch=4):
    return 2 * torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def trained(**kwargs):
    """A model whose weights and statistics are not the initial ones."""
    torch.manual_seed(0)
    model = timm.create_model(NAME, **{**WIDTH, **kwargs})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(.1 * torch.randn_like(p))
        model.train()(images(8))
    return model.eval()


def with_more_timesteps():
    return trained(timesteps=2).set_timesteps(3)


def with_gains_and_a_shared_stem():
    model = trained(timesteps=2, tau=.5, v_reset='soft')
    calibrate(model, images(8))
    return share_stem(model)


def from_an_ann():
    torch.manual_seed(0)
    ann = timm.create_model(NAME.removeprefix('spiking_'), **WIDTH)
    ann.train()(images(8))
    return convert_ann(ann.eval(), images(8), timesteps=4)


def of_another_head():
    model = trained(timesteps=2, exclude='layer2')
    model.reset_classifier(7)
    return model


def of_a_variant():
    return trained(timesteps=3, norm='tebn', neuron='plif', neuron_kwargs=dict(v_threshold=.1), surrogate='atan',
                   residual='sew')


def of_another_variant():
    return trained(timesteps=2, neuron='ilif', neuron_kwargs=dict(max_spikes=3), norm='bntt', residual='ms')


ARMS = [with_more_timesteps, with_gains_and_a_shared_stem, from_an_ann, of_another_head, of_a_variant,
        of_another_variant, lambda: trained(timesteps=2, norm='mpbn')]


@torch.no_grad()
def assert_same(model, source):
    assert type(model) is type(source) and not model.training and model.settings == source.settings
    out = source(images(), per_step=True)
    assert out.std(1).max() > 1e-3  # images matter
    assert torch.equal(model(images(), per_step=True), out)
    states = source.state_dict(), model.state_dict()
    assert list(states[0]) == list(states[1]) and all(torch.equal(*pair) for pair in zip(*map(dict.values, states)))


@pytest.mark.parametrize('make_source', ARMS)
def test_a_state_dict_suffices(make_source, tmp_path):
    source = make_source()
    torch.save(source.state_dict(), tmp_path / 'model.pth')
    assert_same(load(tmp_path / 'model.pth'), source)


def test_formats(tmp_path):
    """safetensors, DDP's names, a precision of its own, averaged weights beside others."""
    source, other = trained(timesteps=2), trained(timesteps=3)
    safetensors.torch.save_file(source.state_dict(), tmp_path / 'model.safetensors')
    torch.save({f'module.{k}': v for k, v in source.state_dict().items()}, tmp_path / 'ddp.pth')
    torch.save(dict(state_dict=other.state_dict(), state_dict_ema=source.state_dict()), tmp_path / 'both.pth.tar')
    for file in ('model.safetensors', 'ddp.pth', 'both.pth.tar'):
        assert_same(load(tmp_path / file), source)
    assert_same(load(tmp_path / 'both.pth.tar', use_ema=False), other)
    half = source.bfloat16()
    torch.save(half.state_dict(), tmp_path / 'half.pth')
    with torch.no_grad():
        out, expected = (model(images().bfloat16(), per_step=True) for model in (load(tmp_path / 'half.pth'), half))
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)


def test_arguments_take_precedence_and_the_files_do_not(tmp_path):
    source = trained(timesteps=2, tau=.5)
    torch.save(source.state_dict(), tmp_path / 'model.pth')
    model = load(str(tmp_path / 'model.pth'), timesteps=5)
    assert model.timesteps == 5 and model.settings.tau == .5
    model.load_state_dict(trained(timesteps=3, tau=.75).state_dict())  # tau was not asked for, T was
    assert model.timesteps == 5 and model.settings.tau == .75


def test_what_no_file_can_hold_is_asked_for(tmp_path):
    source = trained(timesteps=2, norm_layer=nn.BatchNorm2d)
    torch.save(source.state_dict(), tmp_path / 'model.pth')
    with pytest.raises(ValueError, match=r"created with norm_layer=<class .*give it again: load\(file, norm_layer="):
        load(tmp_path / 'model.pth')
    assert_same(load(tmp_path / 'model.pth', norm_layer=nn.BatchNorm2d), source)


def test_ann_checkpoints(tmp_path):
    """train.py describes ANNs, too, and how they take event frames."""
    torch.manual_seed(0)
    ann = accept_frames(timm.create_model('resnet20_cifar', **WIDTH), 'mean').eval()
    torch.save({'state_dict': ann.state_dict(), DESCRIPTION_KEY: describe_model(ann)}, tmp_path / 'ann.pth.tar')
    frames = torch.rand(2, 3, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / 'ann.pth.tar')(frames), ann(frames))


def test_a_plug_in_that_is_missing_is_named(tmp_path):
    class Mine(SpikingNeuron):
        output = 'binary'

        def start(self, x):
            return torch.zeros_like(x)

        @staticmethod
        def step(x_t, state, constants, t, settings):
            return (x_t + state > 1).to(x_t.dtype) + 0 * x_t, state

    register_neuron('mine_of_a_file')(Mine)
    try:
        state = timm.create_model(NAME, neuron='mine_of_a_file', **WIDTH).state_dict()
    finally:
        unregister_neuron('mine_of_a_file')
    torch.save(state, tmp_path / 'model.pth')
    args = argparse.Namespace(plugin=[str(tmp_path / 'my_neuron.py')], model=NAME)
    torch.save(dict(state_dict=state, args=args), tmp_path / 'run.pth.tar')
    for file, text in (
            ('model.pth', r'\(train.py --plugin FILE\|MODULE\)'), ('run.pth.tar', '--plugin .*my_neuron.py')):
        with pytest.raises(ValueError, match=f"{file}.*neuron 'mine_of_a_file', which is not registered.*{text}"):
            load(tmp_path / file)


def test_an_architecture_that_is_missing_is_named(tmp_path):
    described = dict(architecture='net_of_a_plug_in', args={})
    torch.save({'state_dict': {'weight': torch.ones(1)}, DESCRIPTION_KEY: described}, tmp_path / 'x.pth.tar')
    with pytest.raises(ValueError, match="'net_of_a_plug_in', which is not registered. Import the plug-in"):
        load(tmp_path / 'x.pth.tar')


def test_models_that_a_file_does_not_describe(tmp_path):
    own = convert_to_spiking(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), timesteps=2)
    torch.save(own.state_dict(), tmp_path / 'own.pth')
    torch.save(timm.create_model('resnet20_cifar', **WIDTH).state_dict(), tmp_path / 'ann.bin')
    with pytest.raises(ValueError, match="ann.bin' holds weights alone.* of an ANN names no model. Create the model"):
        load(tmp_path / 'ann.bin')
    with pytest.raises(ValueError, match='does not say which model it holds.*not created by timm'):
        load(tmp_path / 'own.pth')
    changed = trained(timesteps=2)
    changed.fc = nn.Sequential(nn.Linear(changed.num_features, 3), nn.Linear(3, 5))
    torch.save(changed.state_dict(), tmp_path / 'changed.pth')
    with pytest.raises(ValueError, match=f'do not fit {NAME} .*changes of the model by hand'):
        load(tmp_path / 'changed.pth')
    torch.save(own, tmp_path / 'pickle.pth')
    with pytest.raises(ValueError, match=r'save model.state_dict\(\), not the model'):
        load(tmp_path / 'pickle.pth')
    with pytest.raises(FileNotFoundError, match=f'none.pth.*{TAKES}.*the folder has changed.pth, own.pth, pickle.pth'):
        load(tmp_path / 'none.pth')
    with pytest.raises(FileNotFoundError, match='without a config.json; name a file in it: changed.pth'):
        load(tmp_path)


@pytest.mark.parametrize('name', ['summary.csv', 'args.yaml', 'cka.png', 'empty.pth.tar', 'text.safetensors'])
def test_files_that_are_no_checkpoints(tmp_path, name):
    (tmp_path / name).write_bytes(b'' if name.startswith('empty') else b'epoch,lr,top1,loss')
    with pytest.raises(ValueError, match=f'{name}.*is no file of weights.*{TAKES}'):
        load(tmp_path / name)


def test_folders_without_a_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=f'without a config.json; name a file. {TAKES}'):
        load(tmp_path)


def test_arguments_without_room_in_the_file(tmp_path):
    """Settings and a description that are too long together: the settings stay, the file says that it lacks the rest.
    """
    model = trained(timesteps=2)
    model._model_args = {**model._model_args, 'note': [hash(str(i)) for i in range(2000)]}
    torch.save(model.state_dict(), tmp_path / 'long.pth')
    with pytest.raises(ValueError, match='does not say which model it holds'):
        load(tmp_path / 'long.pth')
    again = timm.create_model(NAME, checkpoint_path=tmp_path / 'long.pth', **WIDTH)
    assert again.settings == model.settings


def test_run_of_0_1_0(tmp_path):
    """By the options in its checkpoint; the classes come from the classifier where the options do not say them."""
    with tarfile.open(make.HERE / 'run.tar.xz') as archive:
        archive.extractall(tmp_path)
    file = tmp_path / 'out/run/last.pth.tar'
    by_hand = timm.create_model('spiking_test_vit', checkpoint_path=file, **{**make.VIT, 'num_classes': 10}).eval()
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(file, weights_only=True)
    content['args'].num_classes = None
    torch.save(content, tmp_path / 'other.pth.tar')
    for found in (file, tmp_path / 'other.pth.tar'):
        model = load(found)
        assert model.settings == by_hand.settings and model.timesteps == 3 and model.settings.tau == .5
        with torch.no_grad():
            assert torch.equal(model(make.images(), per_step=True), by_hand(make.images(), per_step=True))
    with pytest.raises(ValueError, match='written by version 0.1.0.*load_checkpoint'):
        load(make.HERE / 'calibrated_vit.pth')


@pytest.fixture(scope='module', params=[True, False])
def saved(request, tmp_path_factory):
    """Whether a model spikes, and a folder with a hub folder and a file of it."""
    folder = tmp_path_factory.mktemp('saved')
    if request.param:
        source = with_gains_and_a_shared_stem()
        save_for_hub(source, folder / 'hub')
        torch.save(source.state_dict(), folder / 'model.pth')
    else:
        source = timm.create_model(NAME.removeprefix('spiking_'), **WIDTH)
        timm.models.save_for_hf(source, folder / 'hub', safe_serialization=True)
        torch.save({'state_dict': source.state_dict(), DESCRIPTION_KEY: describe_model(source)}, folder / 'model.pth')
    return request.param, folder


@pytest.mark.parametrize('kwargs', [
    dict(features_only=True, out_indices=(0, 1, 2)), dict(features_only=True, out_indices=(1, 2), timesteps=3),
    dict(num_classes=0), dict(num_classes=7), dict(in_chans=1), dict(in_chans=4, num_classes=7),
    dict(global_pool='max')])
def test_weights_are_adapted_as_timm_adapts_pretrained_ones(saved, kwargs, caplog):
    """Against timm's own way through a folder."""
    spiking, folder = saved
    kwargs = kwargs if spiking else {name: value for name, value in kwargs.items() if name != 'timesteps'}
    expected = timm.create_model(f"local-dir:{folder / 'hub'}", pretrained=True, **kwargs).eval()
    caplog.clear()
    model = load(folder / 'model.pth', **kwargs)
    assert type(model) is type(expected) and not model.training and 'state_dict' not in model.pretrained_cfg
    states = [{k: v for k, v in m.state_dict().items() if k not in ('fc.weight', 'fc.bias', SETTINGS_KEY)}
              for m in (model, expected)]
    assert states[0].keys() == states[1].keys() and all(torch.equal(*pair) for pair in zip(*map(dict.values, states)))
    other_head = kwargs.get('num_classes', 0) > 0
    assert ('fc.weight, fc.bias are not in the file' in caplog.text) == other_head
    if not other_head:
        x = images()[:, :1] if kwargs.get('in_chans') == 1 else images()
        with torch.no_grad():
            outputs, wanted = model(x), expected(x)
        as_list = (lambda out: out if isinstance(out, list) else [out])
        assert all(torch.equal(*pair) for pair in zip(as_list(outputs), as_list(wanted), strict=True))
    if spiking:
        assert model.timesteps == kwargs.get('timesteps', 2) and model.settings.tau == .5
        assert model.pretrained_cfg == load(folder / 'model.pth').pretrained_cfg or kwargs.get('features_only')


def test_settings_are_shown_as_they_are_given():
    model = trained(timesteps=2, neuron='plif', neuron_kwargs=dict(tau=.7), surrogate_kwargs=dict(alpha=3.))
    shown = eval(f'dict({model.settings})')
    assert shown['neuron_kwargs']['tau'] == .7 and shown['surrogate_kwargs'] == dict(alpha=3.)
    assert trained(**{'neuron': 'plif', **shown}).settings == model.settings


def test_the_folder_of_a_run_gives_its_best_epoch(tmp_path):
    best, last = trained(timesteps=2), trained(timesteps=3)
    for model, name in ((best, 'model_best.pth.tar'), (last, 'last.pth.tar')):
        torch.save(dict(state_dict=model.state_dict()), tmp_path / name)
    assert_same(load(tmp_path), best)


def test_preprocessing_of_a_run_is_adapted_too(tmp_path):
    source = trained(timesteps=2)
    used = dict(input_size=(3, 16, 16), mean=(.1, .2, .3), std=(.4, .5, .6), interpolation='bilinear', crop_pct=1.)
    torch.save(dict(state_dict=source.state_dict(), args=dict(data_config=used)), tmp_path / 'run.pth.tar')
    config = load(tmp_path / 'run.pth.tar', in_chans=1).pretrained_cfg
    assert config['input_size'] == (1, 16, 16) and config['mean'] == pytest.approx((.2,))
    assert load(tmp_path / 'run.pth.tar', features_only=True, out_indices=(1, 2)).pretrained_cfg['mean'] == (.1, .2, .3)
    with pytest.raises(ValueError, match=f'do not fit {NAME} .*load was given .*layers'):
        load(tmp_path / 'run.pth.tar', layers=(2, 2), width=4)


def test_weights_of_stages_alone_give_no_classifier(tmp_path):
    """Files of a ConvNeXt's stages have other names, which timm's conversion of weights takes for another project's."""
    stages = timm.create_model('spiking_test_convnext', num_classes=3, timesteps=2, features_only=True)
    torch.save(stages.state_dict(), tmp_path / 'stages.pth')
    with pytest.raises(ValueError, match="do not fit spiking_test_convnext .*load was given {'features_only': False}"):
        load(tmp_path / 'stages.pth', features_only=False)


@pytest.mark.parametrize('name', ['resnet', 'vit', 'efficientnet', 'convnext'])
def test_features_name_what_starts_at_random(name, tmp_path, caplog):
    """timm loads the weights of features without a check; its wrappers rename them."""
    source = timm.create_model(f'spiking_test_{name}', num_classes=3, timesteps=2)
    torch.save(source.state_dict(), tmp_path / 'model.pth')
    load(tmp_path / 'model.pth', features_only=True)
    assert 'at random' not in caplog.text
    if name == 'resnet':
        load(tmp_path / 'model.pth', features_only=True, layers=(1, 2, 1, 1))
        assert 'layer2.1.conv1.weight' in caplog.text and 'not in the file and start at random' in caplog.text
