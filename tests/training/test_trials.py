"""Trials at toy size on the CPU: data, steps against a plain loop, resume, failures, plans and their phases."""
import json
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / 'benchmarks'))

import cifar_arrays
import compare
import compare_plan
import gpu_science
import trial_costs
import trial_data
import trial_models
import trial_precision
import trial_replica
import trial_results
import trial_rounds
from trial_engine import Engine
from trial_graphs import Group, check_replay
from trials import Scale, Trial, decode_correct, encode_correct, read_results

import timm_sscl

SIZES = dict(train=40, heldout=8, validation=20)
TOY = Scale('toy', 'toy', 4, width=4, epochs=2, batch_size=16, teacher_epochs=1)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """A folder with the set 'toy': four classes that differ in brightness, over two files."""
    folder, rng = tmp_path_factory.mktemp('data'), np.random.RandomState(0)
    parts = {part: [(f'{part}/{i}', i % 4) for i in range(n)] for part, n in SIZES.items()}
    pixels = {name: np.clip(rng.randint(0, 120, (16, 16, 3)) + label * 40, 0, 255).astype(np.uint8)
              for rows in parts.values() for name, label in rows}
    names = list(pixels)
    for i, chosen in enumerate((names[:30], names[30:])):
        images = [(name, Image.fromarray(pixels[name])) for name in chosen]
        cifar_arrays.write_pack(folder / f'{i}.npz', images, {'toy': parts} if i else {})
    return folder, pixels


def _trial(arm='ce', seed=1, **fields):
    return Trial('plan', 'primary', arm, seed, 2, TOY, **fields)


def _engine(data, output, **options):
    return Engine(data[0], output, backend='eager', **options)


def _strip(line):
    """A line without what differs between two runs of the same trial."""
    return {key: value for key, value in line.items() if key not in ('seconds', 'ms_per_step', 'finished')}


# ---- data

def test_images_are_stored_without_loss(data):
    folder, pixels = data
    images = cifar_arrays.load_set(folder, 'toy')
    assert images.classes == 4 and {part: len(x) for part, (x, _) in images.parts.items()} == SIZES
    for part, (values, labels) in images.parts.items():
        assert all((values[i] == pixels[f'{part}/{i}']).all() for i in range(SIZES[part]))
        assert labels.tolist() == [i % 4 for i in range(SIZES[part])]


def test_set_with_missing_images_is_named(data, tmp_path):
    (tmp_path / 'b.npz').write_bytes((data[0] / '1.npz').read_bytes())
    assert cifar_arrays.available_sets(tmp_path) == []
    with pytest.raises(SystemExit, match="30 of 40 train images of 'toy'"):
        cifar_arrays.load_set(tmp_path, 'toy')
    with pytest.raises(SystemExit, match="no set 'other'"):
        cifar_arrays.load_set(data[0], 'other')


def _expected_batch(pixels, seed, epoch, step):
    """Crop, flip and normalise a batch image by image with numpy."""
    drawn = trial_data.draw_epoch(seed, epoch, SIZES['train'], 2, 16, 16)
    images = []
    for i, index in enumerate(drawn.order[step].tolist()):
        padded = np.pad(pixels[f'train/{index}'], ((4, 4), (4, 4), (0, 0)))
        y, x, flip = (int(drawn.tables[name][step, i]) for name in ('y', 'x', 'flip'))
        image = padded[y:y + 16, x:x + 16]
        image = (image[:, ::-1] if flip else image) / 255.
        images.append((image - trial_data.MEAN) / trial_data.STD)
    return torch.tensor(np.stack(images)).permute(0, 3, 1, 2).float(), drawn.order[step] % 4


