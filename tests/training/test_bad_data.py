"""Data and numbers that go wrong: what is said, and that nothing is lost."""
import json
import logging
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from timm.data import create_dataset

from files import write_images
from runs import IMAGES, TAUGHT, fails, rows_of, run_here, run_of
from timm_sscl import LIF
from timm_sscl.training.saving.checkpoint import lock_folder
from timm_sscl.data.checks import check_labels
from timm_sscl.data.samples import Samples, UnreadableSample, WrongLabel


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path / 'images')


def truncate(file):
    file.write_bytes(file.read_bytes()[:200])


def to_text(file):
    file.write_text('this is no image')


def break_chunk(file):
    """A PNG whose header is whole and whose data is not: PIL raises a SyntaxError or an OSError while decoding."""
    data = bytearray(file.read_bytes())
    data[60:90] = bytes(30)
    file.write_bytes(data)


# ---- unreadable images

@pytest.mark.parametrize('workers', ['0', '2'])
@pytest.mark.parametrize('damage', [truncate, to_text, break_chunk])
def test_unreadable_training_images_are_named_replaced_and_counted(
        images, damage, workers, tmp_path, monkeypatch, capfd):
    bad = [images / 'train' / 'class1' / f'{i}.png' for i in (2, 5)]
    for file in bad:
        damage(file)
    run_here([*IMAGES, '--workers', workers, '--max-unreadable', '2'], tmp_path, monkeypatch)
    text = capfd.readouterr().err
    for file in bad:  # once, though both epochs meet it
        assert text.count(f"Training sample 'images/train/class1/{file.name}' cannot be read and is replaced") == 1
    checkpoint = torch.load(tmp_path / 'out/run/last.pth.tar')
    assert checkpoint['run_state']['unreadable'] == [10, 13]  # counted over the workers, and kept for a resume


def test_more_unreadable_images_than_allowed_stop_the_run_and_it_goes_on_when_they_are_mended(
        images, tmp_path, monkeypatch, capsys):
    shutil.copytree(images, tmp_path / 'whole')
    args = [*IMAGES, '--max-unreadable', '0', '--seed', '3']
    run_here([*args, '--data-dir', 'whole', '--experiment', 'whole'], tmp_path, monkeypatch)
    truncate(images / 'train' / 'class2' / '7.png')
    code, line = fails(args, tmp_path, monkeypatch, capsys)
    assert code == 1 and "'images/train/class2/7.png' cannot be read" in line and '--max-unreadable 0' in line
    shutil.copy(tmp_path / 'whole/train/class2/7.png', images / 'train' / 'class2' / '7.png')
    run_here([*args, '--resume', 'auto'], tmp_path, monkeypatch)
    one, other = (torch.load(tmp_path / f'out/{name}/last.pth.tar') for name in ('whole', 'run'))
    assert all(torch.equal(one['state_dict'][k], v) for k, v in other['state_dict'].items())


def test_limit_of_one_is_exceeded_by_two(images, tmp_path, monkeypatch, capsys):
    for i in (1, 2):
        truncate(images / 'train' / 'class0' / f'{i}.png')
    code, line = fails([*IMAGES, '--max-unreadable', '1'], tmp_path, monkeypatch, capsys)
    assert code == 1 and 'That makes 2' in line and '--max-unreadable 1' in line


@pytest.mark.parametrize('workers', ['0', '1'])
def test_unreadable_validation_image_is_never_replaced_and_the_epoch_is_kept(
        images, workers, tmp_path, monkeypatch, capsys):
    file = images / 'validation' / 'class1' / '3.png'
    whole = file.read_bytes()
    truncate(file)
    code, line = fails([*IMAGES, '--workers', workers], tmp_path, monkeypatch, capsys)
    assert code == 1 and "validation sample 'images/validation/class1/3.png' cannot be read" in line
    assert (tmp_path / 'out/run/recovery-0-3.pth.tar').is_file()  # the whole first epoch
    file.write_bytes(whole)
    run_here(['--resume', 'out/run'], tmp_path, monkeypatch)
    assert [row['epoch'] for row in rows_of(tmp_path / 'out/run')] == ['0', '1']


