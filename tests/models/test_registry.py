"""`spiking_<name>` in timm's registry: names, tags, configs, and how settings travel with a checkpoint."""
import copy
import inspect
import logging
import re
import sys
import warnings
from functools import partial

import pytest
import safetensors.torch
import timm
import torch
import torch.nn as nn
from timm.models import get_pretrained_cfg, register_model

from timm_sscl import LIF, convert_to_spiking
from timm_sscl.conversion import model as spiking
from timm_sscl.models.spiking import register_spiking_models

K = 5
SETTINGS = dict(timesteps=3, tau=.5, v_threshold=.7, v_reset='soft', detach_reset=True)
NAMES = ['test_resnet', 'test_efficientnet', 'test_vit']
KWARGS = {'test_vit': dict(img_size=32)}
__all__ = []  # timm.models.register_model appends to it


def _images(batch: int = 2, channels: int = 3) -> torch.Tensor:
    return 3 * torch.randn(batch, channels, 32, 32, generator=torch.Generator().manual_seed(1))


def _create(name: str, spiking: bool = True, **kwargs) -> nn.Module:
    kwargs = {'num_classes': K, **KWARGS.get(name, {}), **kwargs}
    return timm.create_model(f'spiking_{name}' if spiking else name, **kwargs).eval()


def _trained(name: str, spiking: bool = True, **kwargs) -> nn.Module:
    """A model whose weights and norm statistics are not the initial ones, so that it fires in eval mode."""
    torch.manual_seed(3)
    model = _create(name, spiking, **kwargs)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(.1 * torch.randn_like(p))
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.momentum = None
        model.train()(_images(8, model.in_chans))
    return model.eval()


def _neurons(model):
    return [m for m in model.modules() if isinstance(m, LIF)]


def _assert_settings(model, **expected):
    expected = {**SETTINGS, **expected}
    expected['v_reset'] = None if expected['v_reset'] == 'soft' else expected['v_reset']
    assert model.timesteps == expected['timesteps'] and _neurons(model)
    for name, value in expected.items():
        assert {getattr(m, name) for m in _neurons(model)} == {value}, name


# ---------------------------------------------------------------------------------------------------- names and configs

def test_every_architecture_has_a_spiking_twin():
    names = timm.list_models()
    bases = [n for n in names if not n.startswith('spiking_')]
    assert len(bases) > 1000
    assert set(names) >= {f'spiking_{n}' for n in bases}
    assert all(timm.is_model(f'spiking_{n}') for n in bases)
    assert not [n for n in names if n.startswith('spiking_spiking_')]


def test_pretrained_names_are_the_anns():
    assert timm.list_pretrained('resnet18*')
    assert timm.list_pretrained('spiking_resnet18*') == [f'spiking_{n}' for n in timm.list_pretrained('resnet18*')]
    ann = [n for n in timm.list_pretrained() if not n.startswith('spiking_')]
    assert sorted(n for n in timm.list_pretrained() if n.startswith('spiking_')) == sorted(f'spiking_{n}' for n in ann)


def test_no_config_names_a_repository_of_ours():
    """timm completes hf_hub_id='timm/' to 'timm/<name>': a spiking name in it would be a repository nobody has."""
    for name in timm.list_models(pretrained=True, include_tags=True):
        if not name.startswith('spiking_'):
            continue
        ours, theirs = get_pretrained_cfg(name), get_pretrained_cfg(name[len('spiking_'):])
        assert ours.hf_hub_id == theirs.hf_hub_id and 'spiking' not in (ours.hf_hub_id or ''), name
        assert (ours.url, ours.input_size, ours.num_classes) == (
            theirs.url, theirs.input_size, theirs.num_classes), name
        assert ours.architecture == name.split('.')[0] and ours.tag == theirs.tag, name


def test_tag_selects_its_config():
    model = timm.create_model('spiking_resnet18.a1_in1k')
    ann = timm.create_model('resnet18.a1_in1k')
    cfg = model.pretrained_cfg
    assert cfg['architecture'] == 'spiking_resnet18' and cfg['tag'] == 'a1_in1k'
    assert cfg['hf_hub_id'] == 'timm/resnet18.a1_in1k'
    assert {k: v for k, v in cfg.items() if k != 'architecture'} == {
        k: v for k, v in ann.pretrained_cfg.items() if k != 'architecture'}
    assert timm.create_model('spiking_resnet18.fb_swsl_ig1b_ft_in1k').pretrained_cfg['tag'] == 'fb_swsl_ig1b_ft_in1k'
    with pytest.raises(RuntimeError):
        timm.create_model('spiking_resnet18.no_such_tag')


