"""Image data as it lies about: bit depths, hidden files, folders that are no classes, names of data sets, splits."""
import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from files import write_images
from runs import IMAGES, fails, run_here
from timm_sscl.data import create_dataset
from timm_sscl.data.checks import check_apart, check_classes, check_labels, check_metadata
from timm_sscl.data.folders import take_spread, class_to_idx_of
from timm_sscl.data.images import DecodedStream, to_mode
from timm_sscl.data.samples import Samples, UnreadableSample
from timm_sscl.training.command_line.options import parse_args
from timm_sscl.training.datasets import create_datasets, resolve_num_classes

LEVELS = np.arange(256, dtype=np.uint8).reshape(16, 16)  # as 8 bits; times 257 they are the same grey in 16 bits


def save(image, file):
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)


def reopened(image, format, **kwargs):
    buffer = io.BytesIO()
    image.save(buffer, format, **kwargs)
    return Image.open(buffer)


# ---- bit depth

@pytest.mark.parametrize('mode', ['L', 'RGB'])
@pytest.mark.parametrize('format', ['PNG', 'TIFF', 'PPM'])
def test_16_bits_are_the_grey_of_8_bits(format, mode):
    deep = reopened(Image.fromarray(LEVELS.astype(np.uint16) * 257), format)
    assert deep.mode in ('I;16', 'I') and np.array_equal(to_mode(deep, mode), Image.fromarray(LEVELS).convert(mode))


def test_16_bit_levels_are_rounded_to_the_nearest():
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    found = np.asarray(to_mode(Image.fromarray(levels), 'L'), float)
    assert np.abs(found / 255 - levels / 65535.).max() <= 0.5 / 255 + 1e-9


