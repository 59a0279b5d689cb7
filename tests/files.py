"""Small files of data for a test."""
import struct

import numpy as np
from PIL import Image

HEADER = b'#!AER-DAT2.0\r\n'


def write_images(root, classes=3, per_class=8, size=40):
    rng = np.random.default_rng(0)
    for split in ('train', 'validation'):
        for c in range(classes):
            folder = root / split / f'class{c}'
            folder.mkdir(parents=True)
            for i in range(per_class):
                Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(folder / f'{i}.png')
    return root


def write_aedat(file, seed, n=60):
    rng = np.random.default_rng(seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    address = rng.integers(0, 2 ** 15, n)
    file.write_bytes(HEADER + b''.join(struct.pack('>II', int(a), 10 * i) for i, a in enumerate(address)))


def write_classes(root, per_class=12, names=('airplane', 'bird')):
    for c, name in enumerate(names):
        for i in range(per_class):
            write_aedat(root / name / f'cifar10_{name}_{i}.aedat', seed=100 * c + i)
    return root
