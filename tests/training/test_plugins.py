"""A user's own model in a file: its spiking_ name, and training it by the script."""
import json
import sys

import pytest
import timm
import torch
import torch.nn as nn
import yaml
from accelerate.state import AcceleratorState
from timm.models import _registry, register_model

import timm_sscl  # noqa: F401  registers the spiking_ names
import train
from timm_sscl.training.command_line.options import OptionError, parse_args
from timm_sscl.training.command_line.plugins import import_plugin
from timm_sscl.models.spiking import register_spiking_models

MODEL = '''
import torch.nn as nn
from timm.models import register_model
from own_layers import WIDTH


class OwnNet(nn.Module):
    def __init__(self, num_classes, in_chans):
        super().__init__()
        self.num_classes = num_classes
        self.stem = nn.Sequential(nn.Conv2d(in_chans, WIDTH, 3, 2, 1), nn.BatchNorm2d(WIDTH))
        self.act1 = nn.ReLU()
        self.body = nn.Sequential(nn.Conv2d(WIDTH, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.fc = nn.Linear(16, num_classes)

    def forward(self, x):
        return self.fc(self.body(self.act1(self.stem(x))).mean((2, 3)))


@register_model
def own_net_of_a_plugin(pretrained=False, num_classes=10, in_chans=3, **kwargs):
    return OwnNet(num_classes, in_chans)
'''


class _Net(nn.Module):
    def __init__(self, width=6, **kwargs):
        super().__init__()
        self.conv, self.act, self.fc = nn.Conv2d(3, width, 3), nn.ReLU(), nn.Linear(width, 5)

    def forward(self, x):
        return self.fc(self.act(self.conv(x)).mean((2, 3)))


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch):
    monkeypatch.setattr(sys, 'path', list(sys.path))
    known = set(_registry._model_entrypoints), set(sys.modules)
    yield
    for name in set(_registry._model_entrypoints) - known[0]:
        _registry._clear_model_entries(name)
        del _registry._model_entrypoints[name]
    for name in set(sys.modules) - known[1]:
        if name.startswith('own_'):
            del sys.modules[name]


# ---- the name

@pytest.mark.parametrize('look', [
    lambda: timm.create_model('spiking_late_net', timesteps=2),
    lambda: timm.is_model('spiking_late_net') and timm.create_model('spiking_late_net', timesteps=2),
    lambda: timm.list_models('spiking_late*') == ['spiking_late_net'] and timm.create_model('spiking_late_net',
                                                                                             timesteps=2),
    lambda: register_spiking_models() == 1 and timm.create_model('spiking_late_net', timesteps=2),
], ids=['create_model', 'is_model', 'list_models', 'register_spiking_models'])
def test_model_registered_after_the_import_has_a_spiking_twin(look):
    assert not timm.is_model('late_net') and not timm.is_model('spiking_late_net')

    @register_model
    def late_net(pretrained=False, **kwargs):
        return _Net(width=kwargs.get('width', 6))

    model = look()
    assert len(model.neurons()) == 1 and model.timesteps == 2
    assert model(torch.zeros(2, 3, 8, 8)).shape == (2, 5)


def test_model_registered_again_is_the_new_one():
    for width in (6, 9):
        def late_net(pretrained=False, width=width, **kwargs):
            return _Net(width)

        late_net.__module__ = __name__
        with pytest.warns(UserWarning, match='Overwriting') if width == 9 else pytest.MonkeyPatch.context():
            register_model(late_net)
        assert timm.create_model('spiking_late_net').conv.out_channels == width


def test_pretrained_configs_of_a_late_model(monkeypatch):
    cfg = dict(url='', input_size=(3, 40, 40), mean=(0.1, 0.2, 0.3), num_classes=5, file='late.pth')
    monkeypatch.setattr(sys.modules[__name__], 'default_cfgs', timm.models.generate_default_cfgs({'late_net.a1': cfg}),
                        raising=False)

    def late_net(pretrained=False, **kwargs):
        return timm.models.build_model_with_cfg(_Net, 'late_net', pretrained, **kwargs)

    late_net.__module__ = __name__
    register_model(late_net)
    assert timm.create_model('spiking_late_net.a1').pretrained_cfg['input_size'] == (3, 40, 40)
    assert timm.get_pretrained_cfg('spiking_late_net.a1').mean == (0.1, 0.2, 0.3)


