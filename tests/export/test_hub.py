"""Folders as the hub takes them: timm.create_model gives the same spiking model from them, local or downloaded."""
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import timm.models._hub as hub
import torch
import torch.nn as nn
from huggingface_hub.utils import EntryNotFoundError

from timm_sscl import calibrate, convert_to_spiking, share_stem
from timm_sscl.export import model_card, save_for_hub

NAME, TINY = 'test_resnet', dict(num_classes=5, channels=(8, 8, 8, 8), stem_width=4)


def images(batch=4):
    return 2 * torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def trained(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(.1 * torch.randn_like(p))
        model.train()(images(8))
    return model.eval()


def plain():
    return trained(timm.create_model(f'spiking_{NAME}', timesteps=2, tau=.5, **TINY)).set_timesteps(3)


def calibrated():
    model = trained(convert_to_spiking(timm.create_model(NAME, **TINY), timesteps=2, exclude='layer4'))
    calibrate(model, images(8))
    return share_stem(model)


def variants():
    return trained(timm.create_model(
        f'spiking_{NAME}', timesteps=3, neuron='plif', neuron_kwargs=dict(v_threshold=.1), norm='tebn', residual='sew',
        surrogate='atan', **TINY))


@torch.no_grad()
def assert_same(model, source):
    assert model.settings == source.settings and not model._explicit
    out = source(images(), per_step=True)
    assert out.std(1).max() > 1e-3  # images matter
    assert torch.equal(model.eval()(images(), per_step=True), out)


@pytest.fixture
def hub_of(monkeypatch):
    """hub_of(folder): huggingface_hub downloads every file from there."""
    def make(folder):
        def download(repo_id, filename, revision=None, cache_dir=None):
            asked.append((repo_id, revision, cache_dir))
            if not (Path(folder) / filename).is_file():
                raise EntryNotFoundError(filename, response=SimpleNamespace(headers={}, request=None))
            return str(Path(folder) / filename)
        asked = []
        monkeypatch.setattr(hub, 'hf_hub_download', download)
        return asked
    return make


@pytest.mark.parametrize('make_source', [plain, calibrated, variants])
def test_a_folder_gives_the_same_model(make_source, tmp_path, hub_of):
    source = make_source()
    folder = save_for_hub(source, tmp_path / 'new' / 'mine')
    assert {file.name for file in folder.iterdir()} == {'config.json', 'model.safetensors', 'README.md'}
    assert_same(timm.create_model(f'local-dir:{folder}', pretrained=True), source)
    asked = hub_of(folder)
    assert_same(timm.create_model('hf-hub:me/mine@v1', pretrained=True, cache_dir=tmp_path / 'cache'), source)
    assert set(asked) == {('me/mine', 'v1', tmp_path / 'cache')}
    untrained = timm.create_model(f'local-dir:{folder}')
    names = set(source.settings.flat()) - {'stem'}  # weights alone say which neuron shares the stem
    assert all(untrained.settings.flat()[name] == source.settings.flat()[name] for name in names)
    assert timm.create_model(f'local-dir:{folder}', pretrained=True, v_threshold=.75).neurons()


def test_arguments_take_precedence(tmp_path):
    source = plain()
    folder = save_for_hub(source, tmp_path / 'mine')
    model = timm.create_model(f'local-dir:{folder}', pretrained=True, timesteps=5)
    assert model.timesteps == 5 and model.settings.tau == .5
    model.load_state_dict(source.state_dict())
    assert model.timesteps == 5


@pytest.mark.parametrize('make_source', [plain, calibrated, variants])
def test_timms_own_functions(make_source, tmp_path, monkeypatch, hub_of):
    """save_for_hf, and push_to_hf_hub with a card; what is uploaded loads."""
    source = make_source()
    timm.models.save_for_hf(source, str(tmp_path / 'saved'))
    assert_same(timm.create_model(f'local-dir:{tmp_path / "saved"}', pretrained=True), source)

    class Api:
        def __init__(self, **kwargs):
            pass

        def create_repo(self, repo_id, **kwargs):
            return SimpleNamespace(repo_id=repo_id)

        def file_exists(self, **kwargs):
            return False

        def upload_folder(self, folder_path, **kwargs):
            shutil.copytree(folder_path, tmp_path / 'uploaded')

    monkeypatch.setattr(hub, 'HfApi', Api)
    timm.models.push_to_hf_hub(source, 'me/mine', model_card=model_card(source, dict(Accuracy='93.1 top-1')))
    hub_of(tmp_path / 'uploaded')
    assert_same(timm.create_model('hf-hub:me/mine', pretrained=True), source)
    assert '- **Accuracy:** 93.1 top-1' in (tmp_path / 'uploaded' / 'README.md').read_text()


def test_config_and_card(tmp_path):
    source = plain()
    folder = save_for_hub(
        source, tmp_path / 'my-net', dict(Accuracy='93.1 top-1'), dict(mean=(.1, .2, .3), input_size=(3, 32, 32)),
        'mit', label_names=list('abcde'))
    config = json.loads((folder / 'config.json').read_text())
    assert config['architecture'] == f'spiking_{NAME}' and config['label_names'] == list('abcde')
    assert config['pretrained_cfg']['mean'] == [.1, .2, .3] and config['pretrained_cfg']['input_size'] == [3, 32, 32]
    expected = dict(timesteps=3, tau=.5, stem_width=4, channels=[8, 8, 8, 8], num_classes=5)
    assert expected.items() <= config['model_args'].items()
    card = (folder / 'README.md').read_text()
    neurons, parameters = len(source.neurons()), sum(p.numel() for p in source.parameters())
    preprocessing = re.search(r'\*\*Preprocessing:\*\* (.*)', card).group(1)
    used = timm.data.resolve_model_data_config(timm.create_model(f'local-dir:{folder}'))
    used = {k: tuple(v) if isinstance(v, list) else v for k, v in used.items()}  # from JSON
    assert used['mean'] == (.1, .2, .3) and preprocessing == ', '.join(f'{k}={v}' for k, v in used.items())
    for text in ('# Model card for my-net', 'license: mit', f'`{NAME}` of timm', '**Timesteps:** 3',
                 f'{neurons} layers of LIF', 'timesteps=3, tau=0.5', f'{parameters:,}', '93.1 top-1',
                 '(B, 3, 32, 32)', '(3, B, 5)', '@inproceedings'):
        assert text in card, text
    code = re.search(r'```python\n(.*?)```', card, re.S).group(1).replace('hf-hub:USER/NAME', f'local-dir:{folder}')
    space = dict(images=images())
    exec(code, space)  # as a reader of the card runs it
    with torch.no_grad():
        assert torch.equal(space['steps'], source(images(), per_step=True)) and space['logits'].shape == (4, 5)


def test_the_model_stays_as_it_is(tmp_path):
    source = plain().to(memory_format=torch.channels_last).bfloat16().train()
    before = {name: value.clone() for name, value in source.state_dict().items()}
    folder = save_for_hub(source, tmp_path / 'mine')
    assert source.training and all(torch.equal(value, before[name]) for name, value in source.state_dict().items())
    assert source.conv1[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert ".to(torch.bfloat16)" in (folder / 'README.md').read_text()
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).to(torch.bfloat16)
    x = images().bfloat16()
    with torch.no_grad():
        assert torch.equal(model.eval()(x), source.eval().to(memory_format=torch.contiguous_format)(x))


def test_refusals_leave_nothing(tmp_path):
    changed, other, layer = plain(), plain(), plain()
    layer.layer2[0].bn1.eps = .1  # the state dict does not hold it
    changed.fc = nn.Sequential(nn.Linear(changed.num_features, 5))
    other.layer1[0].act1 = nn.ReLU()  # not a neuron any more; its weights are those of the config's model
    cases = [
        (timm.create_model(NAME, **TINY), 'does not spike; timm.models.save_for_hf'),
        (convert_to_spiking(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())), 'was not created by timm.create_model'),
        (timm.create_model(f'spiking_{NAME}', norm_layer=nn.BatchNorm2d, **TINY), 'created with norm_layer=<class'),
        (changed, 'cannot be built from its config|was changed since'), (other, 'was changed since'),
        (layer, r'was changed since timm.create_model in a way .* layer2.0.bn1 would not be')]
    for model, text in cases:
        with pytest.raises(ValueError, match=text):
            save_for_hub(model, tmp_path / 'mine')
        assert not list(tmp_path.iterdir())
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'README.md').write_text('my own card')
    with pytest.raises(FileExistsError, match='holds something already'):
        save_for_hub(plain(), tmp_path / 'mine')
    assert (tmp_path / 'mine' / 'README.md').read_text() == 'my own card'
