"""Files that version 0.1.0 wrote load, give the numbers that they gave, and go on."""
import csv
import tarfile
from pathlib import Path

import pytest
import timm
import torch
from data_0_1_0 import make

from runs import run_here
from timm_sscl import convert_to_spiking

ROOT = Path(__file__).resolve().parent.parent
EXPECTED = torch.load(make.HERE / 'expected.pth')


def vit():
    return timm.create_model('spiking_test_vit', **make.VIT)


def two_calls():
    return convert_to_spiking(make.TwoCalls())


def created_from_the_file():
    return timm.create_model('spiking_test_vit', checkpoint_path=str(make.HERE / 'calibrated_vit.pth'), **make.VIT)


def pretrained_from_the_file():
    overlay = dict(file=str(make.HERE / 'calibrated_vit.pth'), num_classes=5)
    return timm.create_model('spiking_test_vit', pretrained=True, pretrained_cfg_overlay=overlay, **make.VIT)


def same_numbers(model, name):
    expected = EXPECTED[name]
    with torch.no_grad():
        out = model.eval()(make.images(), per_step=True)
    torch.testing.assert_close(out, expected)
    assert model.timesteps == len(expected)
    assert not torch.allclose(expected[0], expected[1], atol=1e-3)  # a wrong T would be seen


@pytest.mark.parametrize('create', [vit, two_calls])
@pytest.mark.parametrize('assign', [False, True])
def test_state_dict(create, assign):
    name = f'calibrated_{create.__name__}'
    model = create()
    model.load_state_dict(torch.load(make.HERE / f'{name}.pth', weights_only=True), strict=True, assign=assign)
    same_numbers(model, name)


@pytest.mark.parametrize('create', [created_from_the_file, pretrained_from_the_file])
def test_weights_file(create):
    same_numbers(create(), 'calibrated_vit')


@pytest.mark.parametrize('name', ['calibrated_vit', 'converted'])
def test_pickle(name):
    model = torch.load(make.HERE / f'{name}.pkl', weights_only=False)
    same_numbers(model, name)
    again = convert_to_spiking(make.relu_network()) if name == 'converted' else vit()
    again.load_state_dict(model.state_dict(), strict=True)  # as this version writes it
    same_numbers(again, name)


@pytest.mark.parametrize('resume', ['folder', 'auto'])
def test_unfinished_run_goes_on(tmp_path, monkeypatch, resume):
    """Its second epoch as version 0.1.0 trained it. Options that the version lacked have their defaults."""
    with tarfile.open(make.HERE / 'run.tar.xz') as archive:
        archive.extractall(tmp_path)
    if resume == 'folder':
        run_here(['--resume', 'out/run'], tmp_path, monkeypatch)
    else:
        options = tmp_path / 'out/run/args.yaml'
        options.write_text(options.read_text().replace('experiment: run', "experiment: ''"))
        at = make.RUN.index('--experiment')
        run_here([*make.RUN[:at], *make.RUN[at + 2:], '--resume', 'auto'], tmp_path, monkeypatch)
    with open(tmp_path / 'out/run/summary.csv') as file:
        first, second = csv.DictReader(file)
    assert first['epoch'] == '0' and second['epoch'] == '1'
    # rounding differs by machine, and a spike that flips moves the loss in the fourth digit
    assert float(second['train_loss']) == pytest.approx(4.60033, rel=1e-3)
    assert float(second['eval_loss']) == pytest.approx(2.30181, rel=1e-3)