def test_batches_are_cropped_and_flipped_as_the_seed_says(data):
    loaded = trial_data.load_device_set(data[0], 'toy', torch.device('cpu'), 8)
    buffers = trial_data.EpochBuffers(loaded, 2, 16)
    seen = []
    for epoch in (0, 1):
        buffers.fill(3, epoch)
        for step in range(2):
            images, labels = buffers.next()
            expected, targets = _expected_batch(data[1], 3, epoch, step)
            torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)  # float32 of values up to 3
            assert labels.tolist() == targets.tolist()
            seen.append(images)
    assert not torch.equal(seen[0], seen[2])  # another epoch
    buffers.fill(3, 0)
    mixed, soft = buffers.next(strong=True)
    assert mixed.shape == seen[0].shape and not torch.equal(mixed, seen[0])
    torch.testing.assert_close(soft.sum(1), torch.ones(16))


# ---- steps

def test_steps_equal_a_plain_loop(data):
    """A trial of cross-entropy is what ten lines with timm's optimizer give."""
    trial = _trial(seed=5)
    loaded = trial_data.load_device_set(data[0], 'toy', torch.device('cpu'), 8)
    images = loaded.normalise(loaded.train[:8, :, 4:-4, 4:-4])
    replica = trial_replica.Replica(_trial(seed=1), loaded, None)
    replica.load(trial, trial_models.initial_state(trial, 4, images.numpy(), 40))

    torch.manual_seed(5)
    model = timm.create_model('spiking_resnet20_cifar', timesteps=2, num_classes=4, width=4)
    timm_sscl.calibrate(model, images).train()
    optimizer = timm.optim.create_optimizer_v2(model, opt='adamw', lr=2e-3, weight_decay=0.02)
    rates = trial_replica.learning_rates(trial_replica.STUDENT, 2, 2)
    losses = []
    for epoch in range(2):
        replica.begin_epoch(epoch)
        replica.train_mode(True)
        for step in range(2):
            replica.train_step()
            for group in optimizer.param_groups:
                group['lr'] = rates[2 * epoch + step]
            x, y = _expected_batch(data[1], 5, epoch, step)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert replica.means()['loss'] == pytest.approx(np.mean(losses[2:]), rel=1e-4)  # float32, other order of sums
    replica.train_mode(False)
    for _ in range(replica.eval_steps):
        replica.eval_step()
    values = np.stack([data[1][f'validation/{i}'] for i in range(20)])
    with torch.no_grad():
        logits = model.eval()(loaded.normalise(torch.from_numpy(values).permute(0, 3, 1, 2)))
    targets = torch.arange(20) % 4
    top1, loss, correct = replica.evaluation()
    assert top1 == pytest.approx(100 * (logits.argmax(1) == targets).float().mean().item())
    assert correct.tolist() == (logits.argmax(1) == targets).tolist()
    assert loss == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-3)


def test_bfloat16_step_equals_a_plain_one(data):
    """Convolutions run in bfloat16 and channels_last; weights and gradients stay float32."""
    loaded = trial_data.load_device_set(data[0], 'toy', torch.device('cpu'), 8)
    images, trial = loaded.normalise(loaded.train[:8, :, 4:-4, 4:-4]), _trial(seed=5)
    replica = trial_replica.Replica(trial, loaded, None, bfloat16=True)
    replica.load(trial, trial_models.initial_state(trial, 4, images.numpy(), 40))
    seen = []
    replica.task.student.layer2[0].conv1.register_forward_hook(lambda module, x, y: seen.append(y))
    replica.train_mode(True)
    replica.train_step()
    assert seen[0].dtype == torch.bfloat16 and seen[0].is_contiguous(memory_format=torch.channels_last)
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in replica.task.student.parameters())

    torch.manual_seed(5)
    model = timm.create_model('spiking_resnet20_cifar', timesteps=2, num_classes=4, width=4)
    model = timm_sscl.calibrate(model, images).train().to(memory_format=torch.channels_last)
    x, y = _expected_batch(data[1], 5, 0, 0)
    with torch.autocast('cpu', torch.bfloat16):
        loss = F.cross_entropy(model(x.contiguous(memory_format=torch.channels_last)), y)
    assert replica.means()['loss'] == pytest.approx(loss.item(), rel=1e-5)  # the same operations


