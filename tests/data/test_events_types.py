"""Event data of other types: whatever numbers a file or data set holds, the frames are those of the plain ones."""
import numpy as np
import pytest
import torch

from timm_sscl.data.events import (
    DamagedEventFile, EventDigits, EventFolder, Events, FrameSettings, TonicDataset, read_npz, to_frames)

HEIGHT, WIDTH, T = 12, 16, 4


def plain(n=400, seed=0, duration=1_000_000):
    rng = np.random.default_rng(seed)
    return Events(np.sort(rng.integers(0, duration, n)), rng.integers(0, WIDTH, n), rng.integers(0, HEIGHT, n),
                  rng.integers(0, 2, n))


class Recordings:
    """One recording through tonic's interface."""
    sensor_size = WIDTH, HEIGHT, 2
    targets = [0]
    classes = ['a']

    def __init__(self, events, target=0):
        self.events = np.rec.fromarrays(list(events), names='t,x,y,p')
        self.target = target

    def __getitem__(self, index):
        return self.events, self.target

    def __len__(self):
        return 1


def through_tonic(events, settings, folder):
    return TonicDataset(Recordings(events), settings).frames(0)


def through_npz(events, settings, folder):
    (folder / 'a').mkdir(exist_ok=True)
    for i in range(2):
        np.savez(folder / 'a' / f'{i}.npz', **events._asdict())
    return EventFolder(str(folder), True, 'last1', settings).frames(0)[:, :, :HEIGHT, :WIDTH]


def through_to_frames(events, settings, folder):
    return to_frames(events, settings, (HEIGHT, WIDTH))


READERS = through_tonic, through_npz, through_to_frames

SAME = dict(  # how else the same recording may be written
    seconds=lambda e: e._replace(t=e.t * 1e-6),
    seconds_since_1970=lambda e: e._replace(t=1.7e9 + e.t * 1e-6),
    float32_seconds=lambda e: e._replace(t=(e.t * 1e-6).astype(np.float32)),
    float_microseconds=lambda e: e._replace(t=e.t.astype(float)),
    float32_microseconds=lambda e: e._replace(t=e.t.astype(np.float32)),
    uint64=lambda e: e._replace(t=e.t.astype(np.uint64)),
    uint32=lambda e: e._replace(t=e.t.astype(np.uint32)),
    uint32_that_begins_anew=lambda e: e._replace(t=(e.t + 2 ** 32 - 300_000).astype(np.uint32)),
    int32_that_begins_anew=lambda e: e._replace(t=(e.t + 2 ** 31 - 300_000).astype(np.uint32).view(np.int32)),
    negative=lambda e: e._replace(t=e.t - 700_000),
    small_coordinates=lambda e: e._replace(x=e.x.astype(np.uint8), y=e.y.astype(np.int8)),
    float_coordinates=lambda e: e._replace(x=e.x.astype(np.float32), y=e.y.astype(float)),
    bool_polarity=lambda e: e._replace(p=e.p == 1),
    uint8_polarity=lambda e: e._replace(p=e.p.astype(np.uint8)),
    signed_polarity=lambda e: e._replace(p=(2 * e.p - 1).astype(np.int8)),
    float_polarity=lambda e: e._replace(p=2. * e.p - 1),
)


@pytest.mark.parametrize('by', ['time', 'number'])
@pytest.mark.parametrize('read', READERS)
@pytest.mark.parametrize('written', SAME.values(), ids=SAME)
def test_the_same_recording_gives_the_same_frames(written, read, by, tmp_path):
    settings, events = FrameSettings(T, by, 'count'), plain()
    expected = to_frames(events, settings, (HEIGHT, WIDTH))
    assert expected.sum() == 400 and (expected.sum((1, 2, 3)) > 50).all()  # in all frames
    found = read(written(events), settings, tmp_path)
    if written(events).t.dtype == np.float32 or by == 'time' and written is SAME['seconds_since_1970']:
        # a rounded time may cross the end of a frame
        assert found.sum() == 400 and np.abs(found.sum((1, 2, 3)) - expected.sum((1, 2, 3))).max() <= 1
    else:
        assert np.array_equal(found, expected)


def at(name, i, value, dtype=None):
    def changed(events):
        array = getattr(events, name).astype(dtype or getattr(events, name).dtype)
        array[i] = value
        return events._replace(**{name: array})
    return changed


REFUSED = [  # what would be another number, the frames by time or number, and words of the error
    (at('x', 7, 3.5, float), 'number', 'event 7: x is float64 and holds 3.5'),
    (at('y', 7, np.nan, float), 'number', 'event 7: y is float64 and holds nan'),
    (at('p', 7, .5, float), 'number', 'event 7: p is float64 and holds 0.5'),
    (at('t', 7, np.inf, float), 'number', 'event 7: t is inf'),
    (at('t', 399, 2 ** 64 - 5, np.uint64), 'number', 'event 399: t is uint64 and holds 18446744073709551611'),
    (at('x', 7, -1), 'number', 'event 7: x=-1'),
    (at('y', 7, 128), 'number', 'event 7: x=.*y=128 is outside'),
    (at('p', 7, 2), 'number', 'event 7: polarity 2'),
    (at('p', 7, -1), 'number', 'event 7: polarity -1'),  # beside 0 and 1
    (at('p', 7, 255, np.uint8), 'number', 'event 7: polarity 255'),
    (at('t', 399, 5), 'time', 'event 399: time runs backwards'),
    (lambda e: e._replace(t=e.t[::-1]), 'number', 'time runs backwards.*sort them'),
    (lambda e: Events(*(a[np.argsort(e.p, kind='stable')] for a in e)), 'number', 'backwards.*of 400 events.*sort'),
    (lambda e: e._replace(t=(1.7e9 + e.t * 1e-6).astype(np.float32)), 'time', 't is float32.*128 apart: too coarse'),
    (at('t', 0, -2 ** 63 + 1), 'time', 't goes from -9223372036854775807'),
    (lambda e: e._replace(t=e.t.astype('datetime64[us]')), 'number', r't is datetime64\[us\]'),
    (lambda e: e._replace(x=e.x + 1j), 'number', 'x is complex128'),
]


