"""train.py on a data set of the user's own, from a plug-in."""
import json
import sys

import pytest
import timm
import yaml
from timm.models import _registry
from timm.optim._optim_factory import default_registry

from runs import fails, run_here
from timm_sscl.training.command_line.options import parse_args
from timm_sscl.training.teachers.teacher_key import teacher_settings

BARS = '''
import torch
from PIL import Image
from torch.utils.data import Dataset
from timm_sscl import register_dataset


@register_dataset('own/bars')
class Bars(Dataset):
    """A bar that lies or stands, of one width."""
    classes = ['lying', 'standing']

    def __init__(self, split, num_samples=32, width=8, labels=2):
        self.first = 0 if split == 'train' else 7
        self.targets = [i % 2 + (i >= labels * 100) for i in range(num_samples or 32)]
        self.width = width

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        image = Image.new('RGB', (32, 32))
        at = (self.first + index // 2) % 20
        box = (at, 0, at + self.width, 32)
        image.paste((255, 200, 100), box if self.targets[index] else (box[1], box[0], box[3], box[2]))
        return image, self.targets[index]


@register_dataset('events/bars')
def event_bars(training, settings, height=32):
    g = torch.Generator().manual_seed(int(training))
    return [(torch.rand(settings.timesteps, 2, height, 32, generator=g).round(), i % 2) for i in range(16)]


@register_dataset('own/broken')
def broken(split, key='x'):
    return dict(a=1)[key]


@register_dataset('own/same')
def same(split, num_samples=32):
    return Bars('train', num_samples)
'''
TINY = ['--model', 'spiking_test_resnet', '-T', '2', '--epochs', '1', '--warmup-epochs', '0', '--batch-size', '8',
        '--workers', '0', '--threads', '1', '--img-size', '32', '--no-aug', '--lr', '0.01', '--output', 'out']


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'path', list(sys.path))
    (tmp_path / 'own_bars.py').write_text(BARS)
    yield ['--plugin', str(tmp_path / 'own_bars.py')]
    sys.modules.pop('own_bars', None)


@pytest.mark.slow
def test_it_trains_is_resumed_evaluated_and_its_options_make_other_teachers(plugin, tmp_path, monkeypatch, caplog):
    args = [*plugin, *TINY, '--dataset', 'own/bars', '--distill', 'kd', '--dataset-kwargs']
    run_here([*args, 'width=6', '--experiment', 'a', '--teacher-cache'], tmp_path, monkeypatch)
    run = tmp_path / 'out' / 'a'
    data = json.loads((run / 'data.json').read_text())
    assert data['training']['classes'] == {'lying': 0, 'standing': 1} and data['training']['samples'] == 32
    assert yaml.safe_load((run / 'args.yaml').read_text())['dataset_kwargs'] == {'width': 6}
    student = timm.create_model('spiking_test_resnet', num_classes=2, checkpoint_path=run / 'last.pth.tar')
    assert student.num_classes == 2

    run_here([*args, 'width=5', '--experiment', 'c'], tmp_path, monkeypatch)
    assert len(list((tmp_path / 'out' / 'teachers').iterdir())) == 2

    caplog.clear()
    run_here(['--resume', run, '--epochs', '2', '--train-num-samples', '24'], tmp_path, monkeypatch)
    assert 'The training data has other samples than the run' in caplog.text and '(32, now 24)' in caplog.text
    run_here(['--resume', run, '--eval-only'], tmp_path, monkeypatch)
    assert (run / 'evaluation.csv').is_file()


def test_event_frames_of_ones_own(plugin, tmp_path, monkeypatch):
    run_here([*plugin, *(a for a in TINY if a not in ('--img-size', '32')), '--dataset', 'events/bars', '--distill',
              'none', '--num-classes', '2', '--experiment', 'a'], tmp_path, monkeypatch)
    facts = json.loads((tmp_path / 'out' / 'a' / 'summary.json').read_text())
    assert facts['timesteps'] == 2 and facts['conversion']['macs']['analog'] == 0  # the stem adds: frames are 0 and 1
    assert json.loads((tmp_path / 'out/a/data.json').read_text())['training'] == dict(
        classes=None, samples=16, files=None)


def teacher_key(*argv):
    return teacher_settings(parse_args(argv)[0])


