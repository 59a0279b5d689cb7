#!/usr/bin/env python3
"""Pack an image folder of CIFAR-100 into a few small files for benchmarks/compare.py, and read them.

    python benchmarks/cifar_arrays.py CIFAR100 FOLDER           # base-1.npz, base-2.npz: the sets 20x250 and 100x50
    python benchmarks/cifar_arrays.py CIFAR100 FOLDER --all     # more-1.npz, more-2.npz, too: the set 100x500

CIFAR100 holds train/CLASS and validation/CLASS. Images are lossless WebP, 1.8 kB each. Every file is at most 50 MiB, so
that each can be carried to another machine by itself. A set has a file for each of its parts: images to train on, a
tenth held out of training, and validation images. It is there when all files with its images are.
"""
import argparse
import io
from pathlib import Path
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from PIL import Image

from ablation import SPLIT_SEED, class_names, split_class

__all__ = ['ImageSet', 'available_sets', 'load_set', 'write_pack']

PARTS = 'train', 'heldout', 'validation'


class ImageSet(NamedTuple):
    """Images as uint8 (N, H, W, 3) and labels (N,) of a set's parts."""
    classes: int
    parts: Dict[str, Tuple[np.ndarray, np.ndarray]]


# ---- choice of the images

def choose(
        root: Path,
        classes: Optional[int],
        per_class: Optional[int],
        heldout: int,
) -> Dict[str, List[Tuple[str, int]]]:
    """Return (file, label) of a set's parts, as benchmarks/ablation.py chooses its images.

    Args:
        root: Folder with train/CLASS and validation/CLASS.
        classes: Number of evenly spaced classes; None takes all.
        per_class: Training images per class; None takes all.
        heldout: Held-out images per class; with per_class=None they are training images, too.
    """
    parts: Dict[str, List[Tuple[str, int]]] = {part: [] for part in PARTS}
    for label, name in enumerate(class_names(root / 'train', classes)):
        files = [file.name for file in (root / 'train' / name).iterdir()]
        train, _ = split_class(files, False, per_class, SPLIT_SEED)
        held = split_class(files, True, per_class, SPLIT_SEED)[1][:heldout]
        parts['train'] += [(f'train/{name}/{file}', label) for file in train]
        parts['heldout'] += [(f'train/{name}/{file}', label) for file in held]
        images = sorted(file.name for file in (root / 'validation' / name).iterdir())
        parts['validation'] += [(f'validation/{name}/{file}', label) for file in images]
    return parts


SETS: Dict[str, Dict[str, Any]] = {
    '20x250': dict(classes=20, per_class=250, heldout=50),
    '100x50': dict(classes=None, per_class=50, heldout=10),
    '100x500': dict(classes=None, per_class=None, heldout=10),
}


# ---- files

