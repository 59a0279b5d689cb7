"""Read AEDAT 2.0, the format of the original CIFAR10-DVS."""
import re

import numpy as np

from .recording import DamagedEventFile, Events, find_invalid, unwrap_times

__all__ = ['read_aedat', 'AXES', 'DVS128_SIZE']

AXES = 'spikingjelly', 'tonic'
DVS128_SIZE = 128, 128  # (height, width)

_LINE = re.compile(rb'#[\t\x20-\x7e]*\r?\n')
_VERSION = re.compile(rb'#!AER-DAT([0-9.]*)')
_EVENT = np.dtype([('address', '>u4'), ('t', '>u4')])
_EXTERNAL = 0x8000  # bit 15 of the address: a synchronisation pulse, not a pixel


def read_aedat(file: str, axes: str = 'spikingjelly', ordered: bool = False) -> Events:
    """Read a recording of a DVS128 (128 x 128 pixels) in AEDAT 2.0.

    The file has header lines (printable ASCII, '#' first, newline last), then pairs of big-endian uint32: address and
    time in microseconds. Bit 0 of the address is the polarity, bits 1-7 and 8-14 are the coordinates. Pulses of the
    camera's synchronisation input (bit 15) are left out. Times that wrap around at 2^32 are continued.

    Readers disagree about the axes:

        spikingjelly: x = 127 - bits 8-14, y = 127 - bits 1-7, p = 1 - bit 0; as in SpikingJelly's .npz files.
        tonic: x = bits 8-14, y = bits 1-7, p = bit 0; the same picture rotated by 180 degrees, polarities swapped.

    Args:
        file: File to read.
        axes: 'spikingjelly' or 'tonic'.
        ordered: Whether to raise if time runs backwards. Frames of equal duration require order.

    Returns:
        Events with int64 arrays; empty for a recording without events.

    Raises:
        DamagedEventFile: The file is not AEDAT 2.0. The message names the file and the byte of the first invalid event.
        ValueError: axes is unknown.
    """
    if axes not in AXES:
        raise ValueError(f"axes='{axes}': must be one of {', '.join(AXES)}.")
    with open(file, 'rb') as f:
        data = f.read()
    start = _header_end(file, data)
    end = start + (len(data) - start) // _EVENT.itemsize * _EVENT.itemsize
    if end != len(data):
        raise DamagedEventFile(f"'{file}' is cut off in the event at byte {end}: {len(data) - end} of 8 bytes are "
                               f'there.')
    raw = np.frombuffer(data, _EVENT, offset=start)
    address = raw['address'].astype(np.int64)
    pixel = (address & _EXTERNAL) == 0
    if (address > 0xffff).any():
        i = int((address > 0xffff).argmax())
        raise DamagedEventFile(f"'{file}', byte {start + 8 * i}: address {address[i]:#010x} is outside a sensor of "
                               f'128 x 128 pixels.')
    events = _decode(address[pixel], unwrap_times(raw['t'])[pixel], axes)
    wrong = find_invalid(events, DVS128_SIZE, ordered)
    if wrong is not None:
        raise DamagedEventFile(f"'{file}', byte {start + 8 * int(np.flatnonzero(pixel)[wrong[0]])}: {wrong[1]}.")
    return events


def _header_end(file: str, data: bytes) -> int:
    """Return the position of the first event.

    Event data may start with '#', too, but is not a line of printable ASCII.
    """
    if not data:
        raise DamagedEventFile(f"'{file}' is empty: byte 0 should begin the header of an AEDAT file.")
    end = 0
    while line := _LINE.match(data, end):
        version = _VERSION.match(line[0])
        if version and not version[1].startswith(b'2'):
            raise DamagedEventFile(f"'{file}', byte {end}: AEDAT {version[1].decode()}; this reads AEDAT 2.0.")
        end = line.end()
    return end


def _decode(address: np.ndarray, t: np.ndarray, axes: str) -> Events:
    x, y, p = (address >> 8) & 127, (address >> 1) & 127, address & 1
    return Events(t, x, y, p) if axes == 'tonic' else Events(t, 127 - x, 127 - y, 1 - p)
