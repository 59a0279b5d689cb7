"""--eval-only --deploy: accuracy and speed of the deployed model, beside the model's own."""
import csv
import json
import logging
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn as nn
from accelerate import Accelerator

from timm_sscl import convert_to_spiking, load
from timm_sscl.training.runs.deployed import Predictions, evaluate_deployed

from runs import fails, run_here, run_of

PAGE = Path(__file__).parents[2] / 'docs' / 'pages' / 'sharing.md'
DIGITS = ['--dataset', 'digits', '--img-size', '16', '--distill', 'none', '--workers', '0', '--device', 'cpu',
          '--output', 'out', '--warmup-epochs', '0']


@pytest.fixture(scope='module')
def digits_run(tmp_path_factory):
    """A run of one epoch, which tests add evaluations to."""
    folder = tmp_path_factory.mktemp('run')
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_here([*DIGITS, '--model', 'spiking_test_resnet', '--opt', 'adamw', '--lr', '0.005', '-b', '16', '--epochs',
                  '1', '-T', '2', '--train-num-samples', '32', '--val-num-samples', '24'], folder, monkeypatch)
    return run_of(folder / 'out')


def test_deployed_beside_the_model(digits_run, tmp_path, monkeypatch):
    run = digits_run
    run_here(['--eval-only', '--deploy', '--resume', run, '--eval-timesteps', '2', '3', '--weight-bits', '24', '8'],
             tmp_path, monkeypatch)
    file = max(run.glob('evaluation-*.json'))
    results = json.loads(file.read_text())['results']
    assert [(r['weights'], r['timesteps'], r['weight_bits']) for r in results] == [
        (*row, t, bits) for t in (2, 3) for *row, bits in
        (('model', None), ('model, deployed', 24), ('model, deployed', 8))]
    for own, deployed in zip(results[::3], results[1::3]):
        assert own['images_per_second'] > 0 and deployed['images_per_second'] > 0
        # rounded weights move logits that are about 0.1 after one epoch
        assert deployed['loss'] == pytest.approx(own['loss'], abs=.1) and deployed['firing_rate'] is None
        assert own['agreement'] is None and deployed['agreement'] == 100  # 24 images, 24 bits
    assert results[2]['loss'] not in (results[0]['loss'], results[1]['loss'])  # 8 bits are coarse
    assert (run / 'evaluation.csv').read_text().count('deployed') == 4


def test_a_loaded_model_has_the_accuracy_that_the_script_says(digits_run, tmp_path, monkeypatch, caplog, capsys):
    """By the loop in the manual. The log and the files name what was evaluated."""
    file = digits_run / 'model_best.pth.tar'
    with caplog.at_level(logging.INFO):
        run_here(['--eval-only', '--resume', file], tmp_path, monkeypatch)
    assert f'Evaluates {file}, after epoch 1 (the files count from 0: 0).' in caplog.text
    facts = json.loads(max(digits_run.glob('evaluation-*.json')).read_text())
    assert (facts['checkpoint'], facts['epoch']) == (str(file), 0)
    with open(digits_run / 'evaluation.csv') as table:
        row = list(csv.DictReader(table))[-1]
    assert (row['checkpoint'], row['epoch'], float(row['top1'])) == (str(file), '0', facts['results'][0]['top1'])
    blocks = re.findall(r'```python\n(.*?)```', PAGE.read_text(), re.S)
    code = next(block for block in blocks if 'create_transform' in block)
    code = code.replace("split='validation')", "split='validation', num_samples=24)")
    exec(code, dict(same=load(file), timm=timm, torch=torch))
    assert f"top-1 {facts['results'][0]['top1']:.2f} of 24 images" in capsys.readouterr().out


def test_a_checkpoint_inside_an_epoch_is_named_by_its_step(digits_run, tmp_path, monkeypatch, caplog):
    content = torch.load(digits_run / 'last.pth.tar')
    content['run_state']['position'] = (1, 2)  # as recovery-1-2
    torch.save({**content, 'epoch': 0}, tmp_path / 'recovery-1-2.pth.tar')
    shutil.copy(digits_run / 'args.yaml', tmp_path)
    with caplog.at_level(logging.INFO):
        run_here(['--eval-only', '--resume', 'recovery-1-2.pth.tar'], tmp_path, monkeypatch)
    assert 'Evaluates recovery-1-2.pth.tar, after step 2 of epoch 2 (the files count from 0: 1).' in caplog.text
    facts = json.loads(next(tmp_path.glob('evaluation-*.json')).read_text())
    assert (facts['checkpoint'], facts['epoch'], facts['step']) == ('recovery-1-2.pth.tar', 1, 2)


def test_refused(tmp_path, monkeypatch, capsys):
    code, line = fails([*DIGITS, '--deploy'], tmp_path, monkeypatch, capsys)
    assert code and '--deploy' in line and '--eval-only' in line
    code, line = fails([*DIGITS, '--eval-only', '--weight-bits', '8'], tmp_path, monkeypatch, capsys)
    assert code and '--weight-bits 8: goes with --deploy' in line
    code, line = fails([*DIGITS, '--eval-only', '--deploy', '--weight-bits', '4'], tmp_path, monkeypatch, capsys)
    assert code and '--weight-bits' in line and '4' in line and '8, 16, 24' in line
    torch.save(timm.create_model('test_resnet', num_classes=10).state_dict(), tmp_path / 'x.pth')
    code, line = fails([*DIGITS, '--deploy', '--eval-only', '--model', 'test_resnet', '--initial-checkpoint', 'x.pth'],
                       tmp_path, monkeypatch, capsys)
    assert code and '--deploy' in line and 'does not spike' in line


def test_agreement_counts_images_with_the_same_prediction(monkeypatch):
    """Of a deployed model that predicts class 0 for all but the first image of every batch."""
    torch.manual_seed(0)
    student = convert_to_spiking(nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)), timesteps=2)
    loader = [(torch.randn(n, 3, 2, 2), torch.zeros(n, dtype=torch.long)) for n in (5, 5, 2)]
    session = SimpleNamespace(args=SimpleNamespace(model_dtype=None, channels_last=False),
                              accelerator=Accelerator(cpu=True), stop_if_asked=lambda *args: (False, False))
    with torch.no_grad(), Predictions(student) as own:
        expected = [student.eval()(x).argmax(1) for x, _ in loader]
        student(torch.randn(7, 3, 2, 2))  # what comes after the loader does not count
    monkeypatch.setattr('timm_sscl.training.runs.deployed.deploy', lambda model, images, weight_bits: _Shifted(model))
    metrics = evaluate_deployed(session, student, loader, own, 24)
    same = sum(1 + int((classes[1:] == 0).sum()) for classes in expected)
    assert metrics['agreement'] == pytest.approx(100 * same / 12) and 3 <= same < 12
    assert metrics['images_per_second'] > 0 and not student._forward_hooks


class _Shifted(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        out = self.model(x)
        out[1:, 0] = 100.
        return out
