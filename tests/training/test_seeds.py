"""--seeds: one run per seed as if it were started alone, one teacher, resumable, and the mean with its interval."""
import json
import logging
import shutil
import signal

import pytest
from timm.utils.checkpoint_saver import load_checkpoint_metadata

import train
from runs import TINY, fails, rows_of, run_here, same
from timm_sscl.training.command_line.options import OptionError, parse_args
from timm_sscl.training.runs.report_command import main as report
from timm_sscl.training.steps.stop import Interrupted

BASE = [*TINY, '--epochs', '1', '--output', 'out']


def summary(folder):
    return json.loads((folder / 'summary.json').read_text())


@pytest.fixture(scope='module')
def three(tmp_path_factory):
    """Seeds 1 and 2, interrupted in the second; resumed with its folder; then seed 3 added. The texts of all three."""
    cwd, texts = tmp_path_factory.mktemp('seeds'), []
    with pytest.MonkeyPatch.context() as patch:
        fit = train.fit

        def interrupted(training):
            if training.args.seed == 2 and training.name == 'student':
                raise Interrupted(signal.SIGTERM)
            return fit(training)
        patch.setattr(train, 'fit', interrupted)
        with pytest.raises(SystemExit) as exit_:
            run_here([*BASE, '--seeds', '1', '2', '--experiment', 'all'], cwd, patch)
        assert exit_.value.code == 128 + signal.SIGTERM
        patch.setattr(train, 'fit', fit)
        first = (cwd / 'out/all/seed-1/last.pth.tar').stat().st_mtime_ns
        assert not (cwd / 'out/all/summary.json').exists()
        run_here(['--resume', 'out/all'], cwd, patch)
        texts.append(summary(cwd / 'out/all'))
        run_here(['--resume', 'out/all', '--seeds', '1', '2', '3'], cwd, patch)
        texts.append(summary(cwd / 'out/all'))
        assert (cwd / 'out/all/seed-1/last.pth.tar').stat().st_mtime_ns == first  # not trained again
    return cwd, texts


@pytest.mark.slow
def test_every_seed_has_its_run_and_all_one_teacher(three):
    cwd, (two, all_three) = three
    assert list(two['seeds']) == ['1', '2'] and list(all_three['seeds']) == ['1', '2', '3']
    runs = [cwd / 'out/all' / f'seed-{seed}' for seed in (1, 2, 3)]
    assert [summary(run)['seed'] for run in runs] == [1, 2, 3]
    assert len({summary(run)['teacher']['digest'] for run in runs}) == 1
    assert len(list((cwd / 'out/teachers').iterdir())) == 1
    assert [len(rows_of(run)) for run in runs] == [1, 1, 1]


@pytest.mark.slow
def test_a_seeds_run_is_the_run_alone(three, monkeypatch):
    cwd, _ = three
    run_here([*BASE, '--seed', '3', '--experiment', 'alone'], cwd, monkeypatch)
    one, other = (load_checkpoint_metadata(str(cwd / 'out' / name / 'last.pth.tar'))
                  for name in ('alone', 'all/seed-3'))
    for name in ('state_dict', 'optimizer'):
        same(one[name], other[name], name)
    assert rows_of(cwd / 'out/alone') == rows_of(cwd / 'out/all/seed-3')


@pytest.mark.slow
def test_the_summary_is_mean_and_interval_over_the_seeds(three, monkeypatch, caplog):
    cwd, (two, all_three) = three
    top1 = [summary(cwd / 'out/all' / f'seed-{seed}')['student']['top1'] for seed in (1, 2, 3)]
    mean, deviation = sum(top1) / 3, (sum((x - sum(top1) / 3) ** 2 for x in top1) / 2) ** .5
    half = 4.302652729911275 * deviation / 3 ** .5  # t quantile of two degrees of freedom, from a table
    assert all_three['top1'] == dict(mean=pytest.approx(mean), half=pytest.approx(half), count=3)
    assert two['top1']['mean'] == pytest.approx(sum(top1[:2]) / 2) and two['top1']['count'] == 2
    with caplog.at_level(logging.INFO):
        run_here(['--resume', 'out/all'], cwd, monkeypatch)  # all are done: the table again
    assert 'Seeds 1, 2, 3 are done already.' in caplog.text
    assert f'{mean:.2f} ± {half:.2f} top-1 after the last epoch' in caplog.text and 'one for all seeds' in caplog.text
    assert f'seed 3: {top1[2]:.2f} top-1' in caplog.text and 'epoch 1/1' not in caplog.text


