"""Data sets that are not whole, or not what they seem: cut off conversions, missing classes, copies in both splits."""
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from files import write_classes, write_images
from runs import IMAGES, fails, run_here
from timm_sscl.data import DigitsDataset, create_dataset
from timm_sscl.data.checks import check_copies, check_seen
from timm_sscl.data.copies import find_copies
from timm_sscl.data.events import EventDigits, EventFolder, FrameSettings, read_aedat, to_frames
from timm_sscl.data.manifest import describe_data
from timm_sscl.training.command_line.options import parse_args
from timm_sscl.training.datasets import create_datasets

FRAMES = 'frames_number_10_split_by_number'


@pytest.fixture
def converted(tmp_path):
    """Nine recordings of three classes in SpikingJelly's layout: as they came, as .npz, and as frames."""
    root = tmp_path / 'dvs'
    write_classes(root / 'extract', 3, ('ant', 'bee', 'cat'))
    for file in (root / 'extract').rglob('*.aedat'):
        events = read_aedat(str(file))
        arrays = dict(frames=to_frames(events, FrameSettings(mode='count'), (128, 128)).astype(np.float32))
        for name, content in (('events_np', events._asdict()), (FRAMES, arrays)):
            folder = root / name / file.parent.name
            folder.mkdir(parents=True, exist_ok=True)
            np.savez(folder / f'{file.stem}.npz', **content)
    return root


def cut_off(folder):
    """As a conversion leaves it that was killed: one class is not there, of another there is a part."""
    shutil.rmtree(folder / 'cat')
    (folder / 'bee' / 'cifar10_bee_2.npz').unlink()


@pytest.mark.parametrize('given', ['', FRAMES])
@pytest.mark.parametrize('beside', ['events_np', 'extract', 'both'])
def test_frames_whose_making_was_cut_off_are_refused(beside, given, converted):
    cut_off(converted / FRAMES)
    if beside != 'both':
        shutil.rmtree(converted / ('extract' if beside == 'events_np' else 'events_np'))
    for training in (True, False):
        with pytest.raises(ValueError, match=f'{FRAMES}.*holds 5 of the 9 recordings.*bee/cifar10_bee_2.*anew'):
            EventFolder(str(converted / given), training, 'last1')
    shutil.rmtree(converted / FRAMES)  # as the message says
    assert len(EventFolder(str(converted), True, 'last1')) == 6


@pytest.mark.parametrize('given', ['', 'events_np'])
def test_events_whose_conversion_was_cut_off_are_refused(given, converted):
    shutil.rmtree(converted / FRAMES)
    cut_off(converted / 'events_np')
    with pytest.raises(ValueError, match='events_np.*holds 5 of the 9 recordings in .*extract'):
        EventFolder(str(converted / given), True, 'last1')


def test_the_script_does_not_train_on_a_part(converted, tmp_path, monkeypatch, capsys):
    cut_off(converted / FRAMES)
    args = ['--dataset', 'events/cifar10dvs', '--data-dir', 'dvs', '--event-split', 'last1', '--model',
            'spiking_test_resnet', '--device', 'cpu', '--output', 'out']
    code, line = fails(args, tmp_path, monkeypatch, capsys)
    assert code == 2 and 'holds 5 of the 9 recordings' in line and not (tmp_path / 'out').exists()


def test_whole_folders_are_read_and_give_the_same(converted, caplog):
    frames = EventFolder(str(converted), True, 'last1')
    assert frames.root.endswith(FRAMES) and len(frames) == 6
    events = EventFolder(str(converted / 'events_np'), True, 'last1')
    assert all((a == b).all() for (a, _), (b, _) in zip(frames, events))
    assert 'WARNING' not in caplog.text
    (converted / 'events_np' / 'cat' / 'cifar10_cat_0.npz').unlink()  # of the source: the frames are whole
    shutil.rmtree(converted / 'extract')
    assert len(EventFolder(str(converted), True, 'last1')) == 6
    assert 'holds 1 recordings' in caplog.text and 'cat/cifar10_cat_0' in caplog.text