def test_base_entry_is_untouched():
    timm.create_model('spiking_resnet18')
    ann = timm.create_model('resnet18')
    assert type(ann) is timm.models.ResNet and not _neurons(ann)
    assert sum(type(m) is nn.ReLU for m in ann.modules()) == 9 + 8
    assert ann.pretrained_cfg['architecture'] == 'resnet18'
    assert get_pretrained_cfg('resnet18').architecture == 'resnet18'
    assert ann.pretrained_cfg == get_pretrained_cfg('resnet18').to_dict()
    assert ann(torch.zeros(2, 3, 32, 32)).shape == (2, 1000)


def test_registering_again_adds_nothing_and_keeps_the_entries():
    before, entry = timm.list_models(), timm.model_entrypoint('spiking_resnet18')
    register_spiking_models()  # another test module may have registered an architecture
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert register_spiking_models() == 0
    assert set(before) <= set(timm.list_models()) and timm.model_entrypoint('spiking_resnet18') is entry
    assert timm.list_pretrained('spiking_resnet18*')


class _Tiny(nn.Module):
    def __init__(self, num_classes=10, in_chans=3):
        super().__init__()
        self.conv, self.act, self.fc = nn.Conv2d(in_chans, 4, 3), nn.ReLU(), nn.Linear(4, num_classes)

    def forward(self, x):
        return self.fc(self.act(self.conv(x)).mean((2, 3)))


def test_twin_for_a_users_own_model():
    def my_tiny_net(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **kwargs):
        return _Tiny(**kwargs)

    my_tiny_net.__module__ = __name__
    if not timm.is_model('my_tiny_net'):
        register_model(my_tiny_net)
        assert register_spiking_models() == 1
    model = timm.create_model('spiking_my_tiny_net', num_classes=K, timesteps=2)
    assert isinstance(model, _Tiny) and isinstance(model.act, LIF) and model.timesteps == 2
    assert model(_images()).shape == (2, K) and model(_images(), per_step=True).shape == (2, 2, K)
    assert 'spiking_my_tiny_net' in timm.list_models('spiking_my*')
    assert register_spiking_models() == 0


@pytest.mark.parametrize('name', NAMES)
@torch.no_grad()
def test_create_model_arguments(name):
    model = _create(name, in_chans=1, **SETTINGS)
    _assert_settings(model)
    assert model(_images(2, channels=1)).shape == (2, K)
    headless = _create(name, num_classes=0)
    assert headless.timesteps == 4
    features = headless.forward_features(_images())
    out = headless(_images())
    assert out.shape == (2, headless.head_hidden_size)
    assert torch.equal(out, headless.forward_head(features, pre_logits=True))
    _assert_settings(_create(name), timesteps=4, tau=.25, v_threshold=.5, v_reset=0., detach_reset=False)


@pytest.mark.parametrize('name,value', [('timesteps', 0), ('tau', 2.), ('v_threshold', 0.), ('v_reset', 'hard')])
def test_bad_setting_raises(name, value):
    with pytest.raises(ValueError, match=name):
        _create('test_resnet', **{name: value})


def test_misspelt_argument():
    for given, hint in ((dict(timestep=2), "argument 'timestep'. Did you mean 'timesteps'?"),
                        (dict(v_treshold=.5), "Did you mean 'v_threshold'?"),
                        (dict(colour=2), "neither timm's resnet18 nor the spiking settings have an argument 'colour'. "
                                         'Settings are timesteps, ')):
        with pytest.raises(TypeError, match=re.escape(hint)):
            timm.create_model('spiking_resnet18', **given)
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'eps'$"):  # of an argument, not of the model
        timm.create_model('spiking_resnet18', act_layer=partial(torch.nn.ReLU, eps=1))



# ---------------------------------------------------------------------------------------------------- checkpoints

def _save_plain(model, folder):
    torch.save(model.state_dict(), folder / 'model.pth')
    return str(folder / 'model.pth')


def _save_nested(model, folder):
    torch.save({'epoch': 3, 'arch': 'x', 'state_dict': model.state_dict()}, folder / 'last.pth.tar')
    return str(folder / 'last.pth.tar')


def _save_ddp(model, folder):
    torch.save({'state_dict': {f'module.{k}': v for k, v in model.state_dict().items()}}, folder / 'ddp.pth.tar')
    return str(folder / 'ddp.pth.tar')


def _save_safetensors(model, folder):
    safetensors.torch.save_file(model.state_dict(), folder / 'model.safetensors')
    return str(folder / 'model.safetensors')


