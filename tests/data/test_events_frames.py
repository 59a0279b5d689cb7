"""Events to frames, in the slow obvious way and beside SpikingJelly and tonic; augmentation; splits; the camera."""
from collections import Counter

import numpy as np
import pytest
import torch

from timm_sscl.data.events import EventAugment, Events, FrameSettings, resize_frames, simulate_events, to_frames
from timm_sscl.data.events.splits import validation_mask

SENSOR = (12, 16)  # height, width


def random_events(n, seed=0, duration=1000):
    rng = np.random.default_rng(seed)
    return Events(np.sort(rng.integers(500, 500 + duration, n)), rng.integers(0, 4, n), rng.integers(0, SENSOR[0], n),
                  rng.integers(0, 2, n))  # four columns: many events share a pixel


def by_hand(events, timesteps, by):
    """One event after the other."""
    frames, n = np.zeros((timesteps, 2, *SENSOR), np.int64), len(events.t)
    for i, (t, x, y, p) in enumerate(zip(*map(np.ndarray.tolist, events))):
        if by == 'number':
            frame = timesteps - 1 if n < timesteps else i // (n // timesteps)
        else:
            frame = (t - int(events.t[0])) // max((int(events.t[-1]) - int(events.t[0])) // timesteps, 1)
        frames[min(frame, timesteps - 1), p, y, x] += 1
    return frames


@pytest.mark.parametrize('by', ['number', 'time'])
@pytest.mark.parametrize('n', [0, 1, 3, 4, 40, 403])
def test_frames_are_those_counted_one_by_one(n, by):
    events = random_events(n)
    expected = by_hand(events, 4, by)
    count = to_frames(events, FrameSettings(4, by, 'count'), SENSOR)
    assert np.array_equal(count, expected) and count.sum() == n
    assert np.array_equal(to_frames(events, FrameSettings(4, by), SENSOR), expected > 0)
    assert n < 403 or expected.max() > 1  # repeated events, which a fancy index would drop


@pytest.mark.parametrize('by', ['number', 'time'])
def test_frames_are_spikingjellys(by):
    utils = pytest.importorskip('spikingjelly.datasets.utils', reason='compares with SpikingJelly')
    events = random_events(1003)
    theirs = utils.integrate_events_by_fixed_frames_number(events._asdict(), by, 10, *SENSOR)
    assert np.array_equal(to_frames(events, FrameSettings(10, by, 'count'), SENSOR), theirs)


def test_frames_are_tonics_where_no_event_is_left_over():
    transforms = pytest.importorskip('tonic.transforms', reason='compares with tonic')
    events = random_events(1000)  # tonic drops the rest of N / T
    raw = np.rec.fromarrays(events, names='t,x,y,p')
    theirs = transforms.ToFrame(sensor_size=(SENSOR[1], SENSOR[0], 2), n_event_bins=10)(raw)
    assert np.array_equal(to_frames(events, FrameSettings(10, mode='count'), SENSOR), theirs)


def test_empty_times_give_empty_frames():
    events = Events(np.array([0, 1, 99]), np.zeros(3, int), np.zeros(3, int), np.ones(3, int))
    frames = to_frames(events, FrameSettings(3, 'time', 'count'), (1, 1))
    assert frames[:, 1, 0, 0].tolist() == [2, 0, 1]
    instant = Events(*(np.zeros(5, np.int64) for _ in range(4)))
    assert to_frames(instant, FrameSettings(3, 'time', 'count'), (1, 1))[:, 0, 0, 0].tolist() == [5, 0, 0]


@pytest.mark.parametrize('size', [5, 12, 13, 48])
def test_binary_frames_take_the_nearest_pixel(size):
    frames = to_frames(random_events(60), FrameSettings(3, mode='count'), SENSOR)
    resized = resize_frames(frames, size, 'binary')
    ones = torch.from_numpy(frames > 0).double()
    expected = torch.nn.functional.interpolate(ones, (size, size), mode='nearest-exact')
    assert set(np.unique(resized)) == {0, 1} and np.array_equal(resized, expected)