@pytest.mark.slow
def test_the_folder_of_all_seeds_is_compared(three, tmp_path, capsys):
    cwd, _ = three
    report([str(cwd / 'out/all'), '--output', str(tmp_path)])
    assert '3 runs in 1 group.' in (tmp_path / 'comparison.html').read_text()


@pytest.mark.slow
def test_a_folder_that_holds_runs_is_left_alone_and_an_interrupted_one_is_told(three, tmp_path, monkeypatch, capsys):
    cwd, _ = three
    code, line = fails([*BASE, '--seeds', '1', '--experiment', 'all'], cwd, monkeypatch, capsys)
    assert code == 2 and 'holds a run already' in line and '--resume out/all' in line
    code, line = fails(['--resume', 'out/all/seed-1', '--seeds', '1', '2'], cwd, monkeypatch, capsys)
    assert code == 2 and 'is the folder of one run' in line
    shutil.copytree(cwd / 'out/teachers', tmp_path / 'out/teachers')

    def stop(training):
        raise Interrupted(signal.SIGINT)
    monkeypatch.setattr(train, 'fit', stop)
    with pytest.raises(SystemExit):
        run_here([*BASE, '--seeds', '5', '6', '--experiment', 'both'], tmp_path, monkeypatch)
    assert '--resume out/both\n' in capsys.readouterr().err


@pytest.mark.slow
def test_auto_goes_on_with_the_newest_unfinished_runs_of_the_same_seeds(three, tmp_path, monkeypatch, caplog):
    cwd, _ = three
    copy = tmp_path / 'out'
    shutil.copytree(cwd / 'out/all', copy / 'all')
    shutil.copytree(cwd / 'out/teachers', copy / 'teachers')
    (copy / 'all/summary.json').unlink()
    options = (copy / 'all/args.yaml').read_text()
    (copy / 'all/args.yaml').write_text(options.replace('experiment: all', "experiment: ''"))
    with caplog.at_level(logging.INFO):
        run_here([*BASE, '--seeds', '1', '2', '3', '--resume', 'auto'], tmp_path, monkeypatch)
    assert 'Seeds 1, 2, 3 are done already.' in caplog.text and (copy / 'all/summary.json').is_file()
    assert sorted(f.name for f in copy.iterdir()) == ['all', 'teachers']


@pytest.mark.slow
def test_two_processes_train_every_seed(server, tmp_path):
    args = [*BASE, '--distill', 'none', '--seeds', '1', '2', '--experiment', 'all']
    code, log = server.run(args, tmp_path, processes=2)
    assert code == 0, log
    found = summary(tmp_path / 'out/all')
    assert found['top1']['count'] == 2 and log.count('± half the width') == 1
    assert [summary(tmp_path / 'out/all' / f'seed-{seed}')['seed'] for seed in (1, 2)] == [1, 2]


@pytest.mark.parametrize('argv, message', [
    (['--seeds', '1', '2', '1'], '--seeds 1 2 1: 1 stands there twice'),
    (['--seeds', '1', '-3'], '--seeds 1 -3: a seed must be a whole number from 0 to 4294967295'),
    (['--seeds', str(2 ** 32)], 'a seed must be a whole number from 0 to 4294967295'),
    (['--seeds', '1', 'two'], "invalid int value: 'two'"),
    (['--seeds'], 'expected at least one argument'),
    (['--seeds', '1', '2', '--seed', '3'], '--seed 3 and --seeds 1 2 both set the seed'),
    (['--seeds', '1', '2', '--eval-only', '--resume', 'x'], '--eval-only trains nothing'),
    (['--seeds', '1', '2', '--resume', __file__], 'is a checkpoint of one run')])
def test_wrong_seeds_are_refused(argv, message):
    with pytest.raises(OptionError, match=message.replace('(', r'\(')):
        parse_args(argv)