SAVERS = [_save_plain, _save_nested, _save_ddp, _save_safetensors]


@pytest.mark.parametrize('save', SAVERS)
@pytest.mark.parametrize('name', NAMES)
@torch.no_grad()
def test_checkpoint_path_restores_settings_bit_for_bit(name, save, tmp_path):
    model, x = _trained(name, **SETTINGS), _images()
    file = save(model, tmp_path)
    other = _create(name, checkpoint_path=file)
    _assert_settings(other)
    assert torch.equal(other(x, per_step=True), model(x, per_step=True))
    assert torch.equal(other(x), model(x))
    # the settings do matter here: the same weights with the defaults give other logits
    default = _create(name)
    default.load_state_dict({k: v for k, v in model.state_dict().items() if k != 'spiking_settings'})
    assert default.timesteps == 4 and not torch.equal(default(x), model(x))


def test_explicit_setting_wins_and_is_logged(tmp_path, caplog):
    file = _save_plain(_trained('test_resnet', **SETTINGS), tmp_path)
    with caplog.at_level(logging.INFO, logger='timm_sscl'):
        model = _create('test_resnet', checkpoint_path=file, tau=.9, timesteps=2)
    _assert_settings(model, tau=.9, timesteps=2)
    kept = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(kept) == 2
    assert any('tau=0.5' in m and 'tau=0.9' in m for m in kept)
    assert any('timesteps=3' in m and 'timesteps=2' in m for m in kept)
    assert any('restored' in r.getMessage() for r in caplog.records)  # what was not asked for


def test_explicit_setting_equal_to_the_checkpoints_or_to_the_default(tmp_path, caplog):
    file = _save_plain(_trained('test_resnet', **SETTINGS), tmp_path)
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger='timm_sscl'):
        _assert_settings(_create('test_resnet', checkpoint_path=file, tau=SETTINGS['tau']))
    assert not caplog.records
    # a default that is spelled out was asked for
    model = _create('test_resnet', checkpoint_path=file, tau=.25, v_reset=0., detach_reset=False)
    _assert_settings(model, tau=.25, v_reset=0., detach_reset=False)


def test_set_timesteps_counts_as_explicit(caplog):
    state = _trained('test_resnet', **SETTINGS).state_dict()
    model = _create('test_resnet')
    model.set_timesteps(2)
    with caplog.at_level(logging.WARNING, logger='timm_sscl'):
        model.load_state_dict(state)
    _assert_settings(model, timesteps=2)
    assert 'timesteps=3' in caplog.text and 'timesteps=2' in caplog.text


def test_state_dict_loads_without_touching_the_callers_copy():
    model = _trained('test_resnet', **SETTINGS)
    state = model.state_dict()
    keys = list(state)
    for _ in range(2):  # an epoch's checkpoint is loaded more than once
        other = _create('test_resnet')
        other.load_state_dict(state)
        _assert_settings(other)
    assert list(state) == keys


def test_settings_travel_inside_another_module():
    model = nn.Sequential(nn.Identity(), _trained('test_resnet', **SETTINGS))
    other = nn.Sequential(nn.Identity(), _create('test_resnet'))
    other.load_state_dict(model.state_dict(), strict=True)
    _assert_settings(other[1])


@pytest.mark.parametrize('name', NAMES)
def test_ann_checkpoint_path(name, tmp_path):
    ann = _trained(name, spiking=False)
    for save in (_save_plain, _save_safetensors):
        model = _create(name, checkpoint_path=save(ann, tmp_path), timesteps=2, tau=.5)
        assert model.timesteps == 2 and {m.tau for m in _neurons(model)} == {.5}
        assert all(torch.equal(p, dict(ann.named_parameters())[n]) for n, p in model.named_parameters())


def test_spiking_checkpoint_is_refused_by_the_ann_or_loses_nothing_else(tmp_path):
    """The way back: without the neurons' and the settings' keys the state_dict is the ANN's."""
    model = _trained('test_resnet', **SETTINGS)
    state = model.state_dict()
    ann = _create('test_resnet', spiking=False)
    extra = {f'{name}.{factor}' for name in model.neurons() for factor in ('spiking_gain', 'spiking_scale')}
    assert set(ann.load_state_dict(state, strict=False).unexpected_keys) == {'spiking_settings', *extra}
    assert not ann.load_state_dict(state, strict=False).missing_keys


# ---------------------------------------------------------------------------------------------------- pretrained