def test_a_folder_of_ones_own_is_read_and_what_cannot_be_known_is_said(converted, caplog):
    (converted / FRAMES).rename(converted.parent / 'mine')
    mine = converted.parent / 'mine'
    assert len(EventFolder(str(mine), True, 'last1')) == 6 and 'cut off' not in caplog.text
    (mine / 'bee' / 'cifar10_bee_2.npz').unlink()
    assert len(EventFolder(str(mine), True, 'last1')) == 5
    assert 'classes hold 2 (bee) to 3 recordings' in caplog.text and 'cut off' in caplog.text


@pytest.mark.parametrize('name', ['ant/cifar10_ant_3.npz.tmp', 'bee/x.part', 'frames.zip.crdownload'])
def test_files_that_are_being_written_are_named(name, converted):
    (converted / FRAMES / name).write_bytes(b'')
    with pytest.raises(ValueError, match=f'{name}.*still being written'):
        EventFolder(str(converted), True, 'last1')


def test_axes_that_turn_a_part_of_the_recordings_are_refused(converted, caplog):
    settings = FrameSettings(axes='tonic')
    EventFolder(str(converted), True, 'last1', settings)
    assert "axes='tonic' (--event-axes) changes nothing" in caplog.text
    file = next((converted / 'extract' / 'ant').iterdir())
    shutil.copy(converted / 'events_np' / 'ant' / f'{file.stem}.npz', file.parent / 'other.npz')
    with pytest.raises(ValueError, match='--event-axes.*keep one kind'):
        EventFolder(str(converted / 'extract'), True, 'last1', settings)


# ---- what training never shows

def labelled(labels, names='abcd'):
    return SimpleNamespace(targets=list(labels), class_to_idx={name: i for i, name in enumerate(names)})


def test_classes_that_training_never_shows_are_refused(caplog):
    with pytest.raises(ValueError, match='validation data has 2 classes of which training data has no sample: c, d'):
        check_seen(labelled([0, 1, 0]), labelled([0, 1, 2, 3]))
    check_seen(labelled([0, 1, 0]), labelled([0, 2]), cut=True)
    assert 'Validation data has 1 classes of which training data has no sample: c' in caplog.text
    caplog.clear()
    check_seen(labelled([0, 1, 2]), labelled([0, 2]))
    assert 'Training data has 1 classes of which validation data has no sample: b' in caplog.text
    caplog.clear()
    check_seen(labelled([0, 1]), labelled([1, 0]))
    check_seen([1], [2])  # does not tell its labels
    assert not caplog.text


def test_a_class_map_does_not_hide_them(tmp_path):
    root = write_images(tmp_path / 'images', per_class=1)
    shutil.rmtree(root / 'train' / 'class1')
    (tmp_path / 'map.txt').write_text('class0\nclass1\nclass2\n')
    args = parse_args(['--data-dir', str(root), '--class-map', str(tmp_path / 'map.txt')])[0]
    with pytest.raises(ValueError, match='training data has no sample: class1'):
        create_datasets(args)


# ---- copies

def test_copies_are_found_by_their_bytes(tmp_path):
    contents = dict(a=b'1' * 9000, b=b'2' * 9000, c=b'1' * 8999 + b'3', d=b'', e=b'3' + b'1' * 8999)
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        (tmp_path / f'other_{name}').write_bytes(contents['a'] if name == 'b' else content * 2)
    files = [str(tmp_path / name) for name in contents]
    others = [str(tmp_path / f'other_{name}') for name in contents]
    assert find_copies(files, others) == [(files[0], others[1]), (files[3], others[3])]
    assert find_copies([*files, str(tmp_path / 'gone')], []) == []


def test_validation_files_that_are_training_files_are_said(tmp_path, caplog):
    root = write_images(tmp_path / 'images', per_class=2)
    args = parse_args(['--data-dir', str(root)])[0]
    create_datasets(args)
    assert not caplog.text
    shutil.copy(root / 'train/class1/0.png', root / 'validation/class1/renamed.png')
    create_datasets(args)
    assert '1 of 7 validation files are also training files' in caplog.text and 'renamed.png' in caplog.text


