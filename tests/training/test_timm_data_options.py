"""Timm's options of the data: what they change in the samples and the loaders."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from timm_options import observes
from tiny_training import loaders_of, parse
from timm_sscl.data import factory
from timm_sscl.training.command_line.options import OptionError
from timm_sscl.random_state import seeded
from timm_sscl.training.datasets import create_datasets, resolve_num_classes


# ---- data

@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """An image folder of three classes in colour, (40, 48) pixels."""
    root, rng = tmp_path_factory.mktemp('images'), np.random.default_rng(0)
    for split, count in (('train', 4), ('validation', 2), ('other', 3)):
        for name in ('ant', 'bee', 'cat'):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                colours = np.kron(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
                Image.fromarray(colours).save(root / split / name / f'{i}.png')
    return root


def folder_args(images, argv=()):
    return parse(['--dataset', '', '--data-dir', images, '--num-classes', 3, '--img-size', 32,
                  '--train-num-samples', 12, *argv])


def samples_of(args, training, indices=(0, 5, 10)):
    datasets = create_datasets(args)
    loaders = loaders_of(args, datasets)[1]()
    dataset = (loaders.train if training else loaders.eval).dataset
    indices = indices if training else (0, 3, 5)
    return [dataset[i][0] for i in indices], [dataset.dataset.filename(i, absolute=True) for i in indices], indices

TRANSFORM = dict(scale=(.08, 1.), ratio=(3 / 4, 4 / 3), hflip=.5, color_jitter=.4, interpolation='random',
                 re_mode='pixel', mean=(.5,) * 3, std=(.5,) * 3)


@pytest.mark.parametrize('argv, base, kwargs', [
    (['--no-aug'], [], dict(no_aug=True, interpolation='bicubic')),
    (['--train-crop-mode', 'rkrc'], [], dict(train_crop_mode='rkrc')),
    (['--scale', '0.5', '0.6'], [], dict(scale=(.5, .6))),
    (['--ratio', '1', '1'], [], dict(ratio=(1., 1.))),
    (['--hflip', '1'], [], dict(hflip=1.)),
    (['--vflip', '1'], [], dict(vflip=1.)),
    (['--color-jitter', '0.9'], [], dict(color_jitter=.9)),
    (['--color-jitter-prob', '0'], [], dict(color_jitter_prob=0.)),
    (['--grayscale-prob', '1'], [], dict(grayscale_prob=1.)),
    (['--gaussian-blur-prob', '1'], [], dict(gaussian_blur_prob=1.)),
    (['--aa', 'rand-m9-mstd0.5'], [], dict(auto_augment='rand-m9-mstd0.5')),
    (['--reprob', '1'], [], dict(re_prob=1.)),
    (['--remode', 'const'], ['--reprob', '1'], dict(re_prob=1., re_mode='const')),
    (['--recount', '3'], ['--reprob', '1'], dict(re_prob=1., re_count=3)),
    (['--train-interpolation', 'nearest'], [], dict(interpolation='nearest')),
    (['--mean', '0.1'], [], dict(mean=(.1,) * 3)),
    (['--std', '0.2', '0.3', '0.4'], [], dict(std=(.2, .3, .4))),
], ids=lambda x: x[0] if isinstance(x, list) and x else '')
@observes('--no-aug', '--train-crop-mode', '--scale', '--ratio', '--hflip', '--vflip', '--color-jitter',
          '--color-jitter-prob', '--grayscale-prob', '--gaussian-blur-prob', '--aa', '--reprob', '--remode',
          '--recount', '--train-interpolation', '--mean', '--std')
def test_training_images_are_those_of_timms_transform(argv, base, kwargs, images):
    found, files, indices = samples_of(folder_args(images, [*base, *argv]), training=True)
    without = samples_of(folder_args(images, base), training=True)[0]
    transform = create_transform((3, 32, 32), is_training=True, **{**TRANSFORM, **kwargs})
    for image, file, index in zip(found, files, indices):
        with seeded((42, 0, index)):
            assert torch.equal(image, transform(Image.open(file).convert('RGB')))
    assert not all(torch.equal(a, b) for a, b in zip(found, without))


@pytest.mark.parametrize('argv, size, kwargs', [
    (['--crop-pct', '0.5'], (3, 32, 32), dict(crop_pct=.5)),
    (['--interpolation', 'nearest'], (3, 32, 32), dict(interpolation='nearest')),
    (['--img-size', '16'], (3, 16, 16), {}),
    (['--input-size', '3', '16', '24'], (3, 16, 24), {}),
    (['--mean', '0.1', '0.2', '0.3'], (3, 32, 32), dict(mean=(.1, .2, .3))),
    (['--std', '0.2'], (3, 32, 32), dict(std=(.2,) * 3)),
], ids=lambda x: x[0] if isinstance(x, list) else '')
@observes('--crop-pct', '--interpolation', '--img-size', '--input-size')
def test_validation_images_are_those_of_timms_transform(argv, size, kwargs, images):
    found, files, _ = samples_of(folder_args(images, argv), training=False)
    without = samples_of(folder_args(images), training=False)[0]
    given = dict(interpolation='bicubic', mean=(.5,) * 3, std=(.5,) * 3, crop_pct=1.)
    transform = create_transform(size, is_training=False, **{**given, **kwargs})
    for image, file, other in zip(found, files, without):
        assert torch.equal(image, transform(Image.open(file).convert('RGB'))) and not torch.equal(image, other)


@pytest.mark.parametrize('argv, key, training, validation', [
    (['--dataset', 'hfds/some'], 'name', 'hfds/some', 'hfds/some'),
    (['--data-dir', 'here'], 'root', 'here', 'here'),
    (['--train-split', 'all'], 'split', 'all', 'validation'),
    (['--val-split', 'test'], 'split', 'train', 'test'),
    (['--train-num-samples', '5'], 'num_samples', 5, 8),
    (['--val-num-samples', '6'], 'num_samples', 8, 6),
    (['--dataset-download'], 'download', True, True),
    (['--class-map', 'map.txt'], 'class_map', 'map.txt', 'map.txt'),
    (['--input-img-mode', 'L'], 'input_img_mode', 'L', 'L'),
    (['--input-key', 'png'], 'input_key', 'png', 'png'),
    (['--target-key', 'label'], 'target_key', 'label', 'label'),
    (['--dataset-trust-remote-code'], 'trust_remote_code', True, True),
    (['--epoch-repeats', '2'], 'repeats', 2., 0),
    (['--seed', '7'], 'seed', 7, 7),
    (['--batch-size', '2'], 'batch_size', 2, 2),
], ids=lambda x: x[0] if isinstance(x, list) else '')
@observes('--dataset', '--data-dir', '--train-split', '--val-split', '--train-num-samples', '--val-num-samples',
          '--dataset-download', '--class-map', '--input-img-mode', '--input-key', '--target-key',
          '--dataset-trust-remote-code', '--epoch-repeats')
def test_data_set_is_asked_of_timm(argv, key, training, validation, monkeypatch):
    def asked(argv):
        calls = []
        monkeypatch.setattr(
            factory, 'create_timm_dataset', lambda name, **kw: calls.append({'name': name, **kw}) or [0])
        create_datasets(parse(['--dataset', 'tfds/other', *argv]))
        return [next(call for call in calls if call['is_training'] is t).get(key) for t in (True, False)]
    assert asked(argv) == [training, validation] != asked([])


def test_data_options_reach_the_samples(images, tmp_path):
    plain = create_datasets(folder_args(images))
    (tmp_path / 'map.txt').write_text('cat\nbee\nant\n')
    turned = create_datasets(folder_args(images, ['--class-map', tmp_path / 'map.txt', '--train-split', 'other']))
    assert [len(d) for d in (*plain, *turned)] == [12, 6, 9, 6]
    assert [plain[1][i][1] for i in range(6)] == [2 - turned[1][i][1] for i in range(6)]
    assert plain[0][0][0].mode == 'RGB'
    for argv in (['--input-img-mode', 'L'], ['--in-chans', 1], ['--input-size', 1, 8, 8]):
        assert create_datasets(folder_args(images, argv))[0][0][0].mode == 'L'
        assert create_datasets(parse(argv))[0][0][0].mode == 'L'  # the digits as well
    assert [len(d) for d in create_datasets(parse(['--train-num-samples', 7, '--val-num-samples', 3]))] == [7, 3]
    with pytest.raises(OptionError, match="--val-split '': every run is validated"):
        parse(['--val-split', ''])


@observes('--num-classes')
def test_number_of_classes(images):
    dataset = create_datasets(folder_args(images))[0]
    assert resolve_num_classes(folder_args(images, ['--num-classes', 5]), dataset) == 5
    assert resolve_num_classes(folder_args(images), dataset) == 3
    with pytest.raises(OptionError, match='--num-classes 2: the data set has 3 classes'):
        resolve_num_classes(folder_args(images, ['--num-classes', 2]), dataset)


@observes('--batch-size', '--validation-batch-size', '--workers', '--pin-mem')
def test_loaders(digits):
    def settings(*argv):
        loaders = loaders_of(parse(argv), digits)[1]()
        return [(x.batch_size, x.num_workers, x.pin_memory) for x in loaders[:2]]
    assert settings() == [(4, 0, False)] * 2
    assert settings('--batch-size', 2) == [(2, 0, False)] * 2
    assert settings('--validation-batch-size', 3) == [(4, 0, False), (3, 0, False)]
    assert settings('--workers', 2) == [(4, 2, False)] * 2
    assert settings('--pin-mem') == [(4, 0, True)] * 2


@observes('--worker-seeding')
def test_workers_seed_numpy_too_unless_told_not_to(digits, monkeypatch):
    monkeypatch.setattr(torch.utils.data, 'get_worker_info', lambda: SimpleNamespace(id=0, seed=5))
    drawn = []
    for seeding in ('all', 'part'):
        loader = loaders_of(parse(['--worker-seeding', seeding]), digits)[1]().train
        np.random.seed(1)
        loader.worker_init_fn(0)
        drawn.append(np.random.rand())
    first = [np.random.RandomState(seed).rand() for seed in (5, 1)]
    assert drawn == first
