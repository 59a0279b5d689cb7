"""Event data sets by name: folders, SpikingJelly's layouts, tonic's sets, the digits; through the loader."""
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from files import HEADER, write_aedat, write_classes
from timm_sscl.data import DigitsDataset, create_dataset
from timm_sscl.data.checks import check_sensor
from timm_sscl.data.events import (
    DamagedEventFile, EventAugment, EventDigits, EventFolder, FrameSettings, TonicDataset, create_event_loader,
    read_aedat, to_frames)
from timm_sscl.data.events.digits import record_digit
from timm_sscl.data.samples import Samples, UnreadableSample, sample_name


def test_folder_of_classes_is_ordered_by_number_and_split_by_name(tmp_path):
    write_classes(tmp_path)
    val = EventFolder(str(tmp_path), training=False, split='last3')
    train = EventFolder(str(tmp_path), training=True, split='last3')
    assert val.classes == ['airplane', 'bird'] and val.class_to_idx == {'airplane': 0, 'bird': 1}
    assert [val.filename(i, basename=True) for i in range(6)] == [
        f'cifar10_{name}_{i}.aedat' for name in ('airplane', 'bird') for i in (9, 10, 11)]
    assert val.targets == [0, 0, 0, 1, 1, 1] and len(train) == 18 and not set(val.files) & set(train.files)
    first = EventFolder(str(tmp_path), training=False, split='first2')
    assert [first.filename(i, basename=True)[-8:] for i in range(2)] == ['_0.aedat', '_1.aedat']
    few = EventFolder(str(tmp_path), split='last3', num_samples=7)
    assert np.bincount(few.targets).tolist() == [4, 3]  # of all classes


def test_item_is_the_frames_of_its_file(tmp_path):
    write_classes(tmp_path)
    settings = FrameSettings(4, mode='count', size=48, axes='tonic')
    data = create_dataset('events/cifar10dvs', str(tmp_path), 'validation', event_split='last3', settings=settings)
    frames, target = data[4]
    file = tmp_path / 'bird' / 'cifar10_bird_10.aedat'
    assert frames.shape == (4, 2, 48, 48) and frames.dtype == torch.float32 and target == 1
    assert np.array_equal(frames, to_frames(read_aedat(str(file), 'tonic'), settings, (128, 128)))
    assert data.filename(4, absolute=True) == str(file) and data.frame_size == (48, 48)
    data.transform = lambda x: x + 1
    assert torch.equal(data[4][0], frames + 1)


def test_aedat_and_npz_lie_side_by_side(tmp_path):
    write_classes(tmp_path, 3)
    events = read_aedat(str(tmp_path / 'bird' / 'cifar10_bird_2.aedat'))
    np.savez(tmp_path / 'bird' / 'cifar10_bird_3.npz', **events._asdict())
    data = EventFolder(str(tmp_path), training=True, split='first1')
    assert [data.filename(i, basename=True) for i in (3, 4)] == ['cifar10_bird_2.aedat', 'cifar10_bird_3.npz']
    assert torch.equal(data[3][0], data[4][0]) and data[3][0].sum() > 0


def test_spikingjellys_folders_are_found(tmp_path, caplog):
    events = {}
    for i in range(4):
        write_aedat(tmp_path / 'extract' / 'bird' / f'cifar10_bird_{i}.aedat', seed=i)
        events[i] = read_aedat(str(tmp_path / 'extract' / 'bird' / f'cifar10_bird_{i}.aedat'))
    (tmp_path / 'download').mkdir()
    (tmp_path / 'download' / 'bird.zip').write_bytes(b'')
    caplog.set_level(logging.INFO)
    expected = EventFolder(str(tmp_path), False, 'last1')[0][0]
    for folder, arrays in (('events_np', lambda e: e._asdict()),
                           ('frames_number_10_split_by_number', lambda e: dict(frames=to_frames(
                               e, FrameSettings(mode='count'), (128, 128)).astype(float)))):
        (tmp_path / folder / 'bird').mkdir(parents=True)
        for i, e in events.items():
            np.savez(tmp_path / folder / 'bird' / f'cifar10_bird_{i}.npz', **arrays(e))
        for root in (tmp_path, tmp_path / folder):
            data = EventFolder(str(root), False, 'last1')
            assert data.root == str(tmp_path / folder) and torch.equal(data[0][0], expected)
        assert f'reading {tmp_path / folder}' in caplog.text
    for settings in (FrameSettings(4), FrameSettings(10, 'time')):
        with pytest.raises(ValueError, match='holds 10 frames by number.*--timesteps, --event-frames'):
            EventFolder(str(tmp_path / folder), False, 'last1', settings)
    (tmp_path / folder).rename(tmp_path / 'frames')
    with pytest.raises(DamagedEventFile, match=r'cifar10_bird_3.npz.*\(10, 2, 128, 128\).*\(4, 2, 128, 128\)'):
        EventFolder(str(tmp_path / 'frames'), False, 'last1', FrameSettings(4))[0]


