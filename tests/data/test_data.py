import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from timm.data import create_loader
from timm_sscl.data import DigitsDataset, create_dataset


def test_digits_split_is_fixed_stratified_and_disjoint():
    train, val = DigitsDataset('train'), DigitsDataset('validation')
    assert (len(train), len(val)) == (1437, 360)
    pixels = [{np.asarray(image).tobytes() for image in d.images} for d in (train, val)]
    assert sum(map(len, pixels)) == 1797 and not pixels[0] & pixels[1]  # all scans differ, and none is in both
    assert np.bincount(val.targets).min() >= 34
    assert ([np.asarray(a).tobytes() for a in DigitsDataset('validation').images]
            == [np.asarray(a).tobytes() for a in val.images])


def test_digits_are_the_scans_at_32_by_32():
    image, target = DigitsDataset('train')[0]
    assert image.size == (32, 32) and image.mode == 'RGB'
    small = np.asarray(image.convert('L').resize((8, 8), Image.Resampling.BOX), dtype=float) * 16 / 255
    digits = load_digits()
    closest = np.abs(digits.images - small).mean((1, 2)).argmin()
    # resampling, of 16 levels
    assert digits.target[closest] == target and np.abs(digits.images[closest] - small).mean() < 1


def test_digits_go_through_timms_loader():
    loader = create_loader(
        create_dataset('digits', split='train', num_samples=20), input_size=(3, 32, 32), batch_size=8,
        is_training=True, use_prefetcher=False, num_workers=0, persistent_workers=False)
    images, targets = next(iter(loader))
    assert images.shape == (8, 3, 32, 32) and images.dtype == torch.float32 and targets.dtype == torch.int64


def test_errors_name_the_folder_or_split(tmp_path):
    with pytest.raises(ValueError, match="split 'holdout'"):
        DigitsDataset('holdout')
    with pytest.raises(FileNotFoundError, match='--data-dir'):
        create_dataset('', root=str(tmp_path / 'gone'), split='train')
    with pytest.raises(ValueError, match='is empty'):
        create_dataset('', root=str(tmp_path), split='train')