def test_names_that_do_not_exist_do_not():
    assert not timm.is_model('spiking_of_nothing')
    with pytest.raises(RuntimeError, match='Unknown model'):
        timm.create_model('spiking_of_nothing')
    assert timm.list_models('spiking_spiking*') == []


# ---- the file

def _write(folder):
    (folder / 'own_models.py').write_text(MODEL)
    (folder / 'own_layers.py').write_text('WIDTH = 8\n')


def test_import_of_a_file_and_of_a_module(tmp_path, monkeypatch):
    _write(tmp_path)
    module = import_plugin(str(tmp_path / 'own_models.py'))
    assert timm.is_model('spiking_own_net_of_a_plugin') and import_plugin(str(tmp_path / 'own_models.py')) is module
    (tmp_path / 'json.py').write_text('own = 1\n')  # the name of another module
    assert import_plugin(str(tmp_path / 'json.py')).own == 1 and sys.modules['json'] is json
    (tmp_path / 'own_package').mkdir()
    (tmp_path / 'own_package' / '__init__.py').write_text('own = 2\n')
    monkeypatch.syspath_prepend(tmp_path)
    assert import_plugin('own_package').own == 2
    (tmp_path / 'own_broken.py').write_text('import own_that_is_missing\n')
    for source in (str(tmp_path / 'own_broken.py'), 'own_broken'):
        with pytest.raises(ModuleNotFoundError, match='own_that_is_missing'):  # the user's own mistake, with its line
            import_plugin(source)


@pytest.mark.parametrize('source', ['nowhere.py', 'folder/nowhere.py', 'own_nowhere', 'os.nowhere'])
def test_plugin_that_is_missing(source):
    with pytest.raises(OptionError, match=f"--plugin: '{source}'"):
        parse_args(['--plugin', source])


def test_plugins_of_a_resumed_run_are_found_from_anywhere(tmp_path, monkeypatch):
    _write(tmp_path)
    monkeypatch.chdir(tmp_path)
    args, _ = parse_args(['--plugin', 'own_models.py', 'own_models.py', 'json'])
    assert args.plugin == [str(tmp_path / 'own_models.py'), 'json']


def test_training_a_users_own_model(tmp_path, monkeypatch):
    _write(tmp_path)
    monkeypatch.chdir(tmp_path)
    try:
        train.main(['--plugin', 'own_models.py', '--model', 'spiking_own_net_of_a_plugin', '--timesteps', '2',
                    '--epochs', '1', '--warmup-epochs', '0', '--train-num-samples', '32', '--val-num-samples', '32',
                    '--batch-size', '16', '--workers', '0', '--threads', '1', '--output', 'out', '--experiment', 'own',
                    '--sscl-taps', 'act1,body', '--sscl-teacher-taps', 'act1,body.1'])
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    facts = json.loads((tmp_path / 'out' / 'own' / 'summary.json').read_text())
    assert facts['teacher']['name'] == 'own_net_of_a_plugin' and set(facts['firing_rates']) == {'act1', 'body.2'}
    header = (tmp_path / 'out' / 'own' / 'summary.csv').read_text().split('\n')[0]
    assert 'train_sscl_loss' in header and 'act1' in header and 'body' in header
    options = yaml.safe_load((tmp_path / 'out' / 'own' / 'args.yaml').read_text())
    assert options['plugin'] == [str(tmp_path / 'own_models.py')]
    model = timm.create_model('spiking_own_net_of_a_plugin', checkpoint_path=tmp_path / 'out' / 'own' / 'last.pth.tar')
    assert model.timesteps == 2