def test_what_is_wrong_with_a_folder_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match='--data-dir'):
        create_dataset('events/cifar10dvs', str(tmp_path / 'gone'))
    with pytest.raises(FileNotFoundError, match='--data-dir'):
        create_dataset('events/cifar10dvs')
    with pytest.raises(ValueError, match='holds no class folders'):
        EventFolder(str(tmp_path))
    write_classes(tmp_path, 3)
    with pytest.raises(ValueError, match='class 0 has 3 recordings'):
        EventFolder(str(tmp_path))
    (tmp_path / 'cat').mkdir()
    with pytest.raises(ValueError, match='class cat holds no recordings.*shift the labels'):
        EventFolder(str(tmp_path), split='last1')
    (tmp_path / 'cat').rmdir()
    (tmp_path / 'bird' / 'cifar10_bird_1.npz').write_bytes(b'')
    with pytest.raises(ValueError, match="holds 'cifar10_bird_1' twice"):
        EventFolder(str(tmp_path), split='last1')
    for args, words in ((('events/mnist',), 'events/cifar10dvs, events/digits'),
                        (('events/digits', None, 'holdout'), 'holdout')):
        with pytest.raises(ValueError, match=words):
            create_dataset(*args)


def test_damaged_recordings_are_replaced_in_training_and_named(tmp_path, caplog):
    write_classes(tmp_path)
    damaged = tmp_path / 'airplane' / 'cifar10_airplane_4.aedat'
    damaged.write_bytes(damaged.read_bytes()[:-3])
    offset = len(HEADER) + 8 * 59
    train = Samples(EventFolder(str(tmp_path), True, 'last3'), 2, training=True, max_unreadable=1)
    train.transform = EventAugment(0., 0)
    assert torch.equal(train[4][0], train[5][0]) and train.unreadable == [4]
    assert str(damaged) in caplog.text and f'byte {offset}' in caplog.text
    with pytest.raises(UnreadableSample, match=f'{damaged.name}.*byte {offset}'):
        Samples(EventFolder(str(tmp_path), False, 'first5'), 2, training=False)[4]


def test_loader_gives_frames_that_depend_on_seed_epoch_and_index_alone():
    data = EventDigits('train', FrameSettings(3), num_samples=10)

    def epoch(workers, number):
        samples = Samples(data, 10, training=True, seed=1)
        samples.set_epoch(number)
        loader = create_event_loader(samples, 4, is_training=True, transform=EventAugment(0.5, 3), num_workers=workers)
        torch.manual_seed(0)  # of the order
        return list(loader)

    first = epoch(0, 0)
    assert [x.shape for x, _ in first] == [(4, 3, 2, 32, 32)] * 2  # the rest is dropped
    assert first[0][1].dtype == torch.int64
    again, other = epoch(2, 0), epoch(0, 1)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, again))
    assert not torch.equal(first[0][0], other[0][0])
    val = create_event_loader(data, 4)
    assert [len(x) for x, _ in val] == [4, 4, 2] and torch.equal(next(iter(val))[0][1], data[1][0])


# ---- the digits

def test_event_digits_are_the_digits_in_their_split():
    for split in ('train', 'validation'):
        events, images = EventDigits(split), DigitsDataset(split)
        assert events.targets == images.targets and len(events) == len(images)
    frames, target = events[0]
    assert frames.shape == (10, 2, 32, 32) and frames.dtype == torch.float32
    assert set(frames.unique().tolist()) == {0., 1.}
    shares = torch.stack([events[i][0] for i in range(100)]).mean((0, 3, 4))
    assert 0.05 < shares.min() and shares.max() < 0.3  # every frame shows something, none is saturated
    counts = EventDigits('validation', FrameSettings(mode='count', size=16), num_samples=3)
    assert counts[0][0].shape == (10, 2, 16, 16) and counts[0][0].sum() == len(counts.read(0).t)