def test_recordings_that_both_parts_have_are_said(tmp_path, caplog):
    write_classes(tmp_path, 4)
    shutil.copy(tmp_path / 'bird/cifar10_bird_1.aedat', tmp_path / 'bird/cifar10_bird_9.aedat')
    check_copies(*(EventFolder(str(tmp_path), training, 'last2') for training in (True, False)))
    assert '1 of 4 validation files' in caplog.text and 'cifar10_bird_9' in caplog.text


# ---- the data that a run was started on

def test_a_run_is_not_continued_or_evaluated_on_other_classes(tmp_path, monkeypatch, capsys, caplog):
    """With --num-classes, three of four folders would be numbered anew, and all labels after the gap be wrong."""
    root = write_images(tmp_path / 'images', classes=4, per_class=4)
    run_here([*IMAGES, '--epochs', '1', '--num-classes', '4'], tmp_path, monkeypatch)
    started = json.loads((tmp_path / 'out/run/data.json').read_text())
    assert started['validation']['classes'] == {f'class{i}': i for i in range(4)}
    assert (started['training']['samples'], started['validation']['samples']) == (16, 16)
    shutil.move(root / 'validation/class1', tmp_path / 'class1')
    code, line = fails(['--eval-only', '--resume', 'out/run'], tmp_path, monkeypatch, capsys)
    assert code == 2 and 'validation data has 3 classes' in line and 'class1 differ' in line and '--class-map' in line
    shutil.move(root / 'train/class1', tmp_path / 'other')
    code, line = fails(['--resume', 'out/run', '--epochs', '2'], tmp_path, monkeypatch, capsys)
    assert code == 2 and 'training data has 3 classes' in line and 'class1 differ' in line
    shutil.move(tmp_path / 'class1', root / 'validation/class1')
    (root / 'validation/class2/1.png').rename(root / 'validation/class2/new.png')
    caplog.clear()
    run_here(['--eval-only', '--resume', 'out/run'], tmp_path, monkeypatch)
    assert 'other file names or labels' in caplog.text
    (root / 'validation/class2/new.png').unlink()
    caplog.clear()
    run_here(['--eval-only', '--resume', 'out/run'], tmp_path, monkeypatch)
    assert 'validation data has other samples' in caplog.text and '(16, now 15)' in caplog.text
    (tmp_path / 'out/run/data.json').unlink()  # a run of an older version
    run_here(['--eval-only', '--resume', 'out/run'], tmp_path, monkeypatch)


@pytest.mark.parametrize('make', [
    lambda tmp: DigitsDataset('validation', 30), lambda tmp: EventDigits('validation', num_samples=30),
    lambda tmp: EventFolder(str(write_classes(tmp)), False, 'last2'),
    lambda tmp: create_dataset('', str(write_images(tmp / 'a', per_class=2)), 'train'),
    lambda tmp: create_dataset('torch/image_folder', str(write_images(tmp / 'a', per_class=2)), 'train')])
def test_data_is_described_as_it_is(make, tmp_path):
    data = make(tmp_path)
    found = describe_data(data)
    classes = getattr(getattr(data, 'reader', data), 'class_to_idx', None) or {str(i): i for i in range(10)}
    assert found['classes'] == classes and found['samples'] == len(data)
    assert (found['files'] is None) == isinstance(data, (DigitsDataset, EventDigits))
    assert json.loads(json.dumps(found)) == found and describe_data(data) == found
    assert describe_data([1, 2]) == dict(classes=None, samples=2, files=None)


def test_recordings_of_a_smaller_sensor_are_said_before_training(tmp_path, caplog):
    rng = np.random.default_rng(0)
    for name in ('a/0', 'a/1', 'b/0', 'b/1'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        x, y, p = rng.integers(0, (34, 34, 2), (500, 3)).T
        np.savez(tmp_path / f'{name}.npz', t=np.arange(500), x=x, y=y, p=p)
    argv = ['--dataset', 'events/cifar10dvs', '--data-dir', str(tmp_path), '--event-split', 'last1', '-T', '2']
    create_datasets(parse_args(argv)[0])
    assert caplog.text.count('the first 34 x 34 pixels of a sensor of 128 x 128') == 1
