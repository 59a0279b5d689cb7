"""Check that a folder derived from other recordings (event frames, events converted to .npz) is complete."""
import logging
import os
import re
from typing import Dict, List

__all__ = ['check_whole', 'class_folders', 'FRAMES_FOLDER', 'EXTENSIONS']

_logger = logging.getLogger(__name__)

EXTENSIONS = '.aedat', '.npz'
FRAMES_FOLDER = re.compile(r'frames_number_([0-9]+)_split_by_(number|time)')
# SpikingJelly's folders; each is made from the previous one, and frames from the last
_SOURCES = 'extract', 'events_np'
_UNFINISHED = '.tmp', '.temp', '.part', '.partial', '.crdownload', '.download', '.incomplete'


def class_folders(root: str) -> Dict[str, List[str]]:
    """Return the recordings of every class, both sorted: classes by name, recordings with numbers by value."""
    names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith('.'))
    return {name: _recordings(os.path.join(root, name)) for name in names}


def _recordings(folder: str) -> List[str]:
    files = [entry.name for entry in os.scandir(folder) if not entry.name.startswith('.') and entry.is_file()]
    return sorted((f for f in files if f.lower().endswith(EXTENSIONS)), key=_natural)


def _natural(name: str) -> tuple:
    """Sort key in which runs of digits count by their value."""
    return tuple((int(part), '') if part.isdigit() else (-1, part) for part in re.split(r'([0-9]+)', name))


def check_whole(root: str, recordings: Dict[str, List[str]]) -> None:
    """Check that the writing of a folder was not cut off.

    Found are files that are still being written, and recordings that a folder in SpikingJelly's layout lacks of the
    source folder beside it. Without a source folder, missing recordings cannot be found; unequal class sizes are then
    logged.

    Args:
        root: The folder.
        recordings: Its recordings by class.

    Raises:
        ValueError: The folder is incomplete.
    """
    for folder in (root, *(os.path.join(root, name) for name in recordings)):
        unfinished = sorted(entry.name for entry in os.scandir(folder) if entry.name.lower().endswith(_UNFINISHED))
        if unfinished:
            raise ValueError(f"'{os.path.join(folder, unfinished[0])}' is the name of a file that is still being "
                             f'written: wait for it, or make the folder anew; if it is left over, remove it.')
    sources = _sources(root)
    for source in sources:
        _check_against(root, recordings, source)
    counts = [len(files) for files in recordings.values()]
    made = any(file.lower().endswith('.npz') for files in recordings.values() for file in files)
    if made and not sources and min(counts) < max(counts):
        smallest = min(recordings, key=lambda name: len(recordings[name]))
        _logger.warning(f"'{root}': classes hold {min(counts)} ({smallest}) to {max(counts)} recordings. Nothing there "
                        f'tells whether all were written: if the making of this folder was cut off, make it anew.')


def _sources(root: str) -> List[str]:
    """Return the existing folders beside root from which SpikingJelly made root."""
    parent, name = os.path.split(os.path.abspath(root))
    ranks = len(_SOURCES) if FRAMES_FOLDER.fullmatch(name) else _SOURCES.index(name) if name in _SOURCES else 0
    folders = [os.path.join(parent, source) for source in _SOURCES[:ranks]]
    return [folder for folder in folders if os.path.isdir(folder) and any(class_folders(folder).values())]


def _check_against(root: str, recordings: Dict[str, List[str]], source: str) -> None:
    """Raise ValueError if root lacks recordings of its source folder; log recordings that only root has."""
    made = {(name, os.path.splitext(f)[0]) for name, files in recordings.items() for f in files}
    wanted = {(name, os.path.splitext(f)[0]) for name, files in class_folders(source).items() for f in files}
    missing = sorted(wanted - made)
    if missing:
        raise ValueError(f"'{root}' holds {len(wanted & made)} of the {len(wanted)} recordings in '{source}', of which "
                         f"it was made ('{os.path.join(*missing[0])}' is not there): its making was cut off. Make it "
                         f'anew, or remove it: then the recordings themselves are read.')
    if made - wanted:
        _logger.warning(f"'{root}' holds {len(made - wanted)} recordings ('{os.path.join(*min(made - wanted))}') that "
                        f"'{source}', of which it was made, does not.")