def test_samples_follow_seed_epoch_and_index_and_leave_the_generators_alone(images):
    def sample(epoch, index, seed=0, before=0):
        samples = Samples(create_dataset('', root=str(images), split='train'), 3, training=True, seed=seed)
        samples.transform = lambda image: (torch.rand(()).item(), np.random.rand())
        for i in range(before):
            samples[i]
        samples.set_epoch(epoch)
        return samples[index][0]

    torch.manual_seed(0)
    np.random.seed(0)
    expected = torch.rand(()).item(), np.random.rand()
    torch.manual_seed(0)
    np.random.seed(0)
    first = sample(1, 4)
    assert (torch.rand(()).item(), np.random.rand()) == expected
    assert sample(1, 4, before=3) == first
    assert len({first, sample(2, 4), sample(1, 5), sample(1, 4, seed=1)}) == 4


def test_validation_samples_and_labels_are_checked_as_they_are_read(images):
    truncate(images / 'train' / 'class0' / '0.png')
    samples = Samples(create_dataset('', root=str(images), split='train'), 2, training=False)
    with pytest.raises(UnreadableSample, match='class0/0.png'):
        samples[0]
    assert samples[1][1] == 0
    with pytest.raises(WrongLabel, match="class2/7.png' has the label 2; the model has 2 classes"):
        samples[23]
    everything = Samples(create_dataset('', root=str(images), split='train'), 3, training=True, max_unreadable=1)
    assert everything[0][1] == 0 and everything.unreadable == [0]
    everything.mark_unreadable([5])
    with pytest.raises(UnreadableSample, match='--max-unreadable 1'):
        everything.check_limit()


# ---- what is found before anything is trained

def no_images(images):
    for file in (images / 'train' / 'class1').iterdir():
        file.unlink()


def no_validation_images(images):
    for file in (images / 'validation' / 'class2').iterdir():
        file.unlink()


def no_split(images):
    shutil.rmtree(images / 'validation')


def empty_split(images):
    shutil.rmtree(images / 'validation')
    (images / 'validation').mkdir()


def other_class(images):
    (images / 'validation' / 'class1').rename(images / 'validation' / 'klass1')


@pytest.mark.parametrize('change, args, words', [
    (no_images, [], ['training data', "class1", 'holds no images']),
    (no_validation_images, [], ['validation data', 'class2', 'holds no images']),
    (empty_split, [], ["split 'validation'"]),
    (no_split, [], ["no split 'validation'", 'validation/']),
    (None, ['--val-split', 'typo'], ["no split 'typo'"]),
    (None, ['--train-split', 'typo'], ["no split 'typo'"]),
    (other_class, [], ['class1', 'klass1', '--class-map']),
    (None, ['--num-classes', '2'], ['3 classes']),
    (None, ['--mean', '0.1', '0.2'], ['--mean', '2 values for 3 channels']),
    (None, ['--in-chans', '4', '--mean', '0', '0', '0', '0', '--std', '1', '1', '1', '1'], ['3 channels', 'takes 4']),
    (None, ['--input-img-mode', 'RGBA'], ['4 channels (RGBA)', 'takes 3']),
    (None, ['--report-to', 'wandb'], ['--report-to wandb', 'installed']),
    (None, ['--max-unreadable', '-1'], ['--max-unreadable -1']),
    (None, ['--eval-timesteps', '2'], ['--eval-timesteps 2', '--eval-only']),
    (None, ['--eval-only'], ['--eval-only', 'no weights']),
    (None, ['--eval-only', '--resume', 'auto'], ['--eval-only', 'auto']),
])
def test_found_before_training(images, change, args, words, tmp_path, monkeypatch, capsys):
    if change is not None:
        change(images)
    code, line = fails([*IMAGES, *args], tmp_path, monkeypatch, capsys)
    assert code == 2
    for word in words:
        assert word in line, line
    assert not list(tmp_path.rglob('*.pth.tar'))


def test_labels_that_are_known_are_checked_without_reading():
    dataset = SimpleNamespace(targets=[0, 2, 3, 1])
    check_labels(dataset, 4, 'training')
    with pytest.raises(
            ValueError, match="training data: 'number 2' has the label 3; with --num-classes 3 labels are 0 to 2"):
        check_labels(dataset, 3, 'training')


# ---- numbers

BLOW_UP = '''
from timm_sscl import register_loss

calls = 0


@register_loss('{name}')
def {name}(step):
    global calls
    calls += 1
    return step.logits.square().mean() * (float('nan') if calls == {at} else 0.01)
'''


