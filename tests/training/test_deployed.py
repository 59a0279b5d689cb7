"""--eval-only --deploy: accuracy and speed of the deployed model, beside the model's own."""
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from accelerate import Accelerator

from timm_sscl import convert_to_spiking
from timm_sscl.training.runs.deployed import Predictions, evaluate_deployed

from runs import fails, run_here, run_of

DIGITS = ['--dataset', 'digits', '--img-size', '16', '--distill', 'none', '--workers', '0', '--device', 'cpu',
          '--output', 'out', '--warmup-epochs', '0']


def test_deployed_beside_the_model(tmp_path, monkeypatch):
    run_here([*DIGITS, '--model', 'spiking_test_resnet', '--opt', 'adamw', '--lr', '0.005', '-b', '16', '--epochs', '1',
              '-T', '2', '--train-num-samples', '32', '--val-num-samples', '24'], tmp_path, monkeypatch)
    run = run_of(tmp_path / 'out')
    run_here(['--eval-only', '--deploy', '--resume', run, '--eval-timesteps', '2', '3'], tmp_path, monkeypatch)
    file, = run.glob('evaluation-*.json')
    results = json.loads(file.read_text())['results']
    assert [(r['weights'], r['timesteps']) for r in results] == [
        ('model', 2), ('model, deployed', 2), ('model', 3), ('model, deployed', 3)]
    for own, deployed in zip(results[::2], results[1::2]):
        assert own['images_per_second'] is None and deployed['images_per_second'] > 0
        # rounded weights move logits that are about 0.1 after one epoch
        assert deployed['loss'] == pytest.approx(own['loss'], abs=.1) and deployed['firing_rate'] is None
        assert own['agreement'] is None and deployed['agreement'] == 100  # 24 images, 24 bits
    assert (run / 'evaluation.csv').read_text().count('deployed') == 2


def test_refused(tmp_path, monkeypatch, capsys):
    code, line = fails([*DIGITS, '--deploy'], tmp_path, monkeypatch, capsys)
    assert code and '--deploy' in line and '--eval-only' in line
    (tmp_path / 'x.pth').write_bytes(b'')
    monkeypatch.setattr(
        'timm_sscl.training.runs.evaluation._weights_to_evaluate', lambda args: (tmp_path, {'model': None}))
    code, line = fails([*DIGITS, '--deploy', '--eval-only', '--model', 'test_resnet'], tmp_path, monkeypatch, capsys)
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
    monkeypatch.setattr('timm_sscl.training.runs.deployed.deploy', lambda model, images: _Shifted(model))
    metrics = evaluate_deployed(session, student, loader, own)
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
