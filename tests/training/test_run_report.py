"""Reports of tiny runs: one page that needs no other file, of every kind of run, and the comparison of several."""
import csv
import json
import logging
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from runs import ROOT, TINY, run_here
from timm_sscl.training.runs.interval import interval
from timm_sscl.training.runs.report_command import main
from timm_sscl.training.runs.run_report import write_run_report

ALL = {'curves.png', 'terms.png', 'layers.png', 'rates.png', 'raster.png', 'timesteps.png', 'energy.png', 'cka.png',
       'confusion.png', 'worst.png'}
KINDS = dict(
    taught=[*TINY, '--experiment', 'taught', '--report'],
    seed=[*TINY, '--experiment', 'seed', '--seed', '7'],
    other=[*TINY, '--experiment', 'other', '--epochs', '1', '--teacher-epochs', '2', '--distill', 'kd'],
    alone=[*TINY[4:], '--experiment', 'alone', '--model', 'test_resnet', '--distill', 'none'],  # without T
    events=['--dataset', 'events/digits', '--model', 'spiking_test_resnet', '-T', '3', '--epochs', '1',
            '--warmup-epochs', '0', '--batch-size', '16', '--workers', '0', '--train-num-samples', '32',
            '--val-num-samples', '20', '--event-size', '16', '--experiment', 'events'])


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """A tiny run of every kind, made when a test first asks for it; made(kind) is its folder."""
    cwd = tmp_path_factory.mktemp('runs')

    def made(kind):
        folder = cwd / 'out' / kind
        if not folder.is_dir():
            with pytest.MonkeyPatch.context() as patch:
                run_here([*KINDS[kind], '--output', cwd / 'out'], cwd, patch)
        return folder
    return made


def whole(page):
    """The text of a page that names no other file: pictures and styles are in it, links stay on it."""
    text = page.read_text()
    assert not re.findall(r'(?:src|href)="(?!data:image/png;base64,|#)', text) and '@import' not in text
    assert not re.search(r'https?://', text)
    return text


def pictures(folder):
    for file in (folder / 'report').iterdir():
        with Image.open(file) as image:
            assert min(image.size) > 150 and np.asarray(image.convert('L')).std() > 1, file.name
    return {file.name for file in (folder / 'report').iterdir()}


@pytest.mark.slow
def test_train_writes_the_report_of_its_run(runs):
    folder = runs('taught')
    page = whole(folder / 'report.html')
    assert pictures(folder) - {'worst.png'} == ALL - {'worst.png'}
    assert page.count('<img') == len(pictures(folder)) and 'Complete: 2 epochs.' in page
    facts = json.loads((folder / 'summary.json').read_text())
    assert 'of 40 validation images (those of --val-num-samples 40)' in page
    # the whole validation set, rebuilt: the accuracy is that of the last validation
    assert f'{facts["student"]["top1"]:.2f} top-1, on 40 validation images' in page
    assert f'{facts["teacher"]["top1"]:.2f} top-1' in page and '12 activations are neurons, 0 stay analog' in page
    energy = facts['energy']  # of all 40 images, in both
    assert energy['images'] == 40 and f'In all {energy["spiking_uj"]:.4g} microjoules per image' in page
    assert '4.6 pJ' in page and 'train.py' in facts['command'] and facts['versions']['torch'] in page


@pytest.mark.slow
def test_the_manual_names_every_column_and_key_of_a_run(runs):
    page = (ROOT / 'docs/pages/report.md').read_text()
    documented = set(re.findall(r'`([\w]+)`', page))
    facts = json.loads((runs('taught') / 'summary.json').read_text())
    inside = {key for name in ('student', 'best', 'teacher', 'energy') for key in facts[name]}
    assert {*facts, *inside} <= documented
    patterns = [re.sub('NAME|TAP|LAYER', r'[\\w.]+', re.sub('stepT', r'step\\d+', name)) for name in documented]
    with open(runs('taught') / 'summary.csv') as file:
        columns = next(csv.reader(file))
    assert len(columns) > 20 and not [c for c in columns if not any(re.fullmatch(p, c) for p in patterns)]


@pytest.mark.slow
def test_a_report_leaves_the_run_and_the_process_as_they_were(runs, tmp_path):
    folder = tmp_path / 'taught'
    shutil.copytree(runs('taught'), folder)
    shutil.copytree(runs('taught').parent / 'teachers', tmp_path / 'teachers')
    files = [f for f in tmp_path.rglob('*') if f.is_file() and 'report' not in f'{f.parent.name}{f.name}']
    before = {f: f.read_bytes() for f in files}
    state = torch.get_rng_state()
    write_run_report(folder, images=16)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(f.read_bytes() == content for f, content in before.items())
    assert 'on 16 validation images' in (folder / 'report.html').read_text()


