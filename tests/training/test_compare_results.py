"""The comparison's pages, from synthetic runs whose answer is known."""
import csv
import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / 'benchmarks'))

import compare_results
from compare_answers import missing_pairs, ranges, read_plan
from compare_data import check_rows, read_rows, write_rows
from compare_statistics import pairs_for_power
from trials import Scale, Trial, encode_correct

IMAGES = 1000
SMALL = Scale('small', '20x250', 20)
PLAN = dict(
    question='Does the new loss help?', primary=['new', 'old'], further=[['new', 'same'], ['new', 'noisy']], seeds=8,
    stopping='Eight seeds, then stop.', reported='Everything.',
    scales={'small': dict(data='20x250', classes=20)},
    phases=dict(primary=dict(arms=['new', 'old', 'same', 'noisy'], seeds=8, first_seed=0)),
    arms=dict(new=dict(label='the new loss'), old=dict(label='the old loss'), same=None, noisy=None))
# right answers of each arm in eight seeds; of 1,000 images, so that ten are a point
RIGHT = dict(
    new=[400, 410, 390, 405, 395, 400, 410, 390],
    old=[381, 389, 371, 384, 376, 379, 390, 370],  # differences 1.9, 2.1, 1.9, 2.1, 1.9, 2.1, 2, 2: 2.00 ± 0.08
    same=[401, 409, 391, 404, 396, 399, 410, 390],  # ± 0.1: none
    noisy=[420, 390, 410, 385, 415, 380, 430, 370])  # ± 2 and more: not to be told


def line(arm, seed, right, phase='primary', **settings):
    trial = Trial('toy', phase, arm, seed, 2, SMALL, **settings)
    own = dict(asdict(trial), name=trial.name, device='a device', torch='2.14.1', timm='1.0', revision='abc123')
    if isinstance(right, str):
        return dict(own, status='failed', error=right)
    correct = np.arange(IMAGES) < right
    return dict(own, status='ok', top1=right / IMAGES * 100, num_images=IMAGES, correct=encode_correct(correct),
                firing_rate=.2, energy=.3, ms_per_step=8., peak_memory=400., replicas=4, teacher_top1=60.,
                layers=dict(first=dict(layer1=dict(cka_running=.25)), last=dict(layer1=dict(cka_running=.75))))


def lines():
    runs = [line(arm, seed, right) for arm, of in RIGHT.items() for seed, right in enumerate(of)]
    # other phases say the opposite; were they mixed in, nothing would be found
    runs += [line(arm, seed, right, 'pilot') for seed in range(20, 24)
             for arm, right in (('new', 100 + 10 * seed), ('old', 900 - 10 * seed))]
    return runs + [line('new', 0, right, 'tune', config=i, split='heldout', losses=dict(sscl=.1 * i))
                   for i, right in ((1, 300), (2, 320))]


class Pages:
    """A folder with plan, runs, results and pages, and the script on it."""

    def __init__(self, folder, plan=PLAN):
        self.folder = folder
        for name in ('plans', 'runs', 'pages'):
            (folder / name).mkdir()
        (folder / 'plans' / 'toy.yaml').write_text(yaml.safe_dump(plan, sort_keys=False))
        self.page = folder / 'pages' / 'comparison.md'
        self.page.write_text('# Comparison\n\nBy hand.\n')

    def write(self, runs):
        (self.folder / 'runs' / 'runs.jsonl').write_text('\n'.join(map(json.dumps, runs)) + '\n')
        return self.report('--runs', str(self.folder / 'runs'))

    def report(self, *words):
        compare_results.main([*words, *(f'--{name}={self.folder / name}' for name in ('plans', 'results', 'pages'))])
        return self.page.read_text()


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    pages = Pages(tmp_path_factory.mktemp('compare'))
    return pages, pages.write(lines())


def test_a_difference_of_two_points_is_found_and_none_is_none(written):
    _, text = written
    # t(0.975, 7) = 2.3646, SD = 0.0926: 2.3646 * 0.0926 / sqrt(8) = 0.077
    assert '**The new loss is better than the old loss by 1.92 to 2.08 points (the new loss minus the old loss: ' \
           '+2.00 ± 0.08, 8 pairs).**' in text
    assert 'No difference of more than half a point between the new loss and same (' in text
    assert 'Undecided between the new loss and noisy; 8 pairs would find ' in text


def test_the_plan_stands_beside_the_result(written):
    _, text = written
    assert text.startswith('# Comparison\n\nBy hand.\n') and '## Does the new loss help?' in text
    for cells in ('primary comparison | the new loss minus the old loss, paired by seed', 'pairs planned | 8',
                  'stopping rule | Eight seeds, then stop.', 'device | a device', 'top-1 of the teacher | 60.00'):
        assert f'| {cells} |' in text
    assert '| the new loss | 8 | 0 | 40.00 ± 0.67 |' in text  # SD 0.80, times 2.3646 / sqrt(8)
    assert '| the new loss | 0.25, 0.75 |' in text  # CKA at the first and the last epoch
    assert '| small, T = 2, resnet20_cifar | 4 | 2.58 (' in text  # pilot: 2 * SD(20 ... 23)


