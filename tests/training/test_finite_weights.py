"""Weights that are NaN or infinite are named before anything is measured or trained with them."""
import logging
import shutil

import pytest
import timm
import torch

from runs import fails, run_here, run_of
from timm_sscl import load
from timm_sscl.export import save_for_hub
from timm_sscl.training.runs.run_report import write_run_report

DIGITS = ['--dataset', 'digits', '--img-size', '16', '--workers', '0', '--device', 'cpu', '--output', 'out',
          '--warmup-epochs', '0', '--model', 'spiking_test_resnet', '-T', '2', '-b', '16', '--epochs', '1',
          '--train-num-samples', '32', '--val-num-samples', '24']
ALONE = [*DIGITS, '--distill', 'none']
NAMES = 'layer2.0.conv1.weight', 'layer3.0.bn1.running_var'  # a NaN and an infinity


def broken(state):
    state = {name: value.clone() for name, value in state.items()}
    state[NAMES[0]].view(-1)[3] = float('nan')
    state[NAMES[1]].view(-1)[0] = float('inf')
    return state


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp('run')
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_here([*ALONE, '--model-ema', '--model-ema-decay', '0.9'], folder, monkeypatch)
    return run_of(folder / 'out')


def assert_named(line, *words):
    assert all(word in line for word in (*words, 'holds 2 tensors with NaN or infinite values', *NAMES)), line


@pytest.mark.parametrize('option, model, args', [
    ('--initial-checkpoint', 'spiking_test_resnet', ALONE), ('--pretrained-path', 'test_resnet', ALONE),
    ('--initial-checkpoint', 'spiking_test_resnet', [*ALONE, '--eval-only']),
    ('--teacher-checkpoint', 'test_resnet', [*DIGITS, '--teacher', 'test_resnet'])])
def test_weights_that_a_run_starts_from(option, model, args, tmp_path, monkeypatch, capsys):
    torch.save(broken(timm.create_model(model, num_classes=10).state_dict()), tmp_path / 'w.pth')
    code, line = fails([*args, option, 'w.pth'], tmp_path, monkeypatch, capsys)
    assert code
    assert_named(line, f"{option}: 'w.pth'")


@pytest.mark.parametrize('args', [['--eval-only'], ['--epochs', '2']])
@pytest.mark.parametrize('key', ['state_dict', 'state_dict_ema'])
def test_checkpoints_of_a_run(key, args, run, tmp_path, monkeypatch, capsys):
    """Its own weights and the averaged ones."""
    shutil.copytree(run, tmp_path / 'run')
    content = torch.load(run / 'last.pth.tar')
    content[key] = broken(content[key])
    torch.save(content, tmp_path / 'run' / 'last.pth.tar')
    for file in ('model_best.pth.tar', 'checkpoint-0.pth.tar'):
        (tmp_path / 'run' / file).unlink()
    code, line = fails([*args, '--resume', 'run'], tmp_path, monkeypatch, capsys)
    assert code
    assert_named(line, '--resume', 'last.pth.tar')
    if key == 'state_dict':
        pytest.importorskip('matplotlib')
        with pytest.raises(ValueError, match=f'last.pth.tar.*{NAMES[0]}'):
            write_run_report(tmp_path / 'run')


def test_load_warns_and_save_for_hub_refuses(tmp_path, caplog):
    model = timm.create_model('spiking_test_resnet', num_classes=10, timesteps=2)
    torch.save(model.state_dict(), tmp_path / 'good.pth')
    load(tmp_path / 'good.pth')
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    torch.save(broken(model.state_dict()), tmp_path / 'bad.pth')
    loaded = load(tmp_path / 'bad.pth')
    assert_named(caplog.text, 'bad.pth')
    with pytest.raises(ValueError, match=f'SpikingResNet holds 2 tensors.*{NAMES[0]}'):
        save_for_hub(loaded, tmp_path / 'hub')
    assert not (tmp_path / 'hub').exists()


def test_an_evaluation_reads_the_checkpoint_alone(run, tmp_path, monkeypatch, caplog):
    """Not the weights that the run began with, which may be gone."""
    shutil.copytree(run, tmp_path / 'run')
    options = (run / 'args.yaml').read_text()
    assert "initial_checkpoint: ''" in options
    (tmp_path / 'run/args.yaml').write_text(options.replace("initial_checkpoint: ''", 'initial_checkpoint: gone.pth'))
    with caplog.at_level(logging.INFO):
        run_here(['--eval-only', '--resume', 'run'], tmp_path, monkeypatch)
    assert 'Evaluates run/last.pth.tar' in caplog.text and 'Loaded' not in caplog.text
