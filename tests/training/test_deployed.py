"""--eval-only --deploy: accuracy and speed of the deployed model, beside the model's own."""
import json

import pytest

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
    assert (run / 'evaluation.csv').read_text().count('deployed') == 2


def test_refused(tmp_path, monkeypatch, capsys):
    code, line = fails([*DIGITS, '--deploy'], tmp_path, monkeypatch, capsys)
    assert code and '--deploy' in line and '--eval-only' in line
    (tmp_path / 'x.pth').write_bytes(b'')
    monkeypatch.setattr(
        'timm_sscl.training.runs.evaluation._weights_to_evaluate', lambda args: (tmp_path, {'model': None}))
    code, line = fails([*DIGITS, '--deploy', '--eval-only', '--model', 'test_resnet'], tmp_path, monkeypatch, capsys)
    assert code and '--deploy' in line and 'does not spike' in line