def test_event_digits_follow_their_seed():
    a, b, other = EventDigits(num_samples=3), EventDigits(num_samples=3), EventDigits(num_samples=3, seed=1)
    b[2]  # the order of reading does not matter
    for i in range(3):
        assert torch.equal(a[i][0], b[i][0]) and not torch.equal(a[i][0], other[i][0])
    assert torch.equal(a[0][0], a[0][0])
    assert sample_name(a, 0).startswith('digit ')


def test_digit_comes_back_to_where_it_began():
    """The path is closed, so a pixel's signed events sum to less than a threshold's worth; it stays on the sensor."""
    scan = EventDigits(num_samples=1).scans[0]
    events = record_digit(scan, 3, threshold=0.3)
    total = np.zeros((32, 32))
    np.add.at(total, (events.y, events.x), 2 * events.p - 1)
    assert np.abs(total).max() <= 1 and len(events.t) > 1000
    assert 0 <= events.t.min() and 90_000 < events.t.max() <= 100_000
    drawn = np.zeros((32, 32), bool)
    drawn[events.y, events.x] = True
    rows, columns = np.flatnonzero(drawn.any(1)), np.flatnonzero(drawn.any(0))
    assert rows[0] >= 0 and np.ptp(rows) >= 22 and np.ptp(columns) >= 15  # a digit of 22 pixels, moved by 8


# ---- tonic

def write_nmnist(root):
    """N-MNIST's bytes: x, y, then polarity in the highest bit of a 23 bit time."""
    written = {}
    for part, labels in (('Train', (0, 0, 1)), ('Test', (1,))):
        for i, label in enumerate(labels):
            file = Path(root) / 'NMNIST' / part / str(label) / f'{i:05}.bin'
            file.parent.mkdir(parents=True, exist_ok=True)
            events = [(3 * k % 34, (5 * k + label) % 34, k % 2, 100 * k) for k in range(20)]
            file.write_bytes(b''.join(bytes([x, y]) + ((p << 23) | t).to_bytes(3, 'big') for x, y, p, t in events))
            written[part, label] = events
    return written


@pytest.fixture
def nmnist(tmp_path, monkeypatch):
    tonic = pytest.importorskip('tonic', reason='reads through tonic')
    monkeypatch.setattr(tonic.datasets.NMNIST, '_check_exists', lambda self: True)  # which counts ten thousand files
    return tmp_path, write_nmnist(tmp_path)