@pytest.mark.parametrize('read', READERS)
@pytest.mark.parametrize('change, by, words', REFUSED)
def test_what_would_be_another_number_is_refused(change, by, words, read, tmp_path):
    kind = ValueError if read is through_to_frames else DamagedEventFile
    with pytest.raises(kind, match=words):
        read(change(plain()), FrameSettings(T, by, 'count'), tmp_path)


def test_a_type_too_small_for_the_sensor_is_refused():
    """346 columns in 8 bits: those past 255 have come back at the left."""
    events = plain()
    events = events._replace(x=(events.x * 20).astype(np.uint8))
    with pytest.raises(ValueError, match='x is uint8, which cannot hold the 346 pixels'):
        to_frames(events, FrameSettings(T), (260, 346))


def test_a_few_events_in_the_wrong_order_are_a_cameras():
    events = plain()
    t = events.t.copy()
    t[[7, 8, 200, 201]] = t[[8, 7, 201, 200]]
    settings = FrameSettings(T, mode='count')
    assert to_frames(events._replace(t=t), settings, (HEIGHT, WIDTH)).sum() == 400
    with pytest.raises(ValueError, match='event 8: time runs backwards'):
        to_frames(events._replace(t=t), FrameSettings(T, 'time'), (HEIGHT, WIDTH))


def test_times_that_leave_the_frames_empty_are_said(caplog):
    """By its definition a frame of equal time may be empty; nearly all of them are where one time is wrong."""
    for by, said in (('number', False), ('time', True)):
        data = TonicDataset(Recordings(at('t', 399, 2 ** 40)(plain())), FrameSettings(T, by, 'count'))
        for _ in range(2):
            frames = data.frames(0)
        assert (frames[0].sum() == 399) == said
        assert caplog.text.count('its events lie in 2 of 4 frames of equal time') == said
    caplog.clear()
    TonicDataset(Recordings(plain()), FrameSettings(T, 'time')).frames(0)
    assert not caplog.text


@pytest.mark.parametrize('read', [through_tonic, through_npz])
def test_a_recording_without_events_is_damage_in_a_data_set(read, tmp_path):
    """A file that was cut off after its header looks the same."""
    with pytest.raises(DamagedEventFile, match='holds no events'):
        read(Events(*(a[:0] for a in plain())), FrameSettings(T), tmp_path)


@pytest.mark.parametrize('dtype', [np.uint8, np.int16, np.float16, np.float64])
def test_frames_of_any_type_are_summed_without_overflow(dtype, tmp_path):
    frames = np.full((2, 2, 128, 128), 200, dtype)
    np.savez(tmp_path / '0.npz', frames=frames)
    read = read_npz(str(tmp_path / '0.npz'), (128, 128))
    assert read.dtype == np.int64 and np.array_equal(read, frames)
    (tmp_path / 'a').mkdir()
    for i in range(2):
        np.savez(tmp_path / 'a' / f'{i}.npz', frames=frames)
    item, _ = EventFolder(str(tmp_path), True, 'last1', FrameSettings(2, mode='count', size=32))[0]
    assert torch.equal(item, torch.full((2, 2, 32, 32), 16 * 200.))


def test_frames_of_bool_are_no_counts(tmp_path):
    (tmp_path / 'a').mkdir()
    for i in range(2):
        np.savez(tmp_path / 'a' / f'{i}.npz', frames=np.ones((2, 2, 128, 128), bool))
    assert EventFolder(str(tmp_path), True, 'last1', FrameSettings(2))[0][0].min() == 1
    with pytest.raises(DamagedEventFile, match='frames of bool.*--event-mode binary'):
        EventFolder(str(tmp_path), True, 'last1', FrameSettings(2, mode='count'))[0]


def test_tonics_items_are_what_the_list_of_labels_says():
    with pytest.raises(ValueError, match='has the label 1 itself, and 0 in the list'):
        TonicDataset(Recordings(plain(), target=1), FrameSettings(T))[0]
    dataset = Recordings(plain())
    dataset.events = np.stack(plain(), 1)  # columns without names
    with pytest.raises(ValueError, match='must have the fields t, x, y and p'):
        TonicDataset(dataset, FrameSettings(T))[0]
    dataset.classes = {'a': 1, 'b': 2}
    with pytest.raises(ValueError, match=r'numbers its classes \[1, 2\]'):
        TonicDataset(dataset, FrameSettings(T))
    dataset.classes, dataset.targets = {'a': 0}, ['c']
    with pytest.raises(ValueError, match="label 'c', which is none of its classes"):
        TonicDataset(dataset, FrameSettings(T))
    dataset.classes, dataset.targets = ['b', 'a'], ['a']
    assert TonicDataset(dataset, FrameSettings(T)).targets == [1]  # not the classes that happen to be there


def test_digits_kept_in_memory_are_those_of_the_settings():
    digits = EventDigits('validation', FrameSettings(10), num_samples=2)
    digits[0]
    digits.settings = FrameSettings(4, mode='count')
    assert torch.equal(digits[0][0], EventDigits('validation', FrameSettings(4, mode='count'), num_samples=2)[0][0])
    digits.frames(0)[:] = 7  # a copy
    assert digits[0][0].sum() == len(digits.read(0).t)
