"""train.py on event data, tiny: files written here go in, a trained spiking model comes out."""
import csv
import json
import struct

import numpy as np
import pytest
import timm
import torch
import yaml

from runs import run_here
from timm_sscl.data.events import EventFolder, FrameSettings
from timm_sscl.training.command_line.options import OptionError, parse_args

TINY = ['--model', 'spiking_test_resnet', '--epochs', '1', '--warmup-epochs', '0', '--batch-size', '8',
        '--workers', '0', '--log-interval', '1', '--device', 'cpu', '--threads', '1', '--opt', 'adamw', '--lr', '0.003',
        '--output', 'out']
HEADER = b'#!AER-DAT2.0\r\n# made by a test\r\n'


def write_aedat(file, seed, bar):
    """A bar of 60 x 4 pixels that moves across by 20, lying down or standing up."""
    rng = np.random.default_rng(seed)
    n = 2000
    along, across = 30 + rng.integers(0, 60, n), 40 + np.arange(n) // 100 + rng.integers(0, 4, n)
    x, y = (across, along) if bar == 'standing' else (along, across)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(HEADER + b''.join(
        struct.pack('>II', int(a) << 8 | int(b) << 1 | int(c), 50 * i)
        for i, (a, b, c) in enumerate(zip(x, y, rng.integers(0, 2, n)))))


@pytest.fixture(scope='module')
def bars(tmp_path_factory):
    root = tmp_path_factory.mktemp('bars')
    for bar in ('lying', 'standing'):
        for i in range(20):
            write_aedat(root / bar / f'bar_{bar}_{i}.aedat', seed=i, bar=bar)
    return root


EVENTS = ['--dataset', 'events/cifar10dvs', '-T', '3', '--event-size', '32', '--event-split', 'last4',
          '--event-roll', '2']


@pytest.mark.parametrize('frames', ['each', 'mean'])
def test_teacher_is_trained_on_the_frames_that_it_teaches_on(frames, bars, tmp_path, monkeypatch):
    forward, rows = timm.models.ResNet.forward_features, []

    def see(model, x):
        if not hasattr(model, 'set_timesteps'):
            rows.append(len(x))
        return forward(model, x)

    monkeypatch.setattr(timm.models.ResNet, 'forward_features', see)
    run_here([*EVENTS, *TINY, '--data-dir', bars, '--loss', 'kd=1', '--teacher-frames', frames, '--experiment', 'run'],
             tmp_path, monkeypatch)
    assert max(rows) == (3 * 8 if frames == 'each' else 8) and len(rows) > 8  # its training and the student's


def test_mean_frames_go_with_event_data():
    with pytest.raises(OptionError, match='--teacher-frames mean: goes with event data'):
        parse_args(['--teacher-frames', 'mean'])


@pytest.mark.slow
def test_aedat_files_go_in_and_a_trained_spiking_model_comes_out(bars, tmp_path, monkeypatch):
    run_here([*EVENTS, *TINY, '--data-dir', bars, '--epochs', '10', '--experiment', 'bars', '--loss', 'sscl=0.1,kd=1'],
             tmp_path, monkeypatch)
    run = tmp_path / 'out' / 'bars'
    facts = json.loads((run / 'summary.json').read_text())
    # two shapes that anything learns; chance is 50
    assert facts['teacher']['top1'] >= 75 and facts['student']['top1'] >= 75
    with open(run / 'summary.csv') as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 10 and np.isfinite(float(rows[-1]['train_cka_layer4']))
    assert facts['conversion']['macs']['analog'] == 0  # binary frames: the stem adds as well

    student = timm.create_model(
        'spiking_test_resnet', in_chans=2, num_classes=2, checkpoint_path=run / 'last.pth.tar').eval()
    assert student.timesteps == 3
    val = EventFolder(str(bars), False, 'last4', FrameSettings(3, size=32))
    with torch.no_grad():
        predicted = student(torch.stack([val[i][0] for i in range(8)])).argmax(1)
    assert (predicted == torch.tensor(val.targets)).float().mean() * 100 == pytest.approx(facts['student']['top1'])

    # the teacher is a plain ANN's file, and its accuracy that of the mean logits over the frames
    file, = (tmp_path / 'out' / 'teachers').glob('*/last.pth.tar')
    teacher = timm.create_model('test_resnet', in_chans=2, num_classes=2, checkpoint_path=file).eval()
    with torch.no_grad():
        logits = torch.stack([torch.stack([teacher(frame[None])[0] for frame in val[i][0]]).mean(0) for i in range(8)])
    top1 = (logits.argmax(1) == torch.tensor(val.targets)).float().mean() * 100
    assert top1 == pytest.approx(facts['teacher']['top1'])

    run_here(['--resume', run, '--eval-only', '--device', 'cpu'], tmp_path, monkeypatch)
    with open(run / 'evaluation.csv') as f:
        row, = csv.DictReader(f)
    assert float(row['top1']) == pytest.approx(facts['student']['top1']) and row['timesteps'] == '3'

    # found again, also by its file, and the run goes on
    run_here([*EVENTS, *TINY, '--data-dir', bars, '--teacher-checkpoint', file, '--distill', 'kd',
              '--experiment', 'kd'], tmp_path, monkeypatch)
    run_here(['--resume', run, '--epochs', '11', '--teacher-epochs', '10', '--device', 'cpu'], tmp_path, monkeypatch)
    assert len(list((tmp_path / 'out' / 'teachers').iterdir())) == 1
    assert json.loads((run / 'summary.json').read_text())['student']['top1'] >= 75
    assert yaml.safe_load((run / 'args.yaml').read_text())['event_split'] == 'last4'