def _encode(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.convert('RGB').save(out, 'webp', lossless=True, exact=True, method=4, quality=75)
    return out.getvalue()


def write_pack(file: Path, images: Iterable[Tuple[str, Image.Image]], sets: Dict[str, Dict[str, Any]]) -> None:
    """Write images by name and descriptions of sets.

    Args:
        file: File to write, .npz.
        images: (name, image).
        sets: {set: {part: [(name, label)]}}. Images may be in other files of the folder.
    """
    names, blobs = [], []
    for name, image in images:
        names.append(name)
        blobs.append(_encode(image))
    arrays: Dict[str, np.ndarray] = dict(
        names=np.array(names), blob=np.frombuffer(b''.join(blobs), dtype=np.uint8),
        offsets=np.cumsum([0, *map(len, blobs)]))
    for name, parts in sets.items():
        for part, rows in parts.items():
            arrays[f'{name}/{part}/names'] = np.array([row[0] for row in rows])
            arrays[f'{name}/{part}/labels'] = np.array([row[1] for row in rows], dtype=np.int64)
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # names are compressed, images are already


def _read(folder: Path) -> Tuple[Dict[str, Tuple[np.ndarray, int, int]], Dict[str, Any]]:
    """Return where every image lies (bytes, begin, end), and the arrays that describe sets."""
    images, described = {}, {}
    files = sorted(folder.glob('*.npz'))
    if not files:
        raise SystemExit(f'{folder} has no .npz file; make them with benchmarks/cifar_arrays.py.')
    for file in files:
        with np.load(file) as arrays:
            blob, offsets = arrays['blob'], arrays['offsets']
            for name, begin, end in zip(arrays['names'].tolist(), offsets[:-1].tolist(), offsets[1:].tolist()):
                images[name] = blob, begin, end
            described.update({key: arrays[key] for key in arrays.files if '/' in key})
    return images, described


def available_sets(folder: Path) -> List[str]:
    """Return the names of the sets in a folder whose images are all there."""
    images, described = _read(folder)
    names: Dict[str, bool] = {}
    for key, values in described.items():
        if key.endswith('/names'):
            name = key.split('/')[0]
            names[name] = names.get(name, True) and all(image in images for image in values.tolist())
    return sorted(name for name, complete in names.items() if complete)


def load_set(folder: Path, name: str) -> ImageSet:
    """Return the images of a set.

    Raises:
        SystemExit: The folder has no such set, or misses some of its images.
    """
    images, described = _read(folder)
    parts = {}
    for part in PARTS:
        if f'{name}/{part}/names' not in described:
            raise SystemExit(f"{folder}: there is no set '{name}'; there are {', '.join(available_sets(folder))}.")
        chosen, labels = described[f'{name}/{part}/names'].tolist(), described[f'{name}/{part}/labels']
        missing = sum(image not in images for image in chosen)
        if missing:
            raise SystemExit(f"{folder}: {missing} of {len(chosen)} {part} images of '{name}' are in a file that is "
                             f'not there.')
        parts[part] = _decode([images[image] for image in chosen]), labels
    return ImageSet(int(max(labels.max() for _, labels in parts.values() if len(labels))) + 1, parts)


def _decode(places: Sequence[Tuple[np.ndarray, int, int]]) -> np.ndarray:
    if not places:
        return np.zeros((0, 0, 0, 3), np.uint8)
    return np.stack([np.asarray(Image.open(io.BytesIO(blob[begin:end].tobytes())).convert('RGB'))
                     for blob, begin, end in places])


# ---- the script

def pack(root: Path, folder: Path, everything: bool) -> None:
    """Write the files of all sets. An image is in the first file that needs it."""
    chosen = {name: choose(root, **options) for name, options in SETS.items()}
    done: set = set()

    def take(*sets: str) -> List[str]:
        names = {name: None for key in sets for rows in chosen[key].values() for name, _ in rows if name not in done}
        done.update(names)
        return list(names)

    packs: List[Tuple[str, List[str], Sequence[str]]] = [
        ('base-1', take('20x250'), ['20x250']), ('base-2', take('100x50'), ['100x50'])]
    if everything:
        rest = take('100x500')
        half = len(rest) // 2
        packs += [('more-1', rest[:half], ['100x500']), ('more-2', rest[half:], [])]
    for name, files, sets in packs:
        file = folder / f'{name}.npz'
        write_pack(file, ((f, Image.open(root / f)) for f in files), {s: chosen[s] for s in sets})
        print(f'{file}: {len(files)} images, {file.stat().st_size / 2 ** 20:.1f} MiB', flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('root', type=Path, metavar='CIFAR100', help='image folder: train/CLASS and validation/CLASS')
    parser.add_argument('folder', type=Path, metavar='FOLDER', help='where the files are written')
    parser.add_argument('--all', action='store_true', help='all training images, for the set 100x500')
    args = parser.parse_args()
    pack(args.root, args.folder, args.all)


if __name__ == '__main__':
    main()