def test_nonfinite_loss_stops_before_the_weights_and_names_step_and_term(images, tmp_path, monkeypatch, capsys):
    (tmp_path / 'blow.py').write_text(BLOW_UP.format(name='blows_up', at=5))
    args = [*TAUGHT, '--loss-file', 'blow.py', '--loss', 'blows_up=1', '--recovery-interval', '1']
    code, line = fails(args, tmp_path, monkeypatch, capsys)
    assert code == 1 and 'epoch 2, step 2' in line and 'blows_up_loss is nan' in line and 'task_loss' not in line
    folder = tmp_path / 'out/run'
    assert {f.name for f in folder.glob('*.pth.tar')} >= {'last.pth.tar', 'recovery-1-1.pth.tar'}
    for file in folder.glob('*.pth.tar'):
        for value in torch.load(file, weights_only=False)['state_dict'].values():
            assert not value.is_floating_point() or torch.isfinite(value).all()
    assert not list(folder.glob('recovery-1-2*'))


def test_nonfinite_nce_and_cka_are_named_by_layer(images, tmp_path, monkeypatch, capsys):
    from timm_sscl.losses import pair_critics as module

    def broken(s, a, *args, **kwargs):
        return s.sum() * float('inf')

    monkeypatch.setattr(module, 'nce_loss', broken)
    args = [*TAUGHT, '--teacher-epochs', '1', '--sscl-critic', 'normalized']
    code, line = fails(args, tmp_path, monkeypatch, capsys)
    assert code == 1 and 'step 1' in line and 'nce_layer1' in line and 'sscl_loss' in line and 'student' in line


@pytest.mark.slow
def test_diverging_weights_are_not_written(images, tmp_path, monkeypatch, capsys):
    """The loss of the last step is finite, what the step made of the weights is not."""
    args = [
        *IMAGES, '--epochs', '1', '--batch-size', '24', '--opt', 'momentum', '--lr', '1e38', '--weight-decay', '1e3']
    code, line = fails(args, tmp_path, monkeypatch, capsys)
    assert code == 1 and 'is not finite at epoch 1, step 1' in line and '--clip-grad' in line
    assert not list(tmp_path.rglob('*.pth.tar'))


def test_silent_and_always_firing_layers_are_named(images, tmp_path, monkeypatch, caplog):
    with caplog.at_level(logging.WARNING):
        run_here([*IMAGES, '--neuron-init', 'none', '--v-threshold', '1000'], tmp_path, monkeypatch)
    text = caplog.text
    # not at every epoch again
    assert text.count('Layer layer4.0.act2 never fires on the validation set (epoch 1)') == 1
    facts = json.loads((run_of(tmp_path / 'out') / 'summary.json').read_text())
    assert facts['firing_rates']['layer4.0.act2'] == 0


def test_layer_that_always_fires_is_named(images, tmp_path, monkeypatch, caplog):
    def always(self, x):
        return torch.ones_like(x)

    monkeypatch.setattr(LIF, 'forward', always)
    with caplog.at_level(logging.WARNING):
        run_here([*IMAGES, '--neuron-init', 'none', '--epochs', '1'], tmp_path, monkeypatch)
    assert 'Layer act1 always fires on the validation set (epoch 1)' in caplog.text


def test_rates_and_terms_reach_the_tracker(images, tmp_path, monkeypatch):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run_here([*TAUGHT, '--teacher-epochs', '1', '--report-to', 'tensorboard'], tmp_path, monkeypatch)
    log = EventAccumulator(str(tmp_path / 'out/run/timm_sscl'))
    log.Reload()
    tags = set(log.Tags()['scalars'])
    for name in ('train_loss', 'train_sscl_loss', 'train_cka_layer4', 'train_weight_layer4', 'train_mi_bound_layer4',
                 'eval_top1', 'firing_rate_layer4.0.act2', 'lr'):
        assert f'student/{name}' in tags
    row = rows_of(tmp_path / 'out/run')[1]
    assert log.Scalars('student/train_nce_layer4')[1].value == pytest.approx(float(row['train_nce_layer4']))
    assert [e.step for e in log.Scalars('student/eval_top1')] == [0, 1]