def test_losses_of_membranes_and_of_indices(data):
    """The memory of crd knows the labels of the images that its steps had, by their places."""
    losses = dict.fromkeys(('crd', 'im', 'rmp', 'bkdsnn', 'meom', 'seal_kd'), 0.1)
    trial = _trial(losses=losses, loss_options=dict(crd=dict(num_negatives=8)), teacher='plain')
    loaded = trial_data.load_device_set(data[0], 'toy', torch.device('cpu'), 8)
    replica = trial_replica.Replica(trial, loaded, trial_models.teacher_model(trial, 4))
    images = loaded.normalise(loaded.train[:8, :, 4:-4, 4:-4])
    replica.load(trial, trial_models.initial_state(trial, 4, images.numpy(), 40))
    replica.begin_epoch(1)
    replica.train_mode(True)
    for _ in range(2):
        replica.train_step()
    assert all(np.isfinite(value) for value in replica.means().values()) and {*losses} <= {*replica.means()}
    labels = replica.task.trainable_module.losses['crd'].labels
    seen = trial_data.draw_epoch(1, 1, 40, 2, 16, 16).order.flatten()
    assert torch.equal(labels[seen], loaded.labels[seen]) and (labels == -1).sum() == 8


def test_learning_rates_warm_up_and_end_near_zero():
    rates = trial_replica.learning_rates(dict(lr=0.1), epochs=4, steps=5)
    assert len(rates) == 20
    assert np.allclose(np.diff(rates[:5]), (0.1 - 0.001) / 5) and rates[0] == 0.001
    assert rates[10] == pytest.approx(0.05 * (1 + np.cos(np.pi * 10 / 20)))  # timm counts the warm-up in
    assert 0 < rates[-1] < 0.002


class _Replayed:
    """Stands in for a captured graph on the CPU: its replay runs the steps that a capture would have recorded."""

    def __init__(self, replicas, train):
        self.replicas, self.train = replicas, train

    def replay(self):
        for replica in self.replicas:
            replica.train_step() if self.train else replica.eval_step()