def _pretrained(name, file, spiking=True, overlay=None, **kwargs):
    overlay = dict(file=file, num_classes=K, **(overlay or {}))
    return _create(name, spiking, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)


@pytest.mark.parametrize('save', [_save_plain, _save_nested, _save_safetensors])
@pytest.mark.parametrize('name', NAMES)
@torch.no_grad()
def test_pretrained_spiking_file(name, save, tmp_path):
    model, x = _trained(name, **SETTINGS), _images()
    other = _pretrained(name, save(model, tmp_path))
    _assert_settings(other)
    assert torch.equal(other(x, per_step=True), model(x, per_step=True))
    wins = _pretrained(name, save(model, tmp_path), timesteps=2)
    _assert_settings(wins, timesteps=2)


@pytest.mark.parametrize('name', NAMES)
@torch.no_grad()
def test_pretrained_ann_file(name, tmp_path):
    ann, x = _trained(name, spiking=False), _images()
    model = _pretrained(name, _save_plain(ann, tmp_path), **SETTINGS)
    _assert_settings(model)
    assert torch.equal(model(x), convert_to_spiking(copy.deepcopy(ann), **SETTINGS)(x))


@pytest.mark.parametrize('spiking_file', [False, True])
@pytest.mark.parametrize('name', NAMES)
@torch.no_grad()
def test_pretrained_file_is_adapted_as_for_the_ann(name, spiking_file, tmp_path):
    """Another number of classes and of input channels: every tensor as timm gives it to the ANN, but the new head."""
    source = _trained(name, spiking=False)
    reference = _pretrained(name, _save_plain(source, tmp_path), spiking=False, in_chans=1, num_classes=7)
    file = _save_safetensors(convert_to_spiking(source, **SETTINGS) if spiking_file else source, tmp_path)
    model = _pretrained(name, file, in_chans=1, num_classes=7)
    if spiking_file:
        _assert_settings(model)
    else:
        assert model.timesteps == 4
    head = tuple(f'{n}.' for n, m in model.named_modules() if m is model.get_classifier())
    same = [n for n, p in model.named_parameters() if torch.equal(p, dict(reference.named_parameters())[n])]
    assert {n for n, _ in model.named_parameters() if not n.startswith(head)} <= set(same)
    assert model(_images(2, channels=1)).shape == (2, 7)


def test_pretrained_state_dict_overlay():
    """timm takes a state_dict in place of a file: a spiking one must do as well."""
    source = _trained('test_resnet', **SETTINGS)
    state = source.state_dict()
    keys = list(state)
    model = _create('test_resnet', pretrained=True, pretrained_cfg_overlay=dict(state_dict=state, num_classes=K))
    _assert_settings(model)
    assert torch.equal(model(_images()), source(_images())) and list(state) == keys


def test_saved_folder_round_trip(tmp_path):
    """timm's own export (config.json and weights) and its local-dir: source."""
    source = _trained('test_resnet', **SETTINGS)
    timm.models.save_for_hf(source, tmp_path / 'saved')
    assert 'spiking_test_resnet' in (tmp_path / 'saved' / 'config.json').read_text()
    model = timm.create_model(f'local-dir:{tmp_path / "saved"}', pretrained=True).eval()
    _assert_settings(model)
    assert torch.equal(model(_images()), source(_images()))


def test_features_only_from_a_pretrained_file(tmp_path):
    source, x = _trained('test_resnet', **SETTINGS), _images()
    model = _pretrained('test_resnet', _save_plain(source, tmp_path), features_only=True, num_classes=None)
    _assert_settings(model)
    with torch.no_grad():
        features = model(x)
        assert torch.equal(features[-1], source.forward_intermediates(x, intermediates_only=True)[-1])


def test_no_method_of_a_spiking_model_hides_one_of_timms():
    """gemma4 has an _encode of its own, for example."""
    own = {name for mixin in (spiking.SpikingModule, spiking.SpikingModel, spiking.SpikingEncoder)
           for name in vars(mixin) if not name.startswith('__')}
    meant = {'forward', 'forward_features', 'forward_head', 'forward_intermediates', 'reset_classifier',
             'no_weight_decay', '_save_to_state_dict', '_load_from_state_dict'}
    models = {timm.models._registry._model_entrypoints[name].__module__ for name in timm.list_models()}
    hidden = [(module, name, own & set(vars(base)))
              for module in models for name, cls in vars(sys.modules[module]).items()
              if inspect.isclass(cls) and issubclass(cls, torch.nn.Module) for base in cls.__mro__
              if base.__module__.startswith('timm.models.') and (own - meant) & set(vars(base))]
    assert hidden == []
