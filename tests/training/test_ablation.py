"""The ablation's plan, resumption, tables and intervals, with a fake trainer; no training."""
import csv
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / 'benchmarks'))

import ablation
import ablation_gradients
import ablation_precision
import ablation_results as results
import ablation_runs
import pages
import trial_precision
from ablation_runs import Runner
from timm_sscl.training.command_line.options import parse_args

# stands in for train.py: keeps a checkpoint after its first epoch, and, with KILL in the folder above, dies there
FAKE = '''
import json, os, sys
from pathlib import Path
argv = sys.argv[1:]
resumed = argv[0] == '--resume'
folder = Path(argv[1]) if resumed else Path(argv[argv.index('--output') + 1]) / argv[argv.index('--experiment') + 1]
folder.mkdir(parents=True, exist_ok=True)
(folder / 'args.yaml').write_text('{opt: adamw, lr: 0.002, weight_decay: 0.02}')
(folder / 'last.pth.tar').write_text('')
with open(folder / 'starts.txt', 'a') as starts:
    starts.write('resumed\\n' if resumed else 'new\\n')
if (folder.parent / 'KILL').exists():
    sys.exit(1)
(folder / 'summary.csv').write_text('\\n'.join([
    'epoch,train_loss,train_task_loss,eval_top1,train_mi_bound_layer1,train_nce_layer1,train_cka_layer1,'
    'train_cka_running_layer1,train_weight_layer1',
    '0,2.0,1.5,30,0.5,1.25,.3,.25,4', '1,1.0,.5,31,1.5,1.25,.3,.25,4', '']))
summary = dict(student=dict(top1=31., loss=1.), best=dict(top1=31.5, epoch=0), teacher=dict(top1=60.), seconds=8.,
               firing_rates=dict(a=.2, b=.4))
(folder / 'summary.json').write_text(json.dumps(summary))
'''


@pytest.fixture
def runner(tmp_path):
    fake = tmp_path / 'fake.py'
    fake.write_text(FAKE)
    return Runner(tmp_path / 'out', 2, None, 'abc123', [sys.executable, str(fake)])


def arguments(runner, runs):
    return {run.name: ['--output', str(runner.folder(run).parent), '--experiment', run.name] for run in runs}


RUNS = ablation.primary_runs(ablation.BASE, ['none', 'sscl'], [1, 2], [2])


# ---- intervals

def test_interval_is_scipys_paired_t_interval():
    rng = np.random.RandomState(0)
    a, b = rng.normal(70, 1, 6), rng.normal(69, 1, 6)
    paired = results.paired_interval(dict(enumerate(a)), dict(enumerate(b)))
    low, high = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert paired.n == 6
    assert paired.mean == pytest.approx((low + high) / 2, rel=1e-12)  # the same formula in float64
    assert paired.half == pytest.approx((high - low) / 2, rel=1e-9)  # scipy's quantile against its interval


def test_interval_of_two_pairs_by_hand():
    # differences 1 and 3: mean 2, s = sqrt(2), s / sqrt(2) = 1, t(0.975) = tan(0.475 pi) for one degree of freedom
    paired = results.paired_interval({1: 3., 2: 7.}, {1: 2., 2: 4.})
    assert paired.mean == 2.
    assert paired.half == pytest.approx(math.tan(0.475 * math.pi), rel=1e-9)  # closed form of the Cauchy quantile


def test_only_common_seeds_are_paired():
    assert results.paired_interval({1: 5., 2: 9.}, {1: 4.}) == (1., None, 1)
    assert results.paired_interval({1: 5.}, {2: 4.}) is None


# ---- the plan

def test_primary_runs_pair_the_seeds_and_share_their_settings():
    runs = ablation.primary_runs(ablation.BASE, ['none', 'sscl', 'contrastive'], [1, 2], [2, 4])
    assert len(runs) == len({run.name for run in runs}) == 12
    assert [run.variant for run in runs[:3]] == ['none', 'sscl', 'contrastive'] and {r.seed for r in runs[:3]} == {1}
    options = {run.variant: run.options for run in runs}
    assert options['none'] == {'distill': 'none'}
    same = {k: v for k, v in options['sscl'].items() if k not in ('distill', 'sscl_weighting')}
    assert same == {k: v for k, v in options['contrastive'].items() if k != 'distill'}