@pytest.fixture
def replaying_group(monkeypatch):
    """A function that captures a group without CUDA. Streams do nothing."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, 'Stream', lambda device: stream)
    monkeypatch.setattr(torch.cuda, 'stream', lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda: stream)
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda: None)
    monkeypatch.setattr(Group, 'record', lambda self, train: _Replayed(self.replicas, train))

    def create(replicas):
        group = Group(replicas, graph=False)
        group.capture()
        return group
    return create


def test_warm_up_before_a_capture_does_not_count(data, replaying_group):
    """A captured group, the steps before the capture undone, trains as a fresh replica does; the next trial, too."""
    loaded = trial_data.load_device_set(data[0], 'toy', torch.device('cpu'), 8)
    images = loaded.normalise(loaded.train[:8, :, 4:-4, 4:-4]).numpy()
    trials = [_trial('ce', 1), _trial('tet', 2, losses={'tet': 1.}, optimizer=dict(opt='sgd', lr=0.1, momentum=0.9))]
    states = [trial_models.initial_state(trial, 4, images, 40) for trial in trials]
    expected = []
    for trial, state in zip(trials, states):
        alone = Group([trial_replica.Replica(trial, loaded, None)])
        assert not alone.captured
        alone.load([trial], [state])
        alone.train_epoch(0)
        alone.train_epoch(1)
        alone.evaluate()
        expected.append((alone.replicas[0].means(), alone.replicas[0].evaluation()))
    group = replaying_group([trial_replica.Replica(replace(trial, seed=7), loaded, None) for trial in trials])
    assert group.captured
    for _ in range(2):
        group.load(trials, states)
        group.train_epoch(0)
        group.train_epoch(1)
        group.evaluate()
        for replica, (means, (top1, loss, correct)) in zip(group.replicas, expected):
            assert replica.means() == means
            assert replica.evaluation()[:2] == (top1, loss) and (replica.evaluation()[2] == correct).all()


def test_replay_that_skips_a_step_is_found(data, replaying_group, monkeypatch):
    loaded = trial_data.load_device_set(data[0], 'toy', torch.device('cpu'), 8)
    trial = _trial('ce', 1, optimizer={'lr': 0.1})
    states = [trial_models.initial_state(trial, 4, loaded.normalise(loaded.train[:8, :, 4:-4, 4:-4]).numpy(), 40)]

    def create(trial):
        return trial_replica.Replica(trial, loaded, None)

    assert all(difference < 1e-3 for _, difference in check_replay(create, [trial], states, steps=2))
    monkeypatch.setattr(Group, '__init__', _captured(Group.__init__))
    check_replay(create, [trial], states, steps=2)
    skipping = [False]

    def replay(self):
        skipping[0] = not skipping[0]
        if skipping[0]:
            self.replicas[0].train_step()

    monkeypatch.setattr(_Replayed, 'replay', replay)
    with pytest.raises(RuntimeError, match='cannot be trusted'):
        check_replay(create, [trial], states, steps=2)


def _captured(init):
    """Capture every group that is asked to, without CUDA."""
    def captured(self, replicas, graph=True):
        init(self, replicas, False)
        if graph:
            self.capture()
    return captured


# ---- engine

def test_engine_resumes_and_goes_on_after_a_failure(data, tmp_path, capsys):
    trials = [_trial('sscl', 1, losses={'sscl': 0.1}), _trial('sscl', 2, losses={'sscl': 0.1}),
              _trial('wrong', 1, losses={'nothing': 1.}), _trial('nan', 1, optimizer={'lr': 1e30})]
    engine = _engine(data, tmp_path, replicas=2)
    engine.run(trials)
    engine.close()
    lines = {line['arm'] + str(line['seed']): line for line in read_results(tmp_path)}
    assert set(lines) == {'ann0', 'sscl1', 'sscl2', 'wrong1', 'nan1'}
    assert lines['wrong1']['status'] == 'failed' and "unknown loss 'nothing'" in lines['wrong1']['error']
    assert lines['nan1']['status'] == 'failed' and 'not finite' in lines['nan1']['error']
    line = lines['sscl2']
    assert line['status'] == 'ok' and line['top1'] == pytest.approx(100 * decode_correct(line).mean(), abs=1e-3)
    assert [epoch for epoch, _ in line['top1_epochs']] == [1, 2] and line['top1_epochs'][-1][1] == line['top1']
    assert line['train_terms'].keys() == {'task', 'sscl'}
    assert line['train_loss'] == pytest.approx(
        line['train_terms']['task'] + 0.1 * line['train_terms']['sscl'], rel=1e-4)
    assert line['layers']['last'].keys() == {'layer1', 'layer2', 'layer3', 'layer4', 'pooled'}
    assert 0 < line['firing_rate'] < 1 and 0 < line['energy'] < 2
    assert line['teacher_top1'] == pytest.approx(lines['ann0']['top1'], abs=1e-3)
    assert Trial(**{**{key: line[key] for key in trials[1].__dataclass_fields__}, 'scale': TOY}) == trials[1]

    # interrupted while the last line was written, and again without one trial; seed 2 then is the replica's first
    file = tmp_path / 'runs.jsonl'
    texts = [text for text in file.read_text().splitlines() if json.loads(text)['name'] != line['name']]
    file.write_text('\n'.join(texts) + '\n' + json.dumps(line)[:50])
    capsys.readouterr()
    engine = _engine(data, tmp_path, replicas=2)
    engine.run(trials)
    engine.close()
    assert '4 trials, 3 of them done' in capsys.readouterr().out
    again = {line['name']: line for line in read_results(tmp_path)}
    assert len(again) == 5 and _strip(again[line['name']]) == _strip(line)


def test_time_limit_starts_nothing(data, tmp_path, capsys):
    engine = _engine(data, tmp_path, deadline=0.)
    engine.run([_trial()])
    assert 'time limit: 1 trials are not started' in capsys.readouterr().out and not read_results(tmp_path)


def test_output_has_one_precision(data, tmp_path, monkeypatch, capsys):
    """The faster one is measured once; another kind of device is refused."""
    monkeypatch.setattr(trial_precision, 'time_precisions', lambda create: {'float32': 30., 'bfloat16': 20.})
    engine = _engine(data, tmp_path, precision='auto')
    engine.run([_trial(seed=1)])
    monkeypatch.setattr(trial_precision, 'time_precisions', lambda create: {'float32': 10., 'bfloat16': 20.})
    engine = _engine(data, tmp_path, precision='auto')
    engine.run([_trial(seed=1), _trial(seed=2)])
    assert [line['precision'] for line in read_results(tmp_path)] == ['bfloat16 autocast, channels_last'] * 2
    assert 'precision bfloat16: a step of cross-entropy took float32 30 ms, bfloat16 20 ms' in capsys.readouterr().out
    file = tmp_path / 'precision.json'
    file.write_text(file.read_text().replace(engine.facts['device'], 'CPU of another kind'))
    with pytest.raises(SystemExit, match="measured on 'CPU of another kind'"):
        _engine(data, tmp_path, precision='auto').run([_trial(seed=3)])


def test_precisions_are_timed_by_their_steps():
    def create(name):
        steps = iter([0.2, 0., 0., 0.] if name == 'bfloat16' else [0., .02, .02, .02])  # the first one compiles
        return SimpleNamespace(train_mode=lambda mode: None, rewind=lambda: None,
                               train_step=lambda: time.sleep(next(steps)))

    times = trial_precision.time_precisions(create)
    assert times['float32'] >= 20 > times['bfloat16']


def test_processes_share_an_output(data, tmp_path):
    """A trial that another process has is waited for, not run; the others are run meanwhile."""
    theirs, ours = _trial(seed=1), _trial(seed=2)
    engine = _engine(data, tmp_path)
    with trial_results.claim(tmp_path, theirs.name) as free:
        assert free
        thread = threading.Thread(target=engine.run, args=([theirs, ours],))
        thread.start()
        while thread.is_alive() and not read_results(tmp_path):
            time.sleep(0.01)
        assert [line['name'] for line in read_results(tmp_path)] == [ours.name] and thread.is_alive()
        trial_results.append_line(tmp_path, trial_results.failed_line(theirs, {}, 'of the other process'))
    thread.join(timeout=60)
    assert not thread.is_alive()
    assert [line.get('error') for line in read_results(tmp_path)] == [None, 'of the other process']


def test_bits_of_images():
    correct = np.random.RandomState(0).rand(13) > 0.5
    line = dict(correct=encode_correct(correct), num_images=13)
    assert (decode_correct(line) == correct).all()


def test_rounds_keep_groups_and_pairs():
    arms = dict(a={}, b=dict(losses={'kd': 1.}), c=dict(losses={'kd': 2.}))
    trials = [_trial(arm, seed, **arms[arm]) for seed in range(6) for arm in 'ab'] + [_trial('c', 0, **arms['c'])]
    found = list(trial_rounds.rounds(trials, 4))
    assert sorted(t.name for r in found for t in r.trials) == sorted(t.name for t in trials)
    assert all(len(r.trials) <= 4 and len(r.key) == len(r.trials) for r in found)
    first = [(t.arm, t.seed) for t in found[0].trials]
    assert {arm for arm, _ in first} >= {'a', 'b'}  # both at once
    assert trial_replica.signature(trials[0]) == trial_replica.signature(trials[2])
    # pairs end together: 24 of two arms, 12 of three others
    many = [_trial(str(w), seed, losses={'kd': w}) for w, n in ((1., 24), (2., 24), (3., 12), (4., 12), (5., 12))
            for seed in range(n)]
    by_round = [[t.arm for t in r.trials] for r in trial_rounds.rounds(many, 8)]
    assert all(arms.count('1.0') == arms.count('2.0') for arms in by_round) and len(by_round) == 12
    other = replace(trials[0], scale=replace(TOY, epochs=3))
    assert len({r.key for r in trial_rounds.rounds([*trials, other], 4)}) >= 2


# ---- plans

PLAN = '''
question: Is it so?
primary: [sscl, ce]
seeds: 3
stopping: All runs.
reported: All.
defaults: {timesteps: 2}
scales: {one: {data: toy, classes: 4, width: 4, epochs: 1, batch_size: 16, teacher_epochs: 1},
         two: {data: toy, classes: 4, width: 4, epochs: 2, batch_size: 16, teacher_epochs: 1}}
arms:
  ce: {tries: [{}, {optimizer: {lr: 0.01}}]}
  sscl: {losses: {sscl: 0.1}, tries: [{}, {losses: {sscl: 1.0}}]}
  kd: {losses: {kd: 1.0}}
phases:
  pilot: {arms: [sscl, ce], scale: [one, two], seeds: 3, first_seed: 1}
  tune: {arms: [ce, sscl], tune: true, split: heldout, seeds: 1, first_seed: 11}
  screen: {arms: [ce, kd], split: heldout, seeds: 1, first_seed: 21}
  primary: {arms: {sscl: power, ce: 2}, best_of: {screen: 1}, seeds: 1, scale: pilot, first_seed: 31}
  confirm: {within: 1.0, seeds: 2, first_seed: 41}
power: {difference: 0.5, least: 2, most: 5}
'''


def _line(plan, phase, arm, seed, top1, scale='one', config=0):
    return dict(plan=plan.name, phase=phase, arm=arm, seed=seed, top1=top1, status='ok', config=config,
                scale=dict(name=scale))


def test_phases_follow_from_results(tmp_path):
    (tmp_path / 'toy.yaml').write_text(PLAN)
    plan = compare_plan.ComparisonPlan(tmp_path / 'toy.yaml')
    lines = [_line(plan, 'pilot', arm, seed, top1, scale) for scale, spread in (('one', 3.), ('two', 0.4))
             for seed in (1, 2, 3) for arm, top1 in (('ce', 50.), ('sscl', 40. + spread * seed))]
    assert plan.pilot_sd(lines) == pytest.approx({'one': 3., 'two': 0.4})
    lines += [_line(plan, 'tune', 'sscl', 11, 30., config=0), _line(plan, 'tune', 'sscl', 11, 40., config=1)]
    lines += [_line(plan, 'screen', 'ce', 21, 50.), _line(plan, 'screen', 'kd', 21, 60.)]
    assert len(plan.trials('pilot', lines)) == 12 and len(plan.trials('tune', lines)) == 4
    assert {t.split for t in plan.trials('tune', lines)} == {'heldout'}
    primary = plan.trials('primary', lines)
    assert {t.scale.name for t in primary} == {'two'}
    assert [t.seed for t in primary if t.arm == 'sscl'] == [31, 32, 33, 34, 35]  # 8 pairs at SD 0.4, at most 5
    assert all(t.losses == {'sscl': 1.0} and t.config == 1 for t in primary if t.arm == 'sscl')
    assert [t.seed for t in primary if t.arm == 'ce'] == [31, 32] and [t.arm for t in primary].count('kd') == 1
    done = [_line(plan, 'primary', arm, 31, top1) for arm, top1 in (('sscl', 60.), ('ce', 59.5), ('kd', 40.))]
    assert {t.arm for t in plan.trials('confirm', lines + done)} == {'sscl', 'ce'}
    assert plan.trials('confirm', lines + done[::2]) == []  # the best one is alone
    with pytest.raises(ValueError, match="phase 'pilot' names the arm 'nobody'"):
        (tmp_path / 'wrong.yaml').write_text(PLAN.replace('[sscl, ce], scale', '[nobody], scale'))
        compare_plan.ComparisonPlan(tmp_path / 'wrong.yaml')


def test_plans_of_the_repository_name_losses_and_models_that_exist():
    for file in sorted(Path(compare.__file__).parent.joinpath('plans').glob('*.yaml')):
        plan = compare_plan.ComparisonPlan(file)
        assert file.read_text().startswith('# Question: ')
        for arm in plan.arms.values():
            for given in [arm, *arm.get('tries', [])]:
                assert set(given.get('losses', {})) <= set(timm_sscl.list_losses())
                model = given.get('model', {})
                assert model.get('neuron', 'lif') in timm_sscl.list_neurons()
                for kind in ('norm', 'residual'):
                    assert kind not in model or f'{kind}/{model[kind]}' in timm_sscl.list_variants()


def test_command_runs_a_plan_in_two_calls(data, tmp_path, capsys):
    plan = PLAN.replace('seeds: 3, first_seed: 1}', 'seeds: 2, first_seed: 1}').replace('[one, two]', '[one]')
    (tmp_path / 'toy.yaml').write_text(plan)
    arguments = ['--plan', str(tmp_path / 'toy.yaml'), '--data', str(data[0]), '--output', str(tmp_path / 'out'),
                 '--device', 'cpu', '--backend', 'eager', '--epochs', '1']
    compare.main([*arguments, '--phase', 'pilot', '--minutes', '0'])
    assert not read_results(tmp_path / 'out')
    compare.main([*arguments, '--phase', 'pilot'])
    out = capsys.readouterr().out
    assert 'SD of the paired difference at one:' in out and 'pairs' in out
    assert {line['arm'] for line in read_results(tmp_path / 'out')} == {'ann', 'sscl', 'ce'}


def test_plans_run_side_by_side(data, tmp_path, capsys):
    (tmp_path / 'a.yaml').write_text(PLAN)
    (tmp_path / 'b.yaml').write_text(PLAN.replace('arms:', 'legs:'))
    failed = gpu_science.science(data[0], tmp_path / 'out', 1., ['--device', 'cpu', '--phase', 'pilot', '--dry-run'],
                                 [['a'], ['b']], tmp_path)
    assert failed == 1
    assert 'a-pilot-sscl-one-T2-s3' in (tmp_path / 'out' / 'a.log').read_text()
    assert "a plan needs 'arms'" in capsys.readouterr().out


def test_costs_of_every_arm(data, tmp_path):
    (tmp_path / 'toy.yaml').write_text(PLAN)
    plan = compare_plan.ComparisonPlan(tmp_path / 'toy.yaml')
    rows = trial_costs.measure_costs(plan, _engine(data, tmp_path), rounds=1)
    assert [row['arm'] for row in rows] == ['ce', 'sscl', 'kd']
    assert rows[0]['relative'] == rows[0]['relative_mib'] == 1 and all(row['ms'] > 0 for row in rows)
    assert rows[1]['mib'] > rows[0]['mib']  # SSCL keeps rows and scores, too


def test_memory_for_the_backward_is_that_of_the_batch(data):
    loaded = trial_data.load_device_set(data[0], 'toy', torch.device('cpu'), 8)
    kept = []
    for batch in (8, 16):
        trial = replace(_trial(), scale=replace(TOY, batch_size=batch))
        replica = trial_replica.Replica(trial, loaded, None)
        replica.train_mode(True)
        kept.append(trial_costs.kept_for_backward(replica))
    assert 1.8 < kept[1] / kept[0] <= 2  # but for statistics of the norms, which do not grow
