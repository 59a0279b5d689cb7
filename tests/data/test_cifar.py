"""CIFAR's augmentation in timm's training transform: each part against its definition, their order, their errors."""
import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torchvision import transforms

from timm_sscl.data import augment_cifar
from timm_sscl.data.cifar import Cutout

MEAN, STD = (.4, .5, .6), (.2, .25, .3)


def _transform(size=32, **kwargs):
    timms = dict(input_size=(3, size, size), is_training=True, mean=MEAN, std=STD, hflip=0., color_jitter=None)
    timms.update({k: kwargs.pop(k) for k in list(kwargs) if k in ('hflip', 're_prob')})
    return augment_cifar(create_transform(**timms), (size, size), **kwargs)


def _image(size=32):
    return Image.fromarray(np.random.default_rng(0).integers(1, 256, (size, size, 3), dtype=np.uint8))


def _pixels(x):
    """Back to 0 ... 255."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return ((x * std + mean) * 255).round().to(torch.int64)


def test_random_crop_is_a_window_of_the_padded_image():
    torch.manual_seed(0)
    transform, image = _transform(crop_padding=4), _image()
    padded = np.pad(np.asarray(image), ((4, 4), (4, 4), (0, 0))).transpose(2, 0, 1)
    windows = {padded[:, y:y + 32, x:x + 32].tobytes(): (y, x) for y in range(9) for x in range(9)}
    seen = [windows[_pixels(transform(image)).numpy().astype(np.uint8).tobytes()] for _ in range(2000)]
    assert set(seen) == set(windows.values())  # 2000 draws of 81: one is missed with probability 81 exp(-25)


def test_another_size_is_resized_first():
    x = _transform(16, crop_padding=0)(_image())
    resized = np.asarray(transforms.Resize((16, 16))(_image())).transpose(2, 0, 1)
    assert np.array_equal(_pixels(x).numpy(), resized)


def test_cutout_blacks_out_one_square_around_a_pixel():
    torch.manual_seed(0)
    cutout, image = Cutout(16), torch.rand(3, 32, 32) + .1
    kept, centres = image.clone(), set()
    for _ in range(500):
        out = cutout(image)
        erased = (out == 0).all(0)
        assert torch.equal(out == 0, erased.expand(3, -1, -1)) and torch.equal(out[:, ~erased], image[:, ~erased])
        rows, cols = (torch.nonzero(erased.any(axis)).flatten().tolist() for axis in (1, 0))
        assert erased.sum() == len(rows) * len(cols)  # a rectangle
        for line in (rows, cols):
            assert line == list(range(line[0], line[-1] + 1)) and 8 <= len(line) <= 16
            assert len(line) == 16 or line[0] == 0 or line[-1] == 31  # less only at the border
        centres.add((len(rows), len(cols)))
    assert torch.equal(image, kept) and len(centres) > 40
    # a centre at row 0 leaves rows 0 to 7, one at row 31 rows 23 to 31: all 32 are equally likely
    counts = torch.zeros(32)
    for _ in range(2000):
        counts += (Cutout(2)(torch.ones(1, 32, 32))[0] == 0).any(1)
    # rows y-1 and y: every row but the last is hit by two centres of 32; 5 standard deviations of a binomial
    expected = 2000 * torch.tensor([2 / 32] * 31 + [1 / 32])
    assert ((counts - expected).abs() < 5 * expected.sqrt()).all()


def test_cutout_comes_before_the_normalisation():
    torch.manual_seed(0)
    x = _transform(crop_padding=0, cutout=8)(_image())
    black = (_pixels(x) == 0).all(0)
    assert 16 <= black.sum() <= 64
    torch.testing.assert_close(
        x[:, black], -(torch.tensor(MEAN) / torch.tensor(STD)).view(3, 1).expand(-1, black.sum()))


def test_policy_is_torchvisions_in_its_place():
    parts = _transform(crop_padding=4, policy=True, cutout=16, hflip=.5, re_prob=.1).transforms
    assert [type(p).__name__ for p in parts] == [
        'Resize', 'RandomCrop', 'RandomHorizontalFlip', 'AutoAugment', 'MaybeToTensor', 'Cutout', 'Normalize',
        'RandomErasing']
    assert parts[3].policy == transforms.AutoAugmentPolicy.CIFAR10 and parts[3].fill == 128
    policy = transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10, fill=128)
    for seed in range(20):
        torch.manual_seed(seed)
        expected = policy(_image())
        torch.manual_seed(seed)
        assert np.array_equal(np.asarray(parts[3](_image())), np.asarray(expected))


def test_nothing_asked_is_timms_own():
    parts = _transform(hflip=.5).transforms
    assert [type(p).__name__ for p in parts] == [
        'RandomResizedCropAndInterpolation', 'RandomHorizontalFlip', 'MaybeToTensor', 'Normalize']


@pytest.mark.parametrize('kwargs, words', [
    (dict(crop_padding=-1), 'crop_padding=-1'), (dict(cutout=7), 'cutout=7.*even'), (dict(cutout=0), 'cutout=0')])
def test_errors(kwargs, words):
    with pytest.raises(ValueError, match=words):
        _transform(**kwargs)