def test_unknown_mode_is_named():
    with pytest.raises(SystemExit, match='distilled'):
        ablation.primary_runs(ablation.BASE, ['distilled'], [1], [2])


def test_selection_changes_one_coordinate_at_a_time():
    runs = ablation.select_runs(ablation.BASE, ['temperature', 'cka_floor'], [1], [2])
    assert len(runs) == len({run.name for run in runs})
    base = ablation.sscl_options(**ablation.BASE)
    changed = [{k for k in base if run.options[k] != base[k]} for run in runs if run.variant != 'none']
    assert all(len(names) <= 1 for names in changed)
    assert sum(names == set() for names in changed) == 1  # the base is there once
    assert {v for names in changed for v in names} == {'sscl_temperature', 'sscl_cka_floor'}


def test_distillation_has_its_own_weights():
    runs = ablation.select_runs(ablation.BASE, ['kd'], [1], [2])
    assert [run.options for run in runs if run.variant.startswith('kd')] == [
        dict(distill='kd', kd_weight=w) for w in (0.1, 0.3, 1.)]


@pytest.mark.parametrize('scale', list(ablation.SCALES))
def test_train_takes_every_command(scale, tmp_path):
    runs = [*ablation.select_runs(ablation.BASE, list(ablation.COORDINATES), [1], [2]),
            *ablation.primary_runs(ablation.BASE, list(ablation.primary_variants(ablation.BASE)), [1], [4]),
            ablation.teacher_run('primary', ablation.SCALES[scale])]
    for run in runs:
        words = ablation.command(
            run, ablation.SCALES[scale], tmp_path, tmp_path / run.name, 1, tmp_path / 'teacher.pth')
        args, _ = parse_args(words)
        assert args.experiment == run.name and args.seed == run.seed
        if run.timesteps:
            assert args.timesteps == run.timesteps and args.teacher_checkpoint == str(tmp_path / 'teacher.pth')
        else:
            assert args.model == 'resnet20_cifar' and not args.losses


# ---- data

def test_a_tenth_is_held_out_and_never_trained_on(tmp_path):
    for split, count in (('train', 40), ('validation', 5)):
        for name in 'abcd':
            (tmp_path / 'data' / split / name).mkdir(parents=True)
            for i in range(count):
                (tmp_path / 'data' / split / name / f'{i}.png').write_text(f'{split} {name} {i}')
    scale = ablation.SCALES['small']._replace(classes=2, images_per_class=30)
    for phase in ('select', 'primary'):
        ablation.link_data(tmp_path / 'data', tmp_path / 'links', scale, phase)
        ablation.link_data(tmp_path / 'data', tmp_path / 'links', scale, phase)  # again: nothing changes
    files = {(phase, split): [f.read_text() for f in (tmp_path / 'links' / phase / split).glob('*/*')]
             for phase in ('select', 'primary') for split in ('train', 'validation')}
    assert {k: len(v) for k, v in files.items()} == {
        ('select', 'train'): 60, ('select', 'validation'): 8, ('primary', 'train'): 60, ('primary', 'validation'): 10}
    assert all(text.startswith('train') for text in files['select', 'train'] + files['select', 'validation'])
    assert not set(files['select', 'train']) & set(files['select', 'validation'])
    assert set(files['primary', 'train']) == set(files['select', 'train'])  # so that both phases share the teacher
    assert all(text.startswith('validation') for text in files['primary', 'validation'])
    assert {text.split()[1] for text in files['select', 'validation']} == {'a', 'c'}  # evenly spaced classes


def test_with_all_images_the_comparison_trains_on_the_held_out_ones_too():
    files = [f'{i}.png' for i in range(40)]
    train, held = ablation.split_class(files, True, None, 0)
    assert len(held) == 4 and sorted(train + held) == sorted(files)
    assert sorted(ablation.split_class(files, False, None, 0)[0]) == sorted(files)


# ---- running

def test_finished_runs_are_not_run_again(runner, capsys):
    runner(RUNS, arguments(runner, RUNS))
    runner(RUNS, arguments(runner, RUNS))
    for run in RUNS:
        assert (runner.folder(run) / 'starts.txt').read_text() == 'new\n'
    runner.show_plan(RUNS)
    assert f'{len(RUNS)} runs, {len(RUNS)} of them done' in capsys.readouterr().out