def test_the_file_of_a_data_set_counts_for_a_teacher_and_that_of_a_loss_does_not(plugin, tmp_path):
    plain, own = ('--data-dir', 'x'), (*plugin, '--dataset', 'own/bars')
    assert teacher_key(*plugin, *plain) == teacher_key(*plain) == {}
    first = teacher_key(*own)
    assert set(first) == {'dataset', 'dataset_source'} and teacher_key(*own) == first
    file = tmp_path / 'own_bars.py'
    file.write_text(BARS + '# changed\n')
    assert set(first.items()) ^ set(teacher_key(*own).items()) == {
        ('dataset_source', first['dataset_source']), ('dataset_source', teacher_key(*own)['dataset_source'])}
    assert teacher_key(*plugin, *plain) == {}
    file.write_text(BARS)
    assert teacher_key(*own) == first


def test_the_file_of_a_teachers_network_or_optimizer_counts(tmp_path, monkeypatch):
    (tmp_path / 'own_parts.py').write_text('''
import timm
import torch
from timm.models import register_model
from timm.optim import OptimInfo
from timm.optim._optim_factory import default_registry

@register_model
def own_parts_net(pretrained=False, **kwargs):
    return timm.create_model('test_resnet', **kwargs)

class OwnSGD(torch.optim.SGD):
    pass

default_registry.register(OptimInfo('ownsgd', OwnSGD))
''')
    monkeypatch.setattr(sys, 'path', list(sys.path))
    common = ('--plugin', str(tmp_path / 'own_parts.py'), '--data-dir', 'x')
    try:
        assert teacher_key(*common) == {}
        assert set(teacher_key(*common, '--model', 'spiking_own_parts_net')) == {'model_source'}
        assert set(teacher_key(*common, '--teacher', 'own_parts_net')) == {'model_source'}
        assert set(teacher_key(*common, '--opt', 'ownsgd')) == {'opt', 'optimizer_source'}
    finally:
        sys.modules.pop('own_parts', None)
        _registry._clear_model_entries('own_parts_net')
        _registry._model_entrypoints.pop('own_parts_net', None)
        for table in (default_registry._optimizers, default_registry._foreach_defaults):
            table.discard('ownsgd') if isinstance(table, set) else table.pop('ownsgd', None)


@pytest.mark.slow
def test_a_run_that_goes_on_says_that_its_plug_in_changed(plugin, tmp_path, monkeypatch, caplog):
    run_here([*plugin, *TINY, '--dataset', 'own/bars', '--distill', 'none', '--experiment', 'a'], tmp_path, monkeypatch)
    for changed in (False, True):
        file = tmp_path / 'own_bars.py'
        file.write_text(file.read_text() + '# changed\n' * changed)
        caplog.clear()
        run_here(['--resume', tmp_path / 'out' / 'a', '--epochs', '2'], tmp_path, monkeypatch)
        assert (f'Plug-in {file} is not as it was' in caplog.text) == changed


@pytest.mark.parametrize('argv, words', [
    (['--dataset', 'own/bars', '--dataset-kwargs', 'widht=3'], ["no option 'widht'", "Did you mean 'width'"]),
    (['--dataset', 'own/bars', '--dataset-kwargs', 'root=3'], ['--dataset-kwargs root=3', 'sets root itself']),
    (['--dataset', 'own/bars', '--dataset-kwargs', 'labels=0.1'], ['training data', 'has the label 2']),
    (['--dataset', 'own/bars', '--in-chans', '1'], ['has 3 channels (RGB), the model takes 1']),
    (['--dataset', 'own/broken'], ['--dataset own/broken: KeyError', 'own_bars.py, line 37']),
    (['--dataset', 'own/same'], ['same samples for training and validation']),
    (['--dataset', 'own/same', '--val-num-samples', '16'], ['all 16 validation samples', 'split']),
    (['--dataset', 'own/barz'], ["unknown data set 'own/barz'", "did you mean 'own/bars'"]),
    (['--dataset', 'events/bars'], ['--num-classes', 'give it']),
])
def test_what_is_wrong_is_found_before_training(plugin, argv, words, tmp_path, monkeypatch, capsys):
    size = TINY if 'events/bars' not in argv else [a for a in TINY if a not in ('--img-size', '32')]
    code, line = fails([*plugin, *size, *argv], tmp_path, monkeypatch, capsys)
    assert code == 2 and all(word in line for word in words), line
    assert not (tmp_path / 'out').exists()


def test_options_of_a_data_set_from_a_configuration(plugin, tmp_path):
    (tmp_path / 'own.yaml').write_text('dataset: own/bars\ndataset_kwargs: {width: 3}\n')
    args, recipe = parse_args([*plugin, '--config', str(tmp_path / 'own.yaml')])
    assert (args.dataset, args.dataset_kwargs, recipe) == ('own/bars', {'width': 3}, {})
