"""One user file registers one thing at every seam; the script trains with all of them, is killed and resumed."""
import re
import shlex
import shutil
import sys

import pytest
import timm
import torch
import yaml
from timm.models import _registry
from timm.utils.checkpoint_saver import load_checkpoint_metadata

import timm_sscl
from runs import ROOT, run_here, run_killed, same_runs
from timm_sscl.training.command_line.plugins import import_plugin

pytestmark = pytest.mark.slow  # trains in processes that are killed
EXAMPLE = ROOT / 'docs' / 'examples' / 'plugins' / 'all_seams.py'
NAME = 'own_seams'  # of the copy: conftest forgets what it registers
SMALL = ['--epochs', '3', '--teacher-epochs', '1', '--warmup-epochs', '0', '-T', '2', '--train-num-samples', '48',
         '--val-num-samples', '16', '--batch-size', '8', '--workers', '0', '--threads', '1', '--output', 'out',
         '--experiment', 'run', '--resume', 'auto', '--recovery-interval', '1', '--lr', '0.02']


def documented_options():
    """Of the command in the example's docstring."""
    command = re.search(r'train\.py((?:.*\\\n)*.*)\n', EXAMPLE.read_text()).group(1)
    words = shlex.split(command.replace('\\\n', ' '))
    for option in ('--plugin', '--epochs', '--warmup-epochs'):
        at = words.index(option)
        del words[at:at + 2]
    return words


@pytest.fixture(scope='module')
def finished(server, tmp_path_factory):
    """Two folders that hold the same run: one never stopped, one killed twice."""
    folders = [tmp_path_factory.mktemp(name) for name in ('whole', 'killed')]
    plugin = tmp_path_factory.mktemp('plugin') / f'{NAME}.py'
    shutil.copy(EXAMPLE, plugin)
    args = ['--plugin', plugin, *documented_options(), *SMALL]
    for folder, kills in zip(folders, (0, 2)):
        run_killed(server, args, folder, kills, seconds=120)
    return plugin, folders


@pytest.fixture
def plugin(finished, monkeypatch):
    """The user's module, imported; what it registered is gone after the test."""
    monkeypatch.setattr(sys, 'path', list(sys.path))
    module = import_plugin(str(finished[0]))
    yield module
    try:
        timm_sscl.unregister_activation(module.SquarePlus)
    except KeyError:  # a test did it
        pass
    _registry._clear_model_entries('shape_net')
    for name in ('shape_net', 'spiking_shape_net'):
        _registry._model_entrypoints.pop(name, None)
    del sys.modules[NAME]


def test_all_of_them_train_and_a_killed_run_ends_bit_identical(finished):
    whole, killed = finished[1]
    same_runs(whole / 'out', killed / 'out')
    state = load_checkpoint_metadata(str(whole / 'out' / 'run' / 'last.pth.tar'))['state_dict']
    assert not torch.equal(state['stage1.2.w'].sigmoid(), torch.tensor(0.7))  # the neuron's parameter learnt
    assert not torch.equal(state['stage1.1.factor'], torch.tensor(0.9))  # and the norm's
    header = (whole / 'out' / 'run' / 'summary.csv').read_text().split('\n')[0]
    assert 'train_sparse_loss' in header and 'train_sscl_loss' in header
    options = yaml.safe_load((whole / 'out' / 'run' / 'args.yaml').read_text())
    assert options['dataset_kwargs'] == {'fill': 200} and options['loss_kwargs'] == {'sparse.rate': 0.2}


def test_the_checkpoint_loads_with_the_plug_in(finished, plugin):
    file = finished[1][0] / 'out' / 'run' / 'last.pth.tar'
    model = timm.create_model('spiking_shape_net', checkpoint_path=file).eval()
    assert (model.settings.neuron, model.settings.surrogate, model.settings.norm) == ('learnt_decay', 'bell', 'scaled')
    assert dict(model.settings.neuron_kwargs)['tau'] == 0.7 and dict(model.settings.surrogate_kwargs) == {'width': 0.8}
    assert dict(model.settings.norm_kwargs) == {'start': 0.9} and model.timesteps == 2
    assert {type(neuron).__name__ for neuron in model.neurons().values()} == {'LearntDecay'}
    state = load_checkpoint_metadata(str(file))['state_dict']
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 2)


@pytest.mark.parametrize('forget, words', [
    (lambda m: timm_sscl.unregister_neuron('learnt_decay'), "'learnt_decay'"),
    (lambda m: timm_sscl.unregister_surrogate('bell'), "'bell'"),
    (lambda m: timm_sscl.unregister_variant('norm', 'scaled'), "'scaled'"),
    (lambda m: timm_sscl.unregister_activation(m.SquarePlus), 'SquarePlus'),
], ids=['neuron', 'surrogate', 'norm', 'activation'])
def test_without_one_of_them_the_error_names_it(finished, plugin, forget, words):
    forget(plugin)
    with pytest.raises(Exception, match=words) as error:
        timm.create_model('spiking_shape_net', checkpoint_path=finished[1][0] / 'out' / 'run' / 'last.pth.tar')
    assert isinstance(error.value, (ValueError, RuntimeError))


@pytest.mark.parametrize('forget, words', [
    (lambda: timm_sscl.unregister_loss('sparse'), "'sparse'"),
    (lambda: timm_sscl.unregister_dataset('own/shapes'), "'own/shapes'"),
], ids=['loss', 'data set'])
def test_the_script_names_a_loss_or_a_data_set_that_is_missing(finished, plugin, forget, words, monkeypatch, capsys):
    forget()
    with pytest.raises(SystemExit):  # the plug-in is imported already, so that --plugin changes nothing
        run_here(['--resume', finished[1][0] / 'out' / 'run'], finished[1][0], monkeypatch)
    line, = [x for x in capsys.readouterr().err.splitlines() if x.startswith('error: ')]
    assert words in line, line


def test_without_the_file_the_error_names_it(finished, tmp_path, monkeypatch, capsys):
    plugin, (whole, _) = finished
    shutil.copytree(whole / 'out', tmp_path / 'out')
    hidden = plugin.with_suffix('.hidden')
    plugin.rename(hidden)
    try:
        with pytest.raises(SystemExit):
            run_here(['--resume', 'out/run', '--epochs', '4'], tmp_path, monkeypatch)
    finally:
        hidden.rename(plugin)
    assert f"--plugin: '{plugin}' does not exist" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match='Unknown model .*shape_net'):
        timm.create_model('spiking_shape_net', checkpoint_path=tmp_path / 'out' / 'run' / 'last.pth.tar')