def test_rows_of_the_summary_keep_their_columns(images, tmp_path, monkeypatch):
    run_here([*IMAGES, '--epochs', '3', '--val-interval', '2'], tmp_path, monkeypatch)
    rows = rows_of(tmp_path / 'out/run')
    assert [bool(row['eval_top1']) for row in rows] == [False, True, True]
    layers = [k for k in rows[-1] if k.startswith('firing_rate_') and 'step' not in k]
    steps = [float(v) for k, v in rows[-1].items() if k.startswith('firing_rate_step')]
    facts = json.loads((tmp_path / 'out/run/summary.json').read_text())
    assert len(steps) == facts['timesteps'] and list(facts['firing_rates_per_step']) == list(facts['firing_rates'])
    assert sum(steps) / len(steps) == pytest.approx(sum(float(rows[-1][k]) for k in layers) / len(layers))
    assert (all(0 <= float(row['firing_rate_act1']) <= 1 for row in rows[1:])
            and all(float(row['lr']) > 0 for row in rows))


# ---- evaluation alone

@pytest.mark.slow
def test_eval_only(images, tmp_path, monkeypatch):
    run_here([*IMAGES, '--model-ema', '--model-ema-decay', '0.5'], tmp_path, monkeypatch)
    before = {f: f.read_bytes() for f in (tmp_path / 'out').rglob('*.pth.tar')}
    trained = rows_of(tmp_path / 'out/run')[-1]
    run_here(['--eval-only', '--resume', 'out/run', '--eval-timesteps', '2', '5'], tmp_path, monkeypatch)
    file, = (tmp_path / 'out/run').glob('evaluation-*.json')
    results = json.loads(file.read_text())['results']
    assert [(r['weights'], r['timesteps']) for r in results] == [('model', 2), ('model', 5), ('ema', 2), ('ema', 5)]
    assert results[0]['top1'] == float(trained['eval_top1']) and results[2]['top1'] == float(trained['eval_top1_ema'])
    assert results[0]['loss'] == pytest.approx(float(trained['eval_loss']), rel=1e-6)
    for layers in json.loads(file.read_text())['layers'].values():
        for rates in layers.values():
            per_step = rates['firing_rate_per_step']
            assert len(per_step) in (2, 5) and sum(per_step) / len(per_step) == pytest.approx(rates['firing_rate'])
    for r in results:
        assert (0 < r['entropy'] < 1 and 0 < r['firing_rate'] < 1
                and 0 < r['energy_uj'] < r['timesteps'] * r['ann_energy_uj'])
    energy = json.loads((tmp_path / 'out/run/summary.json').read_text())['energy']
    assert results[0]['energy_uj'] == pytest.approx(energy['spiking_uj'], rel=1e-6)  # the same images
    # rates differ a little with T
    assert results[1]['energy_uj'] == pytest.approx(results[0]['energy_uj'] * 2.5, rel=0.2)
    shutil.rmtree(images / 'train')  # not needed
    run_here(['--eval-only', '--resume', 'out/run/last.pth.tar', *IMAGES], tmp_path, monkeypatch)
    assert len(list((tmp_path / 'out/run').glob('evaluation-*.json'))) == 2
    assert {f: f.read_bytes() for f in (tmp_path / 'out').rglob('*.pth.tar')} == before


def test_eval_only_of_an_ann(images, tmp_path, monkeypatch):
    at = IMAGES.index('-T')
    args = [*IMAGES[:at], *IMAGES[at + 2:], '--model', 'test_resnet']
    run_here([*args, '--epochs', '1'], tmp_path, monkeypatch)
    run_here([*args, '--eval-only', '--resume', 'out/run'], tmp_path, monkeypatch)
    file, = (tmp_path / 'out/run').glob('evaluation-*.json')
    result, = json.loads(file.read_text())['results']
    assert result['top1'] == float(rows_of(tmp_path / 'out/run')[0]['eval_top1']) and result['energy_uj'] is None


