"""Readers of event files, on bytes written here, beside SpikingJelly's and tonic's readers."""
import io
import struct
import zipfile

import numpy as np
import pytest

from timm_sscl.data.events import DamagedEventFile, Events, read_aedat, read_npz

HEADER = b'#!AER-DAT2.0\r\n# This is a raw AE data file - do not edit\r\n# Timestamps tick is 1 us\r\n'
# (x bits 8-14, y bits 1-7, polarity bit 0, time): corners, an inside pixel, one twice
PIXELS = [(0, 0, 0, 5), (127, 0, 1, 9), (0, 127, 0, 9), (127, 127, 1, 700), (17, 90, 1, 701), (17, 90, 1, 2 ** 31 + 3)]


def pack(pixels):
    return b''.join(struct.pack('>II', x << 8 | y << 1 | p, t) for x, y, p, t in pixels)


def write(folder, data, name='a.aedat'):
    file = folder / name
    file.write_bytes(data)
    return str(file)


def with_a_byte_changed(data, rng, n=300):
    for _ in range(n):
        changed = bytearray(data)
        changed[rng.integers(len(data))] = rng.integers(256)
        yield bytes(changed)


def test_aedat_plain_axes_are_the_bits_of_the_address(tmp_path):
    events = read_aedat(write(tmp_path, HEADER + pack(PIXELS)), axes='tonic')
    assert [tuple(map(int, e)) for e in zip(events.x, events.y, events.p, events.t)] == PIXELS


def test_aedat_default_axes_are_mirrored_and_polarity_is_inverted(tmp_path):
    events = read_aedat(write(tmp_path, HEADER + pack(PIXELS)))
    expected = [(127 - x, 127 - y, 1 - p, t) for x, y, p, t in PIXELS]
    assert [tuple(map(int, e)) for e in zip(events.x, events.y, events.p, events.t)] == expected


def random_pixels(n=500):
    rng = np.random.default_rng(0)
    values = np.stack([rng.integers(0, 128, n), rng.integers(0, 128, n), rng.integers(0, 2, n),
                       np.sort(rng.integers(0, 2 ** 32 - 1, n))], 1)
    return [tuple(map(int, row)) for row in values]


def test_default_axes_are_spikingjellys(tmp_path):
    cifar10_dvs = pytest.importorskip('spikingjelly.datasets.cifar10_dvs', reason='compares with SpikingJelly')
    file = write(tmp_path, HEADER + pack(random_pixels()))
    theirs, ours = cifar10_dvs._load_origin_data(file), read_aedat(file)
    for name in Events._fields:
        assert np.array_equal(theirs[name].astype(np.int64), getattr(ours, name)), name


def test_tonic_axes_are_tonics(tmp_path, monkeypatch):
    tonic_io = pytest.importorskip('tonic.io', reason='compares with tonic')
    header = tonic_io.read_aedat_header_from_file  # in tonic 1.7 it returns a time as well, on which its reader fails
    monkeypatch.setattr(tonic_io, 'read_aedat_header_from_file', lambda file: header(file)[:2])
    file = write(tmp_path, HEADER + pack(random_pixels()))
    (_, theirs), ours = tonic_io.read_dvs_128(file), read_aedat(file, axes='tonic')
    for name in Events._fields:
        assert np.array_equal(theirs[name].astype(np.int64), getattr(ours, name)), name


@pytest.mark.parametrize('header', [
    b'', b'#!AER-DAT2.0\n', HEADER, HEADER + b'#\r\n', HEADER + b'# tab\there\r\n#End Of ASCII Header\r\n'])
def test_header_is_lines_of_printable_text(header, tmp_path):
    events = read_aedat(write(tmp_path, header + pack(PIXELS)), axes='tonic')
    assert events.x.tolist() == [x for x, _, _, _ in PIXELS]


@pytest.mark.parametrize('first', [b'#\x80', b'#a', b'##'])
def test_events_that_begin_with_a_hash_are_no_header(first, tmp_path):
    """An address of 0x23...: outside the sensor, and found where it stands, though a newline follows later."""
    data = first.ljust(4, b'\x01') + struct.pack('>I', 3) + pack(PIXELS) + b'\x00\x00\x00\n' + struct.pack('>I', 9)
    with pytest.raises(DamagedEventFile, match=rf'byte {len(HEADER)}: address 0x23'):
        read_aedat(write(tmp_path, HEADER + data))