@pytest.mark.slow
def test_a_run_without_teacher_and_spikes(runs, capsys):
    main([str(runs('alone'))])
    page = whole(runs('alone') / 'report.html')
    assert capsys.readouterr().out.strip() == str(runs('alone') / 'report.html')
    assert 'The run had no teacher.' in page and 'The model does not spike.' in page
    assert not {'cka.png', 'raster.png', 'layers.png'} & pictures(runs('alone'))


@pytest.mark.slow
def test_a_run_on_event_data(runs):
    main([str(runs('events'))])
    page = whole(runs('events') / 'report.html')
    assert 'The number of timesteps is that of the event frames.' in page
    assert {'raster.png', 'cka.png', 'rates.png', 'energy.png'} <= pictures(runs('events'))


@pytest.mark.slow
def test_an_interrupted_run_says_so(runs, tmp_path):
    folder = tmp_path / 'taught'
    folder.mkdir()
    for name in ('args.yaml', 'checkpoint-0.pth.tar', 'summary.csv'):
        shutil.copy(runs('taught') / name, folder)
    main([str(folder), '--images', '8'])
    page = whole(folder / 'report.html')
    assert 'Not complete: the run was interrupted after epoch 1 of 2 epochs.' in page and 'checkpoint-0.pth.tar' in page


@pytest.mark.slow
def test_runs_are_grouped_by_their_options_but_the_seed(runs, tmp_path, capsys):
    folders = [runs(kind) for kind in ('taught', 'seed', 'other')]
    main([*map(str, folders), '--output', str(tmp_path)])
    page = whole(tmp_path / 'comparison.html')
    assert '3 runs in 2 groups.' in page and pictures(tmp_path) == {'comparison.png'}
    top1 = [json.loads((f / 'summary.json').read_text())['student']['top1'] for f in folders]
    half = abs(top1[0] - top1[1]) / 2 * 12.706204736432095  # t quantile of one degree of freedom
    assert f'{(top1[0] + top1[1]) / 2:.2f} ± {half:.2f}' in page and f'<td>{top1[2]:.2f}</td>' in page
    assert 'distill=kd' in page and 'distill=sscl' in page and 'seed=' not in page


@pytest.mark.slow
def test_a_report_that_fails_ends_no_run(tmp_path, monkeypatch, caplog):
    def fail(*args):
        raise RuntimeError('no picture today')
    monkeypatch.setattr('timm_sscl.training.runs.run_report._sections', fail)
    with caplog.at_level(logging.INFO):
        run_here([*KINDS['other'], '--distill', 'none', '--output', tmp_path], tmp_path, monkeypatch)
        run_here([*KINDS['other'], '--distill', 'none', '--output', tmp_path, '--experiment', 'on', '--report'],
                 tmp_path, monkeypatch)
    assert caplog.text.count('The report could not be written (RuntimeError: no picture today)') == 1
    assert caplog.text.count('Writes the report') == 1 and ' from the start until here' in caplog.text
    assert (tmp_path / 'on' / 'summary.json').is_file() and not (tmp_path / 'other' / 'report.html').exists()


def test_intervals_are_those_of_the_t_distribution():
    # a table's quantile of 3 degrees of freedom: 3.182
    found = interval([1., 2., 3., 6.])
    assert found.mean == 3 and found.half == pytest.approx(3.182446 * (14 / 3) ** .5 / 2, rel=1e-6)
    assert interval([5.]).half is None
    with pytest.raises(ValueError, match='there are none'):
        interval([])


@pytest.mark.parametrize('argv, message', [
    (['nowhere'], "'nowhere' holds no run of train.py: there is no args.yaml"),
    (['nowhere', '--images', '0'], '--images 0: must be 1 or more'),
    (['.', '.'], "'.' stands there twice"),
    (['nowhere', '--output', 'x'], '--output: is for the comparison of several runs')])
def test_wrong_commands_are_one_line(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert exit_.value.code == 2 and message in capsys.readouterr().err


def test_without_the_extra_it_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr('timm_sscl.training.runs.report_command.can_report', lambda: False)
    monkeypatch.setattr('timm_sscl.training.command_line.options.can_report', lambda: False)
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "pip install 'timm_sscl[report]'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_here(['--report'], tmp_path, monkeypatch)
    assert "--report: matplotlib and jinja2 are not both installed" in capsys.readouterr().err