def test_a_killed_run_is_resumed_from_its_checkpoint(runner):
    kill = runner.output / 'runs' / 'KILL'
    kill.parent.mkdir(parents=True)
    kill.write_text('')
    with pytest.raises(SystemExit, match=RUNS[0].name):
        runner(RUNS[:1], arguments(runner, RUNS))
    kill.unlink()
    runner(RUNS[:1], arguments(runner, RUNS))
    assert (runner.folder(RUNS[0]) / 'starts.txt').read_text() == 'new\nresumed\n'


def test_a_run_without_a_checkpoint_starts_anew(runner):
    folder = runner.folder(RUNS[0])
    folder.mkdir(parents=True)
    (folder / 'args.yaml').write_text('')
    runner(RUNS[:1], arguments(runner, RUNS))
    assert (folder / 'starts.txt').read_text() == 'new\n'


def test_a_run_that_another_process_holds_is_left_alone(runner, capsys):
    folder = runner.folder(RUNS[0])
    folder.parent.mkdir(parents=True)
    code = ('import fcntl, sys; f = open(sys.argv[1], "w"); fcntl.flock(f, fcntl.LOCK_EX); '
            'print("held", flush=True); sys.stdin.read()')
    other = subprocess.Popen([sys.executable, '-c', code, str(folder.parent / f'{folder.name}.lock')],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == 'held\n'
    runner(RUNS[:2], arguments(runner, RUNS))
    other.communicate('')
    assert not folder.exists() and ablation_runs.is_done(runner.folder(RUNS[1]))
    assert 'another process' in capsys.readouterr().out


def test_nothing_starts_that_would_not_be_done_by_the_deadline(runner):
    runner(RUNS[:1], arguments(runner, RUNS))
    late = Runner(runner.output, 1, time.time() + 4, 'abc123', runner.train)
    assert late.estimate(RUNS[1]) == 8.  # the fake's, at T = 2
    assert late.estimate(RUNS[1]._replace(timesteps=4)) == 16.
    late(RUNS[:2], arguments(runner, RUNS))
    assert not late.folder(RUNS[1]).exists()


def test_nothing_starts_while_the_machine_is_busy(runner, monkeypatch):
    loads = iter([3., 2.5, 1.])
    monkeypatch.setattr(ablation_runs.os, 'getloadavg', lambda: (next(loads), 0., 0.))
    runner.max_load = 2.
    runner(RUNS[:1], arguments(runner, RUNS))
    assert ablation_runs.is_done(runner.folder(RUNS[0])) and next(loads, None) is None  # asked until it fell below 2


# ---- results

def test_csvs_hold_a_row_per_run_and_per_epoch_and_layer(runner, tmp_path):
    runner.device = 'a CPU (AVX2)'
    runner(RUNS, arguments(runner, RUNS))
    rows, layers = results.collect(runner.output, 'small')
    results.write_csv(tmp_path / 'runs.csv', rows, ('seconds', 'revision'))
    read = results.read_csv(tmp_path / 'runs.csv')
    with open(tmp_path / 'runs.csv') as file:
        assert next(csv.reader(file))[-2:] == ['seconds', 'revision']
    assert sorted((r['variant'], r['seed']) for r in read) == sorted((r.variant, str(r.seed)) for r in RUNS)
    sscl = next(r for r in read if r['variant'] == 'sscl')
    assert (sscl['precision'], sscl['device']) == ('float32', 'a CPU (AVX2)')  # of args.yaml and of the runner
    outcome = {key: sscl[key] for key in ('top1_last', 'top1_best', 'best_epoch', 'train_loss')}
    assert outcome == dict(top1_last='31.0', top1_best='31.5', best_epoch='1', train_loss='1.0')
    assert (sscl['opt'], sscl['lr']) == ('adamw', '0.002')
    assert [sscl[key] for key in ('sscl_weight', 'teacher_top1', 'firing_rate', 'revision')] == [
        '0.1', '60.0', '0.3', 'abc123']
    assert len(layers) == len(RUNS) * 2
    assert {k: layers[1][k] for k in ('epoch', 'layer', 'nce', 'mi_bound', 'weight')} == dict(
        epoch=2, layer='layer1', nce='1.25', mi_bound='1.5', weight='4')


def test_every_configuration_that_was_tried_is_in_the_table(runner):
    runs = ablation.select_runs(ablation.BASE, ['temperature'], [1, 2], [2])
    runner(runs, arguments(runner, runs))
    rows, _ = results.collect(runner.output, 'small')
    lines = results.selection_lines(rows)
    assert len(lines) == 2 + 1 + len(ablation.COORDINATES['temperature'])  # head, cross-entropy
    assert any(line == '| infonce | 0.1 | 0.07 | 0.1 | 0.1 | pooled | cka | 31.0, 31.0 | +0.0 |' for line in lines)


def table_rows(values):
    return [dict(scale='small', phase='primary', variant=mode, seed=str(seed), timesteps='2', top1_last=str(top1),
                 top1_best=str(top1 + 1)) for mode, tops in values.items() for seed, top1 in enumerate(tops)]


def test_table_has_the_paired_difference_and_the_papers(tmp_path):
    rows = table_rows(dict(none=[40., 42.], sscl=[43., 43.], kd=[41.]))
    table = {r['mode']: r for r in results.comparison(rows, 2)}
    assert table['none']['difference'] is None and table['none']['top1'] == 41.
    assert table['sscl']['difference'] == results.paired_interval({0: 43., 1: 43.}, {0: 40., 1: 42.})
    assert table['kd']['difference'].half is None
    assert table['sscl']['paper'] == 69.81 and table['sscl']['paper_difference'] == pytest.approx(1.54)
    lines = results.comparison_lines(rows, 2)
    assert any('| 43.00 | 44.00 | +2.00 ± 12.71 | 69.81 | +1.54 |' in line for line in lines)  # t(0.975, 1) = 12.706


def test_verdict_compares_the_modes_on_their_common_seeds():
    # over both seeds kd is above contrastive, but contrastive has only the first, on which it is above kd
    rows = table_rows(dict(none=[40., 41.], kd=[41., 49.], contrastive=[42.], sscl=[43., 44.]))
    text = results.verdict(rows, 2)
    assert 'baseline < distillation < contrastive < SSCL; as in the paper' in text and 'the 1 seed that' in text
    assert 'excludes 0' in text  # differences 3 and 3
    rows = table_rows(dict(none=[40., 41.], sscl=[43., 41.]))
    assert 'includes 0' in results.verdict(rows, 2)
    assert 'not told apart' in results.pair_lines(table_rows(dict(kd=[40., 43.], sscl=[42., 42.])), 2)[0]


def test_precision_and_device_of_a_table_are_those_of_its_runs(runner):
    assert results.precision_of(dict(amp=True, amp_dtype='bfloat16')) == 'bfloat16'
    assert results.precision_of(dict(amp=False, amp_dtype='bfloat16', model_dtype='float64')) == 'float64'
    runner(RUNS[:1], arguments(runner, RUNS))
    assert ablation_runs.recorded_device(runner.folder(RUNS[0])) is None  # this runner was not told
    new, old = dict(precision='bfloat16', device='a CPU (AMX)'), dict(precision='')  # '': as read from a CSV
    assert results.conditions([new, new]) == 'Precision: bfloat16. CPU or GPU: a CPU (AMX).'
    assert results.conditions([old, {}]) == 'Precision: not recorded. CPU or GPU: not recorded.'
    assert results.conditions([new, old, new]) == (
        'Precision: bfloat16 (2 of 3 runs); not recorded (1 of 3 runs). '
        'CPU or GPU: a CPU (AMX) (2 of 3 runs); not recorded (1 of 3 runs).')
    rows = [dict(row, **new, teacher_top1='60', sscl_critic='infonce') for row in table_rows(dict(none=[40.]))]
    page = '\n'.join(results.page_lines(rows, [], [], ablation.facts('small')))
    assert page.count('bfloat16') == 1 and 'ot recorded' not in page.split('## CKA')[0]  # what ran, not the recipe


def test_a_pages_section_is_replaced_and_the_rest_stays(tmp_path):
    page = tmp_path / 'results.md'
    page.write_text(f'# Results\n\n{results.BEGIN}\nold\n{results.END}\n\nafter\n')
    pages.write_section(page, results.BEGIN, results.END, ['first', 'second'])
    assert page.read_text() == f'# Results\n\n{results.BEGIN}\nfirst\nsecond\n{results.END}\n\nafter\n'


def test_a_page_without_markers_is_named_and_left_alone(tmp_path):
    page = tmp_path / 'results.md'
    page.write_text('# Results\n')
    with pytest.raises(SystemExit, match='results.md'):
        pages.write_section(page, results.BEGIN, results.END, ['lines'])
    assert page.read_text() == '# Results\n'


def test_the_results_page_holds_what_the_csvs_say(tmp_path):
    page = tmp_path / 'results.md'
    page.write_text(results.PAGE.read_text())
    rows, layers, gradients = (results.read_csv(ablation.RESULTS / name) for name in (
        results.RUNS_CSV, results.LAYERS_CSV, results.GRADIENTS_CSV))
    notes = (ablation.RESULTS / results.NOTES).read_text()
    lines = results.page_lines(rows, layers, gradients, ablation.facts('small'), notes)
    pages.write_section(page, results.BEGIN, results.END, lines)
    assert page.read_text() == results.PAGE.read_text()  # python benchmarks/ablation.py --report writes it


# ---- diagnosis

def test_term_gradients_are_those_of_the_terms():
    # task loss (a - x)^2 and added term 3 * 0.5 * b^2 of a student with two parameters in two stages
    class Student(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = torch.nn.ParameterList([torch.tensor([2.])])
            self.layer1 = torch.nn.ParameterList([torch.tensor([1., 2.])])

    class Task:
        student, weights, task_loss_weight = Student(), {'term': 3.}, 1.

        def __call__(self, x, y):
            a, b = self.student.conv1[0], self.student.layer1[0]
            return dict(task_loss=((a - x) ** 2).sum() + b[0], term_loss=.5 * (b ** 2).sum())

    stem, layer1 = ablation_gradients.term_gradients(Task(), [(torch.tensor(1.), None)] * 2)
    assert stem == dict(stage='stem', task_norm=2., added_norm=0., ratio=0., cosine=0.)
    # gradients (1, 0) and 3 * (1, 2): norms 1 and 3 sqrt(5), cosine 1 / sqrt(5); rounded to 5 places
    assert layer1['task_norm'] == 1. and layer1['ratio'] == pytest.approx(3 * 5 ** .5, abs=1e-5)
    assert layer1['cosine'] == pytest.approx(5 ** -.5, abs=1e-5)


def test_students_train_in_the_faster_precision(tmp_path, monkeypatch):
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)
    small = ablation.SCALES['small']._replace(width=2)
    for faster, slower in (('float32', 'bfloat16'), ('bfloat16', 'float32')):
        output = tmp_path / faster
        monkeypatch.setattr(trial_precision, 'time_precisions', lambda create: {faster: 10., slower: 80.})
        monkeypatch.setattr(ablation_precision, 'machine', lambda: dict(cpu='a CPU', cpu_capability='AVX2', gpu=None))
        scale = ablation.in_faster_precision(small, output)
        run = ablation.primary_runs(ablation.CHOSEN, ['none'], [1], [2])[0]
        words = ablation.command(run, scale, tmp_path, tmp_path / 'run', 1, tmp_path / 'teacher.pth')
        assert ('--amp' in words) == ('--amp-dtype' in words) == (faster == 'bfloat16')
        monkeypatch.setattr(trial_precision, 'time_precisions', lambda create: {faster: 80., slower: 10.})
        assert ablation.in_faster_precision(small, output) == scale  # one precision per output
        assert json.loads((output / 'precision.json').read_text())['device'] == 'a CPU (AVX2)'
    monkeypatch.setattr(ablation_precision, 'machine', lambda: dict(cpu='a CPU', cpu_capability='AVX512', gpu=None))
    with pytest.raises(SystemExit, match='AVX512'):
        ablation.in_faster_precision(small, output)
    (tmp_path / 'older' / 'runs' / 'run').mkdir(parents=True)
    (tmp_path / 'older' / 'runs' / 'run' / 'args.yaml').write_text('')
    assert ablation.in_faster_precision(small, tmp_path / 'older') == small
    paper = ablation.SCALES['paper']
    assert ablation.in_faster_precision(paper, tmp_path / 'paper') == paper and not (tmp_path / 'paper').exists()


def test_precisions_are_timed_on_the_student():
    times = trial_precision.time_precisions(lambda name: ablation_precision._Step(name, 2))
    assert set(times) == {'float32', 'bfloat16'} and min(times.values()) > 0