def test_time_goes_on_where_32_bits_end(tmp_path):
    pixels = [(1, 2, 0, t) for t in (2 ** 32 - 10, 2 ** 32 - 1, 4, 5, 3 * 2 ** 30, 2 ** 32 - 1, 0)]
    events = read_aedat(write(tmp_path, HEADER + pack(pixels)), ordered=True)
    assert events.t.tolist() == [2 ** 32 - 10, 2 ** 32 - 1, 2 ** 32 + 4, 2 ** 32 + 5, 7 * 2 ** 30, 2 ** 33 - 1, 2 ** 33]


def test_synchronisation_pulses_are_no_pixels(tmp_path):
    data = pack(PIXELS[:2]) + struct.pack('>II', 0x8000, 10) + pack(PIXELS[2:])
    events = read_aedat(write(tmp_path, HEADER + data), axes='tonic')
    assert events.t.tolist() == [t for _, _, _, t in PIXELS]


@pytest.mark.parametrize('data', [HEADER, b'#!AER-DAT2.0\r\n'])
def test_recording_without_events_is_empty(data, tmp_path):
    assert all(len(a) == 0 for a in read_aedat(write(tmp_path, data), ordered=True))


@pytest.mark.parametrize('data, words', [
    (b'', 'is empty: byte 0'),
    (HEADER + pack(PIXELS)[:-1], rf'cut off in the event at byte {len(HEADER) + 40}: 7 of 8'),
    (HEADER + b'\x00', rf'at byte {len(HEADER)}: 1 of 8'),
    (HEADER[:-2], 'byte|cut off'),  # inside the header
    (HEADER + pack(PIXELS[:3]) + struct.pack('>II', 0x10002, 8), rf'byte {len(HEADER) + 24}: address 0x00010002'),
    (b'#!AER-DAT3.1\r\n' + pack(PIXELS), 'byte 0: AEDAT 3.1'),
    (b'PK\x03\x04' + bytes(60), 'byte 0: address 0x504b0304'),
])
def test_damaged_aedat_is_named_with_the_byte(data, words, tmp_path):
    with pytest.raises(DamagedEventFile, match=words) as error:
        read_aedat(write(tmp_path, data, 'cifar10_cat_7.aedat'))
    assert 'cifar10_cat_7.aedat' in str(error.value) and isinstance(error.value, OSError)


def test_time_that_runs_backwards_is_damage_where_order_matters(tmp_path):
    file = write(tmp_path, HEADER + struct.pack('>II', 0x8000, 1) + pack([(1, 1, 0, 50), (2, 2, 0, 49)]))
    assert read_aedat(file).t.tolist() == [50, 49]
    with pytest.raises(DamagedEventFile, match=rf'byte {len(HEADER) + 16}: time runs backwards, from 50 to 49'):
        read_aedat(file, ordered=True)


def test_no_damage_raises_anything_else(tmp_path):
    """Every cut and 300 changed bytes of a file: events, or the error that names the file."""
    data, rng = HEADER + pack(PIXELS), np.random.default_rng(1)
    variants = [*(data[:i] for i in range(len(data))), *with_a_byte_changed(data, rng)]
    damaged = 0
    for variant in variants:
        try:
            read_aedat(write(tmp_path, variant), ordered=True)
        except DamagedEventFile as error:
            damaged += 1
            assert 'a.aedat' in str(error) and 'byte' in str(error)
    assert 100 < damaged < len(variants)


def test_unknown_axes_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="axes='matlab'.*spikingjelly, tonic"):
        read_aedat(write(tmp_path, HEADER), axes='matlab')


# ---- .npz

EVENTS = dict(t=np.array([3, 4, 9], '>u4'), x=np.array([0, 127, 5]), y=np.array([127, 0, 5], np.int16),
              p=np.array([True, False, True]))


def write_npz(folder, name='a.npz', **arrays):
    np.savez(folder / name, **arrays)
    return str(folder / name)


def test_npz_events(tmp_path):
    events = read_npz(write_npz(tmp_path, **EVENTS), (128, 128))
    assert all(np.array_equal(getattr(events, k), v) for k, v in EVENTS.items())
    assert all(a.dtype == np.int64 for a in events)
    empty = read_npz(write_npz(tmp_path, **{k: v[:0] for k, v in EVENTS.items()}), (128, 128), ordered=True)
    assert all(len(a) == 0 for a in empty)