def test_every_tried_configuration_is_listed_and_counted(written):
    _, text = written
    for number, settings, accuracy in ((1, 'sscl 0.1', '30.00'), (2, 'sscl 0.2', '32.00')):
        assert f'| the new loss | {number} | {settings} | small, T = 2, resnet20_cifar | 1 | {accuracy} |' in text
    # 8 ms and 400 MiB of four trials, which may be of other arms: not compared
    assert '| 40.00 ± 0.67 | 2 | 0.200 | 0.300 | 2.00 |  | 100 |  | 4 |' in text


def test_costs_that_were_measured_alone_have_a_table(tmp_path):
    pages = Pages(tmp_path)
    pages.write([dict(row, replicas=1, ms_per_step=8. if row['arm'] == 'new' else 4.) for row in lines()])
    (pages.folder / 'results').mkdir(exist_ok=True)
    (pages.folder / 'results' / 'compare_toy_costs.csv').write_text(
        'arm,ms,low,high,relative,mib,relative_mib,rounds,device,torch,threads\n'
        'old,4.0,3.9,4.4,1.0,100.0,1.0,7,a CPU,2.14,1\nnew,8.0,7.9,8.4,2.0,150.0,1.5,7,a CPU,2.14,1\n')
    text = pages.report()
    assert '| the new loss | 8 (8 to 8) | 2.00 | 150 | 1.50 |' in text and 'a CPU, 1 thread, torch 2.14' in text
    # trained alone: relative to the first arm
    assert '| 0.300 | 8.00 | 1.00 | 400 | 1.00 | 1 |' in text and '| 0.300 | 4.00 | 0.50 | 400 | 1.00 | 1 |' in text


def test_pages_are_made_from_the_csv_and_bits_alone(written):
    pages, text = written
    (pages.folder / 'runs' / 'runs.jsonl').unlink()
    assert pages.report() == text
    with open(pages.folder / 'results' / 'compare_toy.csv') as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(lines()) and 'correct' not in rows[0]
    assert (pages.folder / 'results' / 'compare_toy_bits.npz').stat().st_size < 20_000
    assert (pages.folder / 'results' / 'compare_toy.png').is_file()


def test_missing_and_failed_runs_are_named(tmp_path, capsys):
    runs = [run for run in lines() if not (run['arm'] == 'old' and run['seed'] == 3 and run['phase'] == 'primary')]
    runs = [run for run in runs if not (run['arm'] == 'new' and run['seed'] == 5)]
    runs.append(line('new', 5, 'ValueError: the loss | is NaN\nat step 3'))
    text = Pages(tmp_path).write(runs)
    assert 'Preliminary, 6 of 8 planned pairs: The new loss is better than the old loss by ' in text
    assert 'Without a pair: the old loss has no run: seed 3; the new loss failed (ValueError: the loss / is NaN): ' \
           'seed 5.' in text
    assert '| the new loss | primary | 5 | small, T = 2, resnet20_cifar | ValueError: the loss / is NaN |' in text
    assert '| the new loss | 7 | 1 |' in text
    assert 'toy: Preliminary, 6 of 8 planned pairs' in capsys.readouterr().out


def test_a_plan_without_runs_stands_on_its_page(tmp_path, capsys):
    pages = Pages(tmp_path)
    assert 'No runs yet.' in pages.report() and 'Eight seeds, then stop.' in pages.page.read_text()
    assert 'toy: no runs yet.' in capsys.readouterr().out
    with pytest.raises(SystemExit, match='--plan other: there is no such file .*; there are toy'):
        pages.report('--plan', 'other')


def test_holm_can_take_a_finding_back(tmp_path):
    arms = ('control', 'a', 'b', 'c', 'd')
    plan = dict(PLAN, primary=['a', 'control'], seeds=3, arms=dict.fromkeys(arms), phases={})
    plan.pop('further')
    # b: 2, 3, 4 points, p = 1 - t / sqrt(t^2 + 2) with t = 3 sqrt(3), 0.035 by itself, 0.105 as the smallest of three
    right = dict(control=[400] * 3, a=[401, 402, 400], b=[420, 430, 440], c=[410, 380, 400], d=[390, 420, 400])
    text = Pages(tmp_path, plan).write([line(arm, s, right[arm][s]) for arm in arms for s in range(3)])
    assert 'b and control (the interval excludes 0, but not after correction for 3 comparisons)' in text
    assert '| b minus control | 3 | +3.00 ± 2.48 |' in text and '| 0.035 | 0.105 |' in text