@pytest.mark.parametrize('mode', ['binary', 'count'])
def test_tonics_data_sets_by_name(nmnist, mode):
    root, written = nmnist
    settings = FrameSettings(4, mode=mode)
    train = create_dataset('tonic/NMNIST', str(root), 'train', settings=settings)
    val = create_dataset('tonic/NMNIST', str(root), 'validation', settings=settings)
    assert (len(train), len(val)) == (3, 1) and train.targets == [0, 0, 1] and val.targets == [1]
    assert train.classes == val.classes and len(train.classes) == 10 and train.sensor_size == (34, 34)
    expected = np.zeros((4, 2, 34, 34))
    for k, (x, y, p, _) in enumerate(written['Test', 1]):
        expected[k // 5, p, y, x] += 1
    frames, target = val[0]
    assert np.array_equal(frames, expected) and target == 1
    assert val.filename(0).endswith('Test/1/00000.bin')


def test_damage_that_tonic_meets_is_named(nmnist):
    root, _ = nmnist
    file = root / 'NMNIST' / 'Test' / '1' / '00000.bin'
    file.write_bytes(file.read_bytes()[:-2])
    val = create_dataset('tonic/NMNIST', str(root), 'validation')
    with pytest.raises(DamagedEventFile, match='00000.bin'):
        val[0]
    file.write_bytes(bytes([200, 3, 0, 0, 1]))
    with pytest.raises(DamagedEventFile, match='00000.bin.*event 0: x=200.*outside'):
        val[0]


def test_tonic_downloads_only_when_allowed(tmp_path):
    pytest.importorskip('tonic', reason='reads through tonic')
    with pytest.raises(FileNotFoundError, match='NMNIST.*--dataset-download'):
        create_dataset('tonic/NMNIST', str(tmp_path), 'train')
    with pytest.raises(FileNotFoundError, match='--data-dir'):
        create_dataset('tonic/NMNIST', None, 'train')
    with pytest.raises(ValueError, match="no data set 'NoMNIST'.*NMNIST"):
        create_dataset('tonic/NoMNIST', str(tmp_path), 'train')


class Recordings:
    """A data set of tonic's interface."""
    sensor_size = (20, 10, 2)
    classes = {'right': 1, 'left': 0}

    def __init__(self, targets=(0, 1, 1)):
        self.targets = list(targets)

    def __getitem__(self, index):
        t = np.arange(30)
        return np.rec.fromarrays([t % (10 + index), t % 7, t, t % 2 == 0], names='x,y,t,p'), self.targets[index]

    def __len__(self):
        return len(self.targets)


def test_any_data_set_of_tonics_interface():
    data = TonicDataset(Recordings(), FrameSettings(3, mode='count'))
    assert data.classes == ['left', 'right'] and data.targets == [0, 1, 1] and data[1][0].shape == (3, 2, 10, 20)
    assert data[1][0].sum() == 30
    names = Recordings(('b', 'a', 'b'))
    names.classes = None
    assert TonicDataset(names).classes == ['a', 'b'] and TonicDataset(names).targets == [1, 0, 1]
    sizes = Recordings()
    sizes.sensor_size = None
    with pytest.raises(ValueError, match='different sizes.*--event-size'):
        TonicDataset(sizes)
    assert TonicDataset(sizes, FrameSettings(3, size=16))[2][0].shape == (3, 2, 16, 16)
    audio = Recordings()
    audio.sensor_size = (700, 1, 1)
    with pytest.raises(ValueError, match=r'sensor of \(700, 1, 1\)'):
        TonicDataset(audio)
    with pytest.raises(ValueError, match='no list of labels'):
        TonicDataset(Recordings([None, 1, 1]))


def test_a_data_set_that_tonic_does_not_split_is_split_by_name(tmp_path, monkeypatch):
    tonic = pytest.importorskip('tonic', reason='reads through tonic')

    class Undivided(Recordings):
        def __init__(self, save_to):
            super().__init__((0, 1, 0, 1, 1, 0, 0))

    monkeypatch.setattr(tonic.datasets, 'Undivided', Undivided, raising=False)
    train, val = (create_dataset('tonic/Undivided', str(tmp_path), split, event_split='last1')
                  for split in ('train', 'validation'))
    # of classes 0 (samples 0, 2, 5, 6) and 1 (samples 1, 3, 4) the last one each
    assert (train.indices.tolist(), val.indices.tolist()) == ([0, 1, 2, 3, 5], [4, 6])
    assert train.targets == [0, 1, 0, 1, 0] and val.targets == [1, 0]


# ---- the sensor

@pytest.mark.parametrize('width, height, said', [(34, 34, True), (64, 64, True), (65, 20, False), (20, 65, False)])
def test_recordings_of_a_smaller_sensor_are_said(width, height, said, tmp_path, caplog):
    rng = np.random.default_rng(0)
    for name in ('a/0', 'a/1', 'b/0', 'b/1'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        x, y, p = rng.integers(0, (width, height, 2), (2000, 3)).T
        np.savez(tmp_path / f'{name}.npz', t=np.arange(2000), x=x, y=y, p=p)
    (tmp_path / 'b/1.npz').write_bytes(b'damaged')  # is said where it is read
    check_sensor(EventFolder(str(tmp_path), training=False, split='last1'))
    assert ('All events of the 1 recordings looked at' in caplog.text) == said
    if said:
        assert f'the first {width} x {height} pixels of a sensor of 128 x 128' in caplog.text
        assert '--event-size' in caplog.text


def test_recordings_that_fill_their_sensor_are_not_named(caplog):
    check_sensor(EventDigits('validation', num_samples=10))
    assert not caplog.text
