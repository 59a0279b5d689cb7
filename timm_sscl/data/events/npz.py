"""Read .npz recordings as SpikingJelly writes them: events or frames."""
import zipfile
import zlib
from typing import Dict, Tuple, Union

import numpy as np

from .recording import DamagedEventFile, Events, read_events

__all__ = ['read_npz']


def read_npz(file: str, sensor_size: Tuple[int, int], ordered: bool = False) -> Union[Events, np.ndarray]:
    """Read the events (arrays t, x, y, p) or the frames (array `frames`) of an .npz file. Nothing is unpickled.

    Args:
        file: File to read.
        sensor_size: (height, width) of the sensor in pixels.
        ordered: Whether to raise if time runs backwards. Frames of equal duration require order.

    Returns:
        Events with int64 arrays, or frames (T, 2, H, W), int64, or bool if they are stored as bool.

    Raises:
        DamagedEventFile: An array is missing or wrong. The message names the file, the array and the event.
    """
    arrays = _load(file)
    return _frames(file, arrays['frames']) if 'frames' in arrays else _events(file, arrays, sensor_size, ordered)


def _load(file: str) -> Dict[str, np.ndarray]:
    try:
        archive = np.load(file, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError('it is one array (.npy)')
        with archive:
            return {name: archive[name] for name in archive.files if name in ('frames', *Events._fields)}
    except FileNotFoundError:
        raise
    # zipfile, zlib and numpy raise these for archives that are cut off, changed or no archives
    except (zipfile.BadZipFile, zlib.error, ValueError, KeyError, EOFError, OSError, NotImplementedError) as error:
        raise DamagedEventFile(f"'{file}' is no .npz file that can be read: {error}") from error


def _events(file: str, arrays: Dict[str, np.ndarray], sensor_size: Tuple[int, int], ordered: bool) -> Events:
    missing = [name for name in Events._fields if name not in arrays]
    if missing:
        raise DamagedEventFile(f"'{file}' holds no array {', '.join(missing)}: events are t, x, y and p, frames are "
                               f"'frames'.")
    try:
        return read_events(arrays, sensor_size, ordered)
    except ValueError as error:
        raise DamagedEventFile(f"'{file}': {error}.") from error


def _frames(file: str, frames: np.ndarray) -> np.ndarray:
    if frames.ndim != 4 or frames.shape[1] != 2 or frames.dtype.kind not in 'iubf':
        raise DamagedEventFile(f"'{file}': frames is {frames.dtype} of shape {frames.shape}; must be numbers "
                               f'(T, 2, H, W).')
    with np.errstate(invalid='ignore'):
        wrong = ~(np.isfinite(frames) & (frames >= 0) & (frames == np.floor(frames))) if frames.dtype.kind == 'f' else \
            frames < 0
    if wrong.any():
        where = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise DamagedEventFile(f"'{file}': frames{list(where)} is {frames[where]}; must be a number of events.")
    # bool frames are kept, since they are not counts
    return frames if frames.dtype.kind == 'b' else frames.astype(np.int64)
