"""What a run says of itself: warm-up, teacher at chance, whose best epoch, and a name whose first epoch crashed."""
import json
import logging

import pytest
import torch

from files import write_images
from runs import IMAGES, fails, rows_of, run_here, run_of
from timm_sscl.training.saving.checkpoint import holds_a_run
from timm_sscl.training.runs.run_checks import LabelCountingEvaluator, warn_long_warmup, warn_teacher_at_chance
from timm_sscl.training.runs.run_summary import best_epoch_facts, best_epoch_text


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path / 'images')


@pytest.mark.parametrize('warmup, epochs, options, warns', [
    (5, 2, {}, True), (2, 2, {}, True), (1, 2, {}, False), (0, 1, {}, False),
    (5, 2, dict(sched='none'), False), (5, 2, dict(warmup_prefix=True), False),
])
def test_warmup_that_ends_after_the_training(warmup, epochs, options, warns, caplog):
    warn_long_warmup('student', **{**dict(sched='cosine', warmup_epochs=warmup, epochs=epochs), **options})
    assert ('never reaches' in caplog.text) == warns


@pytest.mark.parametrize('top1, samples, most, warns', [
    (10., 10000, 1000, True), (10.5, 10000, 1000, True),  # standard error 0.3
    (10.7, 10000, 1000, False),
    (5., 10000, 1000, True),  # worse than chance
    (85., 1000, 850, True), (85., 1000, 100, False),  # always the most frequent class
])
def test_teacher_at_chance(top1, samples, most, warns, caplog):
    warn_teacher_at_chance('resnet', top1, samples, most)
    assert ('teaches nothing' in caplog.text) == warns


def test_evaluator_counts_labels():
    evaluator = LabelCountingEvaluator()
    for target in ([0, 2, 2], [2, 1]):
        evaluator.update(torch.eye(4)[target], torch.tensor(target))
    assert evaluator.label_counts.tolist() == [1, 1, 3, 0] and evaluator.compute()['top1'] == 100.


def test_teacher_below_chance_is_not_called_within_it(caplog):
    warn_teacher_at_chance('net', 0., 16, 8)
    assert 'share of the most frequent class among 16' in caplog.text
    assert 'below chance (50.00' in caplog.text and 'labels' in caplog.text and 'within' not in caplog.text


def test_best_epoch_says_whose_it_is_and_which_file_holds_it():
    facts = best_epoch_facts('top1', dict(top1=50., top1_ema=60.), 61., 3)
    assert (facts['top1'], facts['epoch'], facts['weights']) == (61., 3, 'ema')
    text = best_epoch_text(facts, 'top1')
    assert 'averaged model' in text and '61.00' in text and 'epoch 4' in text and 'checkpoint-3.pth.tar' in text
    facts = best_epoch_facts('top1', dict(top1=50.), 51., 0)
    assert facts['weights'] == 'model' and 'average' not in best_epoch_text(facts, 'top1')
    assert best_epoch_text(best_epoch_facts('top1', dict(top1=50.), None, None), 'top1') == ''


def test_run_with_an_average_and_a_long_warmup_says_so(images, tmp_path, monkeypatch, caplog):
    args = [*(a for a in IMAGES if a not in ('--distill', 'none')), '--teacher-epochs', '1', '--warmup-epochs', '3']
    with caplog.at_level(logging.INFO):
        run_here([*args, '--model-ema', '--model-ema-decay', '0.5'], tmp_path, monkeypatch)
    assert 'student: --warmup-epochs 3 is no less than its 2 epochs' in caplog.text
    assert 'teacher test_resnet: --warmup-epochs 3 is no less than its 1 epochs' in caplog.text
    assert 'within two standard errors of chance (33.33' in caplog.text  # three classes of noise
    folder = run_of(tmp_path / 'out')
    best = json.loads((folder / 'summary.json').read_text())['best']
    column = [float(row['eval_top1_ema']) for row in rows_of(folder)]
    assert best['weights'] == 'ema' and best['top1'] == max(column) == column[best['epoch']]
    assert (folder / best['checkpoint']).is_file()
    line = next(line for line in caplog.text.splitlines() if line.startswith('Student '))
    assert f'best top1 of the averaged model (--model-ema) {max(column):.2f}' in line
    assert f"(epoch {best['epoch'] + 1}; the files count from 0: {best['checkpoint']})" in line
    for start in ('Firing ', 'Energy '):
        line = next(line for line in caplog.text.splitlines() if line.startswith(start))
        assert '(of the weights that are not averaged)' in line
    caplog.clear()  # the average is loaded after the model was set to T=3
    run_here(['--eval-only', '--resume', folder, '--eval-timesteps', '3'], tmp_path, monkeypatch)
    assert 'was asked for' not in caplog.text


# ---- a start that failed

def test_first_epoch_that_crashed_leaves_its_name_free(images, tmp_path, monkeypatch, capsys):
    (tmp_path / 'crash.py').write_text(
        'from timm_sscl import register_loss\n\n\n@register_loss("crashes")\ndef crashes(step):\n    raise {}\n'
        .format('RuntimeError("mine")'))
    args = [*(a for a in IMAGES if a not in ('--distill', 'none')), '--epochs', '1']
    with pytest.raises(RuntimeError, match='mine'):
        run_here([*args, '--loss-file', 'crash.py', '--loss', 'crashes=1'], tmp_path, monkeypatch)
    assert (tmp_path / 'out/run/args.yaml').is_file()
    run_here([*args, '--distill', 'none'], tmp_path, monkeypatch)
    assert len(rows_of(tmp_path / 'out/run')) == 1
    code, line = fails([*args, '--distill', 'none'], tmp_path, monkeypatch, capsys)
    assert code == 2 and 'holds a run already' in line


@pytest.mark.parametrize('name, holds', [
    ('args.yaml', False), ('.lock', False), ('last.pth.tar.part', False), ('teacher-features.bin', False),
    ('last.pth.tar', True), ('recovery-0-1.pth.tar', True), ('summary.json', True), ('summary.csv', True),
    ('notes.txt', True),  # not ours to write over
])
def test_what_makes_a_folder_a_run(name, holds, tmp_path):
    assert not holds_a_run(tmp_path / 'gone') and not holds_a_run(tmp_path)
    (tmp_path / name).write_text('')
    assert holds_a_run(tmp_path) == holds