@pytest.mark.slow
def test_another_teacher_for_other_frames(bars, tmp_path, monkeypatch):
    common = [*EVENTS, *TINY, '--data-dir', bars, '--distill', 'kd']
    for name, options in (
            ('a', []), ('b', []), ('count', ['--event-mode', 'count']), ('time', ['--event-frames', 'time'])):
        run_here([*common, '--experiment', name, *options], tmp_path, monkeypatch)
    assert len(list((tmp_path / 'out' / 'teachers').iterdir())) == 3  # a and b share one


def test_damaged_recordings_do_not_end_the_training(bars, tmp_path, monkeypatch, capfd):
    data = tmp_path / 'data'
    for file in bars.glob('*/*.aedat'):
        (data / file.parent.name).mkdir(parents=True, exist_ok=True)
        (data / file.parent.name / file.name).write_bytes(file.read_bytes())
    cut = data / 'lying' / 'bar_lying_3.aedat'
    cut.write_bytes(cut.read_bytes()[:-5])
    args = [*EVENTS, *TINY, '--data-dir', data, '--distill', 'none']
    run_here([*args, '--experiment', 'trains'], tmp_path, monkeypatch)
    log = capfd.readouterr().err
    assert str(cut) in log and f'byte {len(HEADER) + 8 * 1999}' in log and 'replaced' in log
    assert (tmp_path / 'out' / 'trains' / 'summary.json').is_file()
    cut = data / 'standing' / 'bar_standing_19.aedat'  # of the validation set
    cut.write_bytes(cut.read_bytes()[:-5])
    with pytest.raises(SystemExit):
        run_here([*args, '--experiment', 'stops'], tmp_path, monkeypatch)
    line, = [x for x in capfd.readouterr().err.splitlines() if x.startswith('error: ')]
    assert str(cut) in line and f'byte {len(HEADER) + 8 * 1999}' in line


def test_event_digits_with_the_options_of_a_training_step(tmp_path, monkeypatch):
    """Accumulation, mixed precision, EMA, mixup, checkpointing, channels last: what could mistake frames for images."""
    run_here(['--dataset', 'events/digits', *TINY, '-T', '2', '--train-num-samples', '48', '--val-num-samples', '20',
              '--amp', '--amp-dtype', 'bfloat16', '--grad-accum-steps', '2', '--model-ema', '--mixup', '0.2',
              '--channels-last', '--grad-checkpointing', '--teacher-size', '40', '40', '--experiment', 'digits'],
             tmp_path, monkeypatch)
    facts = json.loads((tmp_path / 'out' / 'digits' / 'summary.json').read_text())
    assert facts['timesteps'] == 2 and all(0 <= r <= 1 for r in facts['firing_rates'].values())


def test_an_ann_trains_on_events_alone(tmp_path, monkeypatch):
    run_here(['--dataset', 'events/digits', *TINY, '-T', '2', '--model', 'test_resnet', '--distill', 'none',
              '--train-num-samples', '48', '--val-num-samples', '20', '--experiment', 'ann'], tmp_path, monkeypatch)
    assert json.loads((tmp_path / 'out' / 'ann' / 'summary.json').read_text())['timesteps'] is None


# ---- options

def test_event_options_and_defaults():
    args, recipe = parse_args(['--dataset', 'events/digits'])
    assert recipe == {} and args.timesteps == 10
    assert (args.event_frames, args.event_mode, args.event_size) == ('number', 'binary', None)
    assert args.event_axes == 'spikingjelly'
    assert (args.event_split, args.event_roll, args.hflip) == ('last100', 5, 0.5)
    assert parse_args(['--data-dir', 'images'])[0].timesteps is None  # images keep the checkpoint's own
    args, recipe = parse_args(['--config', 'events_digits'])
    assert recipe == {} and (args.dataset, args.hflip) == ('events/digits', 0.)


@pytest.mark.parametrize('argv, words', [
    (['--aa', 'rand-m9-mstd0.5', '--reprob', '0.2'], '--aa, --reprob: not for event data'),
    (['--color-jitter', '0.1'], '--color-jitter'),
    (['--cutmix', '1'], '--cutmix'),
    (['--mixup', '0.2', '--mixup-mode', 'elem'], '--mixup-mode'),
    (['--mean', '0.5', '0.5'], '--mean'),
    (['--in-chans', '3'], '--in-chans'),
    (['--input-size', '3', '32', '32'], '--input-size'),
    (['--share-stem'], '--share-stem'),
    (['--event-size', '0'], '--event-size 0'),
    (['--event-roll', '-1'], '--event-roll -1'),
    (['--event-mode', 'sum'], 'sum'),
    (['--neuron-init', 'ann'], '--neuron-init ann'),
])
def test_what_is_for_images_is_refused(argv, words):
    with pytest.raises(OptionError, match=words):
        parse_args(['--dataset', 'events/digits', *argv])


@pytest.mark.parametrize('argv, words', [
    (['--dataset', 'events/cifar10dvs', '--data-dir', 'gone'], ["'gone' does not exist", '--data-dir']),
    (['--dataset', 'events/mnist'], ["'events/mnist'", 'events/digits']),
    (['--dataset', 'events/digits', '--input-size', '2', '48', '48'], ['2 x 32 x 32', '--event-size']),
])
def test_bad_data_is_one_line_that_says_what_to_do(argv, words, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_here([*TINY, *argv], tmp_path, monkeypatch)
    line, = [x for x in capsys.readouterr().err.splitlines() if x.startswith('error: ')]
    assert all(word in line for word in words), line