def test_count_frames_keep_every_event_when_they_shrink():
    frames = to_frames(random_events(500), FrameSettings(3, mode='count'), SENSOR)
    for size in (1, 5, 8, 12):
        expected = np.zeros((3, 2, size, size), int)
        for t, p, y, x in np.ndindex(frames.shape):  # every pixel falls into one cell
            expected[t, p, min(y * size // 12, size - 1), x * size // 16] += frames[t, p, y, x]
        assert np.array_equal(resize_frames(frames, size, 'count'), expected)
    assert np.array_equal(resize_frames(frames[..., :12], 24, 'count'), frames[..., :12].repeat(2, -1).repeat(2, -2))


@pytest.mark.parametrize('kwargs, words', [
    (dict(timesteps=0), 'timesteps=0'), (dict(by='events'), "by='events'.*number, time"),
    (dict(mode='sum'), "mode='sum'"), (dict(size=0), 'size=0'), (dict(axes='x'), "axes='x'")])
def test_settings_are_checked(kwargs, words):
    with pytest.raises(ValueError, match=words):
        FrameSettings(**kwargs)


# ---- augmentation

def test_a_sequence_is_augmented_as_one():
    """A mirrored and rolled frame, the same for all, as numpy makes it; all shifts come up, mirrored half the time."""
    frames = torch.arange(2 * 2 * 8 * 9.).view(2, 2, 8, 9)
    torch.manual_seed(0)
    augment, seen = EventAugment(0.5, 2), Counter()
    candidates = {}
    for flip in (False, True):
        for dy in range(-2, 3):
            for dx in range(-2, 3):
                x = frames.numpy()[..., ::-1] if flip else frames.numpy()
                candidates[np.roll(x, (dy, dx), (2, 3)).tobytes()] = flip, dy, dx
    for _ in range(2000):
        seen[candidates[augment(frames).numpy().tobytes()]] += 1
    assert len(seen) == 50
    assert abs(sum(n for (flip, _, _), n in seen.items() if flip) - 1000) < 100  # 4.5 standard deviations of 22


def test_augmentation_follows_the_seed_and_can_be_off():
    frames, augment = torch.rand(3, 2, 16, 16), EventAugment()
    draws = []
    for _ in range(2):
        torch.manual_seed(7)
        draws.append([augment(frames) for _ in range(5)])
    assert all(map(torch.equal, *draws)) and not torch.equal(draws[0][0], draws[0][1])
    assert torch.equal(EventAugment(0., 0)(frames), frames)
    assert torch.equal(EventAugment(1., 0)(frames), frames.flip(-1))
    for wrong in (dict(hflip=1.5), dict(roll=-1)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            EventAugment(**wrong)


# ---- splits

def test_named_splits():
    targets = np.repeat([0, 1, 2], [20, 30, 25])
    last, first = validation_mask(targets, 'last5'), validation_mask(targets, 'first5')
    assert np.flatnonzero(last).tolist() == [*range(15, 20), *range(45, 50), *range(70, 75)]
    assert np.flatnonzero(first).tolist() == [*range(5), *range(20, 25), *range(50, 55)]
    random = validation_mask(targets, 'random')
    assert np.bincount(targets[random]).tolist() == [2, 3, 2]
    assert np.array_equal(random, validation_mask(targets, 'random0'))
    assert not np.array_equal(random, validation_mask(targets, 'random1'))
    for wrong, words in (('half', 'last100, first100'), ('last', 'last100'), ('last20', 'class 0 has 20 recordings')):
        with pytest.raises(ValueError, match=words):
            validation_mask(targets, wrong)


# ---- the camera

def camera_by_hand(intensity, times, threshold, offset):
    """One pixel after the other, as a sensor works: fire while the level is a threshold away."""
    events = []
    n, height, width = intensity.shape
    for y in range(height):
        for x in range(width):
            reference = np.log(intensity[0, y, x] + offset)
            for i in range(1, n):
                old, new = np.log(intensity[i - 1, y, x] + offset), np.log(intensity[i, y, x] + offset)
                while abs(new - reference) >= threshold[y, x]:
                    p = int(new > reference)
                    reference += threshold[y, x] * (1 if p else -1)
                    t = times[i - 1] + (reference - old) / (new - old) * (times[i] - times[i - 1])
                    events.append((int(np.floor(t)), y, x, p))
    return sorted(events, key=lambda e: e[:3])


def test_camera_fires_as_a_pixel_by_pixel_simulation():
    rng = np.random.default_rng(0)
    intensity, times = rng.random((12, 5, 6)), np.cumsum(rng.integers(50, 99, 12)).astype(float)
    threshold = 0.3 + 0.1 * rng.random((5, 6))
    events = simulate_events(intensity, times, threshold, offset=0.1)
    expected = camera_by_hand(intensity, times, threshold, 0.1)
    assert len(expected) > 300
    assert sorted(zip(*map(np.ndarray.tolist, (events.t, events.y, events.x, events.p)))) == sorted(expected)
    assert (np.diff(events.t) >= 0).all()


def test_camera_on_a_ramp_of_log_intensity():
    """log I rises by 1.05 in 1,050 us and falls by 0.9 in 900: it crosses 0.3, 0.6 and 0.9, then 0.6 and 0.3."""
    levels = np.array([0., 1.05, 0.15])
    events = simulate_events((np.exp(levels) - 0.5)[:, None, None], np.array([0., 1050., 1950.]), 0.3, offset=0.5)
    assert events.p.tolist() == [1, 1, 1, 0, 0]
    assert np.abs(events.t - [300, 600, 900, 1500, 1800]).max() <= 1  # microseconds are rounded down


def test_camera_checks_what_it_sees():
    pictures = np.ones((3, 2, 2))
    assert len(simulate_events(pictures, np.arange(3)).t) == 0  # nothing moves, nothing fires
    for args, words in (((pictures, np.zeros(3)), 'increasing'), ((pictures, np.arange(2)), 'as many'),
                        ((pictures, np.arange(3), 0.), 'threshold'), ((-pictures, np.arange(3)), 'intensity')):
        with pytest.raises(ValueError, match=words):
            simulate_events(*args)