def test_npz_that_spikingjelly_makes_of_an_aedat_file(tmp_path):
    cifar10_dvs = pytest.importorskip('spikingjelly.datasets.cifar10_dvs', reason='compares with SpikingJelly')
    file = write(tmp_path, HEADER + pack(random_pixels()))
    cifar10_dvs._read_aedat_save_to_np(file, str(tmp_path / 'b.npz'))
    for ours, theirs in zip(read_aedat(file), read_npz(str(tmp_path / 'b.npz'), (128, 128))):
        assert np.array_equal(ours, theirs)


def test_npz_frames(tmp_path):
    frames = np.random.default_rng(0).integers(0, 5, (4, 2, 6, 6)).astype(np.float32)
    assert np.array_equal(read_npz(write_npz(tmp_path, frames=frames), (128, 128)), frames)


@pytest.mark.parametrize('arrays, words', [
    ({k: v for k, v in EVENTS.items() if k != 'p'}, 'holds no array p'),
    (dict(EVENTS, x=EVENTS['x'][:2]), r'x is int64 of shape \(2,\)'),
    (dict(EVENTS, x=EVENTS['x'] / 2), 'x is float64'),
    (dict(EVENTS, t=np.int64(3)), r't is int64 of shape \(\)'),
    (dict(EVENTS, y=np.array([0, 1, 128])), 'event 2: x=5, y=128 is outside the sensor'),
    (dict(EVENTS, x=np.array([0, -1, 3])), 'event 1: x=-1'),
    (dict(EVENTS, p=np.array([0, 1, -1])), 'event 2: polarity -1'),
    (dict(EVENTS, t=np.array([3, 9, 4])), 'event 2: time runs backwards, from 9 to 4'),
    (dict(EVENTS, t=np.array([{}, 1, 2], object)), 'no .npz file that can be read'),
    (dict(frames=np.zeros((4, 3, 6, 6))), r'frames is float64 of shape \(4, 3, 6, 6\)'),
    (dict(frames=np.zeros((6, 6))), r'shape \(6, 6\)'),
    (dict(frames=np.full((1, 2, 2, 2), np.nan)), r'frames\[0, 0, 0, 0\] is nan'),
    (dict(frames=np.full((1, 2, 2, 2), .5)), r'is 0.5; must be a number of events'),
    (dict(frames=-np.eye(4, dtype=int).reshape(2, 2, 2, 2)), r'frames\[0, 0, 0, 0\] is -1'),
])
def test_wrong_npz_is_named(arrays, words, tmp_path):
    with pytest.raises(DamagedEventFile, match=words) as error:
        read_npz(write_npz(tmp_path, 'cifar10_dog_3.npz', **arrays), (128, 128), ordered=True)
    assert 'cifar10_dog_3.npz' in str(error.value)


def npy_bytes():
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


@pytest.mark.parametrize('data', [b'', b'no archive', npy_bytes(), b'PK\x03\x04' + bytes(100)])
def test_other_files_named_npz_are_damage(data, tmp_path):
    with pytest.raises(DamagedEventFile, match='a.npz.*no .npz file'):
        read_npz(write(tmp_path, data, 'a.npz'), (128, 128))


@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
def test_no_npz_damage_raises_anything_else(save, tmp_path):
    """Cuts, and changed bytes: events, or the error that names the file."""
    rng, buffer = np.random.default_rng(2), io.BytesIO()
    n = 50
    save(buffer, t=np.arange(n), x=rng.integers(0, 9, n), y=rng.integers(0, 9, n), p=rng.integers(0, 2, n))
    data = buffer.getvalue()
    assert zipfile.is_zipfile(io.BytesIO(data))
    variants = [*(data[:i] for i in range(0, len(data), 23)), *with_a_byte_changed(data, rng)]
    damaged = 0
    for variant in variants:
        try:
            read_npz(write(tmp_path, variant, 'a.npz'), (128, 128))
        except DamagedEventFile as error:
            damaged += 1
            assert 'a.npz' in str(error)
    assert 30 < damaged


def test_file_that_is_gone_says_so(tmp_path):
    for read in (lambda f: read_npz(f, (128, 128)), read_aedat):
        with pytest.raises(FileNotFoundError, match='gone'):
            read(str(tmp_path / 'gone'))