def test_runs_on_held_out_images_and_doubled_runs_are_refused():
    with pytest.raises(ValueError, match="phase 'primary' on the split 'heldout'"):
        check_rows([line('new', 1, 400, split='heldout')])
    first, second = line('new', 1, 400), line('new', 1, 410, losses=dict(sscl=.5))
    with pytest.raises(ValueError, match='two runs of one arm and seed'):
        check_rows([first, second])
    check_rows([first, line('new', 1, 'it failed', losses=dict(sscl=.5))])  # a failed one may be repeated
    for change in (dict(precision='bfloat16'), dict(device='CPU of another kind')):
        with pytest.raises(ValueError, match='Pairs are of one device and precision'):
            check_rows([first, {**line('old', 2, 400), **change}])


def test_rows_survive_the_files(tmp_path):
    runs = [line('new', 1, 'it failed, "twice"'), line('new', 2, 412, losses=dict(sscl=.25), step_ce=True)]
    write_rows(tmp_path, 'toy', runs)
    failed, ok = read_rows(tmp_path, 'toy')
    assert failed['error'] == 'it failed, "twice"' and failed['seed'] == 1 and 'top1' not in failed
    assert ok == {**runs[1], 'top1': pytest.approx(41.2)}  # numbers have six digits in the file
    assert read_rows(tmp_path, 'other') == []


def test_teachers_of_other_folders_stay(tmp_path):
    for i in (1, 2):
        file = tmp_path / str(i) / 'runs.jsonl'
        file.parent.mkdir()
        file.write_text(json.dumps({**line('ann', i, 400, 'teacher'), 'plan': 'teachers'}) + '\n')
        compare_results.collect([file.parent], tmp_path, [])
    assert [row['seed'] for row in read_rows(tmp_path, 'teachers')] == [1, 2]


def test_arms_in_settings_of_their_own_share_one_table(tmp_path):
    arms = 'sscl_T2', 'uniform_T2', 'sscl_T4', 'uniform_T4'
    plan = dict(PLAN, primary=['sscl_T2', 'uniform_T2'], further=[['sscl_T4', 'uniform_T4']], phases={},
                arms=dict.fromkeys(arms))
    runs = [dict(line(arm, seed, 400 + 20 * arm.startswith('sscl') + seed % 2), timesteps=int(arm[-1]))
            for arm in arms for seed in range(3)]
    text = Pages(tmp_path, plan).write(runs)
    assert '### All settings' in text and text.count('### ') == 2  # and the failed runs
    assert '| sscl_T4 | small, T = 4, resnet20_cifar | 3 | 0 |' in text
    assert text.count('by 2.00 to 2.00 points') == 2


def test_the_pilot_says_how_many_pairs_are_planned(tmp_path):
    plan = dict(PLAN, power=dict(difference=.5, least=24, most=48), arms=dict.fromkeys(('new', 'old', 'same', 'noisy')))
    plan['phases'] = dict(pilot=dict(arms=['new', 'old'], seeds=8, first_seed=0), **PLAN['phases'])
    file = tmp_path / 'toy.yaml'
    file.write_text(yaml.safe_dump(plan, sort_keys=False))
    # differences of 0 and 2.3 points in turn, 8 of each: SD = 1.15 * sqrt(16 / 15) = 1.19
    pilot = [line(arm, s, 400 + (23 * (s % 2) if arm == 'new' else 0), 'pilot') for arm in ('new', 'old')
             for s in range(16)]
    assert read_plan(file).planned(pilot) == pairs_for_power(1.15 * (16 / 15) ** .5, .5)
    assert read_plan(file).planned([]) == 8  # the file's number before the pilot


def test_words_for_seeds():
    assert ranges([1]) == '1' and ranges([1, 2]) == '1, 2' and ranges([1, 3, 4, 5, 9]) == '1, 3 to 5, 9'
    rows = [line('a', s, 400) for s in (1, 2, 3)] + [line('b', 1, 'no'), line('b', 2, 400)]
    assert missing_pairs(rows, ('a', 'b')) == ['b failed (no): seed 1', 'b has no run: seed 3']


def test_plans_are_checked(tmp_path):
    file = tmp_path / 'toy.yaml'
    file.write_text(yaml.safe_dump({k: v for k, v in PLAN.items() if k != 'stopping'}))
    with pytest.raises(ValueError, match="needs 'stopping'"):
        read_plan(file)
    file.write_text(yaml.safe_dump(dict(PLAN, primary=['new', 'gone']), sort_keys=False))
    with pytest.raises(ValueError, match="names the arm 'gone'; there are new, old, same, noisy"):
        read_plan(file)
