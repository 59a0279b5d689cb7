"""train.py's --qcfs, --threshold-rule and --threshold-factor."""
import pytest
import timm
import torch
import torch.nn as nn

from runs import TINY, fails, run_here, run_of
from timm_sscl import convert_ann, convert_to_qcfs
from timm_sscl.conversion import QCFS

ONCE = [*TINY, '--epochs', '1', '--distill', 'none', '--output', 'out']
ANN = ['--model', 'test_resnet', *ONCE[4:]]  # without --model and --timesteps


@pytest.fixture(scope='module')
def ann(tmp_path_factory):
    """File with the weights of an ANN, drawn at random."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp('ann') / 'ann.pth'
    model = timm.create_model('test_resnet', num_classes=10, zero_init_last=False)
    torch.save(model.state_dict(), file)
    return file


def test_qcfs_trains_an_ann_that_convert_ann_takes(tmp_path, monkeypatch):
    run_here([*ANN, '--qcfs', '4', '--qcfs-threshold', '2'], tmp_path, monkeypatch)
    ann = convert_to_qcfs(timm.create_model('test_resnet', num_classes=10), 4)
    weights = torch.load(run_of(tmp_path / 'out') / 'last.pth.tar', weights_only=True)['state_dict']
    ann.load_state_dict(weights)
    learned = {name: m.threshold.item() for name, m in ann.named_modules() if isinstance(m, QCFS)}
    assert learned and all(0 < abs(value - 2.) < 1 for value in learned.values())  # trained, a little
    model = convert_ann(ann, torch.randn(4, 3, 32, 32), 4)
    assert {name: lif.scale.item() for name, lif in model.neurons().items()} == learned


def _neurons(folder):
    model = timm.create_model('spiking_test_resnet', num_classes=10,
                              checkpoint_path=run_of(folder) / 'last.pth.tar')
    return model.neurons().values()


def test_rules_and_factor_reach_the_thresholds(ann, tmp_path, monkeypatch):
    """Gains are set before the training and are not trained, so the checkpoint has those of the rule."""
    gains = {}
    for rule, factor in (('spike_norm', '1'), ('spike_norm', '0.5'), ('rms', '1')):
        folder = tmp_path / f'{rule}-{factor}'
        folder.mkdir()
        run_here([*ONCE, '--initial-checkpoint', ann, '--threshold-rule', rule, '--threshold-factor', factor],
                 folder, monkeypatch)
        gains[rule, factor] = next(iter(_neurons(folder / 'out'))).gain.item()
    assert gains['spike_norm', '0.5'] == pytest.approx(2 * gains['spike_norm', '1'], rel=1e-6)
    assert gains['rms', '1'] > 1.5 * gains['spike_norm', '1']  # the maximum is far above the root mean square


def test_rule_of_the_conversion(ann, tmp_path, monkeypatch):
    run_here([*ONCE, '--initial-checkpoint', ann, '--neuron-init', 'ann', '--threshold-rule', 'ltb', '--no-aug',
              '--experiment', 'ltb'], tmp_path, monkeypatch)
    run_here([*ONCE, '--initial-checkpoint', ann, '--neuron-init', 'ann', '--no-aug', '--experiment', 'max'],
             tmp_path, monkeypatch)
    ltb, largest = (timm.create_model('spiking_test_resnet', num_classes=10, checkpoint_path=tmp_path / 'out' / name /
                                      'last.pth.tar') for name in ('ltb', 'max'))
    assert ltb.act1.scale.shape == largest.act1.scale.shape and (ltb.act1.scale < largest.act1.scale).all()


@pytest.mark.parametrize('args, words', [
    (['--qcfs', '4'], ['--qcfs 4', 'spikes', '--model test_resnet']),
    ([*ANN, '--qcfs', '0'], ['--qcfs 0', 'levels=0']),
    ([*ANN, '--model', 'test_vit', '--qcfs', '4', '--input-size', '3', '160', '160'], ['--qcfs 4', 'GELU']),
    (['--threshold-rule', 'max'], ['--threshold-rule max', 'rms', 'spike_norm']),
    (['--threshold-rule', 'percentile'], ['--threshold-rule percentile', 'spiking layers']),
    (['--neuron-init', 'none', '--threshold-rule', 'rms'], ['--threshold-rule rms', '--neuron-init none']),
    (['--neuron-init', 'none', '--threshold-factor', '2'], ['--threshold-factor 2.0', '--neuron-init none']),
    ([*ANN, '--qcfs-threshold', '2'], ['--qcfs-threshold 2.0', '--qcfs LEVELS']),
    ([*ANN, '--qcfs', '4', '--qcfs-threshold', '0'], ['--qcfs 4', 'threshold=0.0']),
    (['--threshold-factor', '0'], ['--threshold-factor 0.0']),
    (['--neuron-init', 'ann', '--threshold-rule', 'ltb', '--ann-percentile', '99'], ['percentile=99.0', 'ltb'])])
def test_wrong_options_are_one_line(args, words, tmp_path, monkeypatch, capsys):
    code, line = fails(args if args[:2] == ANN[:2] else [*ONCE, *args], tmp_path, monkeypatch, capsys)
    assert code == 2 and all(word in line for word in words), line
    assert not list(tmp_path.rglob('*.pth.tar'))


def test_an_ann_without_the_option_keeps_its_relus(tmp_path, monkeypatch):
    run_here(ANN, tmp_path, monkeypatch)
    model = timm.create_model('test_resnet', num_classes=10, checkpoint_path=run_of(tmp_path / 'out') / 'last.pth.tar')
    assert type(model.act1) is nn.ReLU