def test_eval_only_of_what_is_damaged_unreadable_or_in_use(images, tmp_path, monkeypatch, capsys):
    run_here([*IMAGES, '--epochs', '1'], tmp_path, monkeypatch)
    with lock_folder(tmp_path / 'out/run'):  # as a training that goes on
        run_here(['--eval-only', '--resume', 'out/run'], tmp_path, monkeypatch)
    assert len(list((tmp_path / 'out/run').glob('evaluation-*.json'))) == 1
    data = bytearray((tmp_path / 'out/run/last.pth.tar').read_bytes())
    middle = len(data) // 2  # more bytes than the padding between records
    data[middle:middle + 128] = bytes(b ^ 255 for b in data[middle:middle + 128])
    (tmp_path / 'damaged.pth.tar').write_bytes(data)
    code, line = fails([*IMAGES, '--eval-only', '--resume', 'damaged.pth.tar'], tmp_path, monkeypatch, capsys)
    assert code == 2 and "'damaged.pth.tar' is damaged" in line
    truncate(images / 'validation' / 'class0' / '3.png')
    code, line = fails(['--eval-only', '--resume', 'out/run'], tmp_path, monkeypatch, capsys)
    assert code == 1 and 'class0/3.png' in line
    assert len(list((tmp_path / 'out/run').glob('evaluation-*.json'))) == 1


def test_start_that_failed_can_be_tried_again(images, tmp_path, monkeypatch, capsys):
    file = images / 'train' / 'class1' / '4.png'
    whole = file.read_bytes()
    truncate(file)
    args = [*IMAGES, '--max-unreadable', '0', '--batch-size', '24']  # the calibration's batch meets it
    assert fails(args, tmp_path, monkeypatch, capsys)[0] == 2
    file.write_bytes(whole)
    run_here([*args, '--epochs', '1'], tmp_path, monkeypatch)
    assert len(rows_of(tmp_path / 'out/run')) == 1


@pytest.mark.slow
def test_teacher_that_was_damaged_later_is_trained_again(images, tmp_path, monkeypatch, caplog):
    args = [*TAUGHT, '--epochs', '1', '--teacher-epochs', '2']
    run_here(args, tmp_path, monkeypatch)
    teacher, = (tmp_path / 'out/teachers').iterdir()
    last = teacher / 'last.pth.tar'
    whole = last.read_bytes()
    last.unlink()
    last.write_bytes(whole[:-500])
    for file in [*teacher.glob('checkpoint-1*'), *teacher.glob('model_best*')]:
        file.unlink()
    with caplog.at_level(logging.INFO):
        run_here([*args, '--experiment', 'again'], tmp_path, monkeypatch)
    assert 'is damaged' in caplog.text and 'goes on from checkpoint-0' in caplog.text
    one, other = (rows_of(tmp_path / 'out' / name)[0]['train_loss'] for name in ('run', 'again'))
    assert one == other  # the same teacher to the last bit


def test_going_back_to_an_earlier_checkpoint_puts_the_later_ones_aside(images, tmp_path, monkeypatch, caplog):
    run_here([*IMAGES, '--epochs', '3'], tmp_path, monkeypatch)
    folder = tmp_path / 'out/run'
    later = torch.load(folder / 'last.pth.tar')['state_dict']
    with caplog.at_level(logging.WARNING):
        run_here([*IMAGES, '--resume', 'out/run/checkpoint-0.pth.tar', '--epochs', '2', '--lr', '0.02'], tmp_path,
                 monkeypatch)
    assert 'are renamed to *.abandoned-N' in caplog.text
    kept = torch.load(folder / 'last.pth.tar.abandoned-1')['state_dict']
    assert all(torch.equal(kept[k], v) for k, v in later.items())
    assert [row['epoch'] for row in rows_of(folder)] == ['0', '1']
    run_here(['--resume', 'out/run', '--epochs', '3'], tmp_path, monkeypatch)  # of the new branch
    lr = [float(row['lr']) for row in rows_of(folder)]
    assert len(lr) == 3 and lr[1] == pytest.approx(0.02 / 2)  # half of the cosine; the first branch had 0.0075


def test_changed_settings_of_a_resumed_run_are_said(images, tmp_path, monkeypatch, caplog):
    run_here([*IMAGES, '--epochs', '1'], tmp_path, monkeypatch)
    with caplog.at_level(logging.WARNING):
        run_here(['--resume', 'out/run/last.pth.tar', '--epochs', '2', '--seed', '5', '--amp', '--amp-dtype',
                  'bfloat16'], tmp_path, monkeypatch)
    assert 'seed 42 -> 5' in caplog.text and 'mixed_precision no -> bf16' in caplog.text
    assert len(rows_of(tmp_path / 'out/run')) == 2  # a file's options come from its run as a folder's do