def test_12_bits_of_a_tiff_and_white_as_zero():
    levels = LEVELS.astype(np.uint16)
    image = Image.fromarray(levels * 16 + levels // 16)
    image.tag_v2 = {258: (12,)}
    assert np.array_equal(to_mode(image, 'L'), LEVELS)
    image.tag_v2[262] = 0
    assert np.array_equal(to_mode(image, 'L'), 255 - LEVELS)


@pytest.mark.parametrize('dtype', [np.float32, np.int32])
def test_32_bits_are_refused_by_name(dtype, tmp_path):
    save(Image.fromarray(LEVELS.astype(dtype)), tmp_path / 'train' / 'a' / '0.tiff')
    with pytest.raises(UnreadableSample, match='a/0.tiff.*8 or 16 bits'):
        Samples(create_dataset('torch/image_folder', str(tmp_path), 'train'), 1, training=False)[0]


@pytest.mark.parametrize('mode, expected', [('1', (LEVELS >= 128) * 255), ('P', LEVELS), ('LA', LEVELS)])
def test_other_modes_keep_their_values(mode, expected):
    grey = Image.fromarray(LEVELS)
    image = grey.point(lambda v: 255 * (v >= 128), '1') if mode == '1' else grey.convert(mode)
    assert image.mode == mode and np.array_equal(to_mode(image, 'L'), expected)


def write_deep(root):
    for split in ('train', 'validation'):
        for c in ('a', 'b'):
            save(Image.fromarray(LEVELS.astype(np.uint16) * 257), root / split / c / '0.png')
    return root


def tar_of(folder, file, prefix=''):
    with tarfile.open(file, 'w') as tar:
        for path in sorted(folder.rglob('*')):
            if path.is_file():
                tar.add(path, prefix + str(path.relative_to(folder)))
    return file


@pytest.mark.parametrize('source', ['folder', 'tar', 'torch/image_folder'])
def test_16_bits_through_every_reader_of_files(source, tmp_path):
    root = write_deep(tmp_path / 'deep')
    if source == 'tar':
        root = tar_of(root / 'train', tmp_path / 'train.tar')
    dataset = create_dataset(source if '/' in source else '', str(root), 'train', input_img_mode='L')
    assert [label for _, label in dataset] == [0, 1]
    for image, _ in dataset:
        assert image.mode == 'L' and np.array_equal(image, LEVELS)
    dataset.transform = lambda image: torch.from_numpy(np.array(image)).float().mean()
    assert dataset[0][0] == 127.5


def test_16_bits_of_a_stream():
    class Reader:
        input_img_mode = 'RGB'
        num_samples = 5

        def __iter__(self):
            assert not self.input_img_mode  # else PIL converts, and clips
            yield Image.fromarray(LEVELS.astype(np.uint16) * 257), 3

        def __len__(self):
            return 1

    stream = DecodedStream(Reader(), 'RGB')
    (image, label), = stream
    assert image.mode == 'RGB' and np.array_equal(np.asarray(image)[..., 1], LEVELS) and label == 3
    assert len(stream) == 1 and stream.num_samples == 5


def test_modes_without_a_scale_are_refused(tmp_path):
    write_deep(tmp_path)
    for mode in ('I', 'F', 'P', 'I;16', 'rgb'):
        with pytest.raises(ValueError, match=f"input_img_mode='{mode}'.*L, RGB.*--input-img-mode"):
            create_dataset('', str(tmp_path), 'train', input_img_mode=mode)
        with pytest.raises(ValueError, match='--input-img-mode'):
            create_dataset('digits', split='train', input_img_mode=mode)


def test_rotation_and_transparency_that_are_ignored_are_said(tmp_path, caplog):
    exif = Image.Exif()
    exif[0x0112] = 6
    grey = Image.fromarray(LEVELS)
    for i in range(3):
        save(grey, tmp_path / 'a' / f'{i}.jpg')
    grey.save(tmp_path / 'a' / '1.jpg', exif=exif)
    check_metadata(create_dataset('', str(tmp_path), ''), 'training')
    assert "training data: 1 of 3 images" in caplog.text and "EXIF rotation" in caplog.text
    assert 'a/1.jpg' in caplog.text and 'have transparency' not in caplog.text
    caplog.clear()
    grey.convert('RGBA').save(tmp_path / 'a' / '3.png')
    check_metadata(create_dataset('', str(tmp_path), ''), 'training')
    assert '1 of 4 images looked at have transparency' in caplog.text
    caplog.clear()
    check_metadata(create_dataset('', str(tmp_path), '', input_img_mode='RGBA'), 'training')
    assert 'have transparency' not in caplog.text


# ---- what is a class

def hide(root, where):
    for split in ('train', 'validation'):
        save(Image.new('RGB', (40, 40), 'white'), root / split / where)


@pytest.mark.parametrize('where', ['.ipynb_checkpoints/0-checkpoint.png', 'class1/.ipynb_checkpoints/0-checkpoint.png',
                                   'class0/._1.png', '__MACOSX/._x.png'])
@pytest.mark.parametrize('source', ['', 'tar', './tar', 'torch/image_folder'])
def test_hidden_images_are_no_class_and_no_sample(source, where, tmp_path, caplog):
    root = write_images(tmp_path / 'images', per_class=2)
    plain = create_dataset('', str(root), 'train')
    hide(root, where)
    name, data = source, root
    if 'tar' in source:
        name, data = '', tar_of(root / 'train', tmp_path / 'train.tar', './' if source[0] == '.' else '')
    dataset = create_dataset(name, str(data), 'train')
    assert [label for _, label in dataset] == [label for _, label in plain] == [0, 0, 1, 1, 2, 2]
    for (ours, _), (theirs, _) in zip(dataset, plain):
        assert np.array_equal(ours, theirs)
    assert resolve_num_classes(parse_args(['--data-dir', 'x'])[0], dataset) == 3
    assert '1 hidden images' in caplog.text and where in caplog.text
    check_labels(dataset, 3, 'training')


def test_data_below_a_hidden_folder_is_data(tmp_path):
    root = write_images(tmp_path / '.cache' / 'images', per_class=1)
    assert len(create_dataset('', str(root), 'train')) == 3


def test_hidden_images_and_a_class_map(tmp_path):
    root = write_images(tmp_path / 'images', per_class=1)
    hide(root, 'class1/._0.png')
    (tmp_path / 'map.txt').write_text('class2\nclass1\nclass0\n')
    dataset = create_dataset('', str(root), 'train', class_map=str(tmp_path / 'map.txt'))
    assert [label for _, label in dataset] == [2, 1, 0]


def test_a_class_map_with_an_empty_line_is_refused(tmp_path):
    root = write_images(tmp_path / 'images', per_class=1)
    (tmp_path / 'map.txt').write_text('class0\nclass1\nclass2\n\n')
    with pytest.raises(ValueError, match='--class-map.*empty name, of class 3'):
        create_dataset('', str(root), 'train', class_map=str(tmp_path / 'map.txt'))


def test_class_of_hidden_images_alone_is_empty(tmp_path):
    root = write_images(tmp_path / 'images', per_class=1)
    hide(root, 'class10/._0.png')
    with pytest.raises(ValueError, match='class10 .*holds no images'):
        check_classes(create_dataset('', str(root), 'train'), create_dataset('', str(root), 'validation'))


@pytest.mark.parametrize('source', ['', 'tar'])
def test_images_beside_the_class_folders_are_refused(source, tmp_path):
    root = write_images(tmp_path / 'images', per_class=1)
    hide(root, 'stray.png')
    data = tar_of(root / 'train', tmp_path / 'train.tar') if source else root
    with pytest.raises(ValueError, match='1 images lie outside the class folders .stray.png.'):
        create_dataset('', str(data), 'train')


def test_classes_of_several_folders_or_inside_others_are_said(tmp_path, caplog):
    for file in ('cats/small/0.png', 'dogs/small/0.png', 'birds/0.png'):
        save(Image.fromarray(LEVELS), tmp_path / file)
    assert len(create_dataset('', str(tmp_path), '').reader.class_to_idx) == 2
    assert "'small' from cats/small, dogs/small" in caplog.text and 'inside' not in caplog.text
    save(Image.fromarray(LEVELS), tmp_path / 'birds/extra/0.png')
    create_dataset('', str(tmp_path), '')
    assert 'Folders inside class folders' in caplog.text and 'birds/extra' in caplog.text


def test_one_class_is_an_error_unless_it_is_meant(tmp_path, monkeypatch, capsys):
    write_images(tmp_path / 'images', classes=1)
    code, line = fails(IMAGES, tmp_path, monkeypatch, capsys)
    assert code == 2 and "one class, 'class0'" in line and '--num-classes 1' in line
    assert not (tmp_path / 'out').exists()
    run_here([*IMAGES, '--num-classes', '1', '--epochs', '1'], tmp_path, monkeypatch)


def test_tars_of_other_classes_are_refused(tmp_path):
    root = write_images(tmp_path / 'images', per_class=1)
    tar_of(root / 'train', tmp_path / 'train.tar')
    (root / 'validation' / 'class1').rename(root / 'validation' / 'other')
    tar_of(root / 'validation', tmp_path / 'val.tar')
    one, other = (create_dataset('', str(tmp_path), f'{split}.tar') for split in ('train', 'val'))
    with pytest.raises(ValueError, match='class1, other differ'):
        check_classes(one, other)
    with pytest.raises(ValueError, match='label 2; with --num-classes 2'):
        check_labels(one, 2, 'training')


# ---- what is a split

def test_one_tar_is_not_both_splits(tmp_path, caplog):
    file = str(tar_of(write_images(tmp_path / 'images', per_class=1) / 'train', tmp_path / 'all.tar'))
    one, other = (create_dataset('', file, split) for split in ('train', 'validation'))
    with pytest.raises(ValueError, match='all.tar.*both the training and the validation data.*--val-split'):
        check_apart(one, other, False)
    args = parse_args(['--data-dir', file])[0]
    with pytest.raises(ValueError, match='all.tar'):
        create_datasets(args)


def test_the_same_split_twice_is_said(tmp_path, caplog):
    root = write_images(tmp_path / 'images', per_class=1)
    create_datasets(parse_args(['--data-dir', str(root), '--val-split', 'train'])[0])
    assert 'accuracies are those on the training images' in caplog.text
    caplog.clear()
    create_datasets(parse_args(['--data-dir', str(root)])[0])
    assert not caplog.text
    (root / 'val').symlink_to(root / 'train')
    with pytest.raises(ValueError, match='both the training and the validation'):
        create_datasets(parse_args(['--data-dir', str(root), '--val-split', 'val'])[0])


@pytest.mark.parametrize('split', ['trian', 'Train', 'holdout', ''])
def test_torchvisions_sets_have_two_splits(split, tmp_path):
    """timm takes the test set for any name but train."""
    with pytest.raises(ValueError, match=f"split '{split}': torch/cifar10 has 'train'"):
        create_dataset('torch/cifar10', str(tmp_path), split)


def test_torchvisions_folder_without_the_split_is_refused(tmp_path):
    root = write_images(tmp_path / 'images', per_class=1)
    with pytest.raises(FileNotFoundError, match="has no split 'holdout'"):
        create_dataset('torch/image_folder', str(root / 'train'), 'holdout')


@pytest.mark.parametrize('source', ['', 'tar', 'torch/image_folder'])
def test_so_many_samples_are_spread_over_the_classes(source, tmp_path):
    root = write_images(tmp_path / 'images', per_class=4)
    whole = create_dataset('', str(root), 'train')
    data = tar_of(root / 'train', tmp_path / 'train.tar') if source == 'tar' else root
    few = create_dataset(source if '/' in source else '', str(data), 'train', num_samples=6)
    assert [label for _, label in few] == [0, 0, 1, 1, 2, 2] and class_to_idx_of(few) == whole.reader.class_to_idx
    for (image, _), at in zip(few, (0, 2, 4, 6, 8, 10)):
        assert np.array_equal(image, whole[at][0])


@pytest.mark.parametrize('name', ['', 'digits', 'events/digits'])
def test_no_samples_are_not_asked_for(name, tmp_path):
    for n in (0, -3):
        with pytest.raises(ValueError, match=f'num_samples={n}.*--train-num-samples'):
            create_dataset(name, str(write_images(tmp_path / f'{n}', per_class=1)), 'train', num_samples=n)


def test_so_many_samples_of_torchvisions_arrays(tmp_path):
    folder = tmp_path / 'MNIST' / 'raw'
    folder.mkdir(parents=True)
    for part in ('train', 't10k'):
        for kind, header, body in (('images-idx3', (2051, 10, 28, 28), np.repeat(np.arange(10), 784)),
                                   ('labels-idx1', (2049, 10), np.arange(10))):
            (folder / f'{part}-{kind}-ubyte').write_bytes(
                np.array(header, '>i4').tobytes() + body.astype(np.uint8).tobytes())
    few = create_dataset('torch/mnist', str(tmp_path), 'train', num_samples=3)
    assert [(int(np.asarray(image).max()), label) for image, label in few] == [(0, 0), (3, 3), (6, 6)]
    with pytest.raises(ValueError, match='list cannot be cut to 3.*--train-num-samples'):
        take_spread([1, 2, 3, 4], 3)


# ---- names

@pytest.mark.parametrize('name, meant', [
    ('my_ds/foo', None), ('trch/cifar10', 'torch/cifar10'), ('torch/cifar', 'torch/cifar10'), ('torch/', 'torch/inat'),
    ('cifar10', 'torch/cifar10'), ('event/digits', 'events/digits'), ('Events/digits', 'events/digits'),
    ('DIGITS', 'digits'), ('tfd/mnist', 'torch/mnist'), ('ImageFolder', 'torch/image_folder'),
    ('hfds/', 'hfds/NAME'), ('events', 'events/digits'), (' ', None)])
def test_unknown_data_set_is_an_error_with_those_there_are(name, meant, tmp_path):
    root = write_images(tmp_path / 'images', per_class=1)
    with pytest.raises(ValueError) as error:
        create_dataset(name, str(root), 'train')
    text = str(error.value)
    assert f"unknown data set '{name}' (--dataset)" in text
    prefixes = 'digits', 'tonic/NAME', 'torch/cifar100', 'hfds/', 'hfids/', 'tfds/', 'wds/'
    assert all(known in text for known in prefixes)
    assert ('did you mean' in text) == (meant is not None) and (meant is None or f"did you mean '{meant}'?" in text)


def test_unknown_data_set_ends_the_script(tmp_path, monkeypatch, capsys):
    write_images(tmp_path / 'images')
    code, line = fails([*IMAGES, '--dataset', 'my_ds/foo'], tmp_path, monkeypatch, capsys)
    assert code == 2 and "'my_ds/foo'" in line and 'torch/' in line and not (tmp_path / 'out').exists()


def test_prefixes_are_read_as_timm_reads_them(tmp_path):
    root = write_images(tmp_path / 'images', per_class=1)
    assert len(create_dataset('Torch/Image_Folder', str(root), 'train')) == 3
    with pytest.raises(FileNotFoundError):
        create_dataset('torch/cifar10', str(tmp_path / 'gone'), 'train')
