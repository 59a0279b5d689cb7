"""Data sets of a user's own by name: what they are given, and what is refused of what they give."""
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from timm_sscl import list_datasets, register_dataset, unregister_dataset
from timm_sscl.data import create_dataset
from timm_sscl.data.checks import check_differ, check_first, check_labels, check_repeats, known_labels
from timm_sscl.data.copies import find_shared_samples
from timm_sscl.data.events import FrameSettings
from timm_sscl.data.folders import classes_of
from timm_sscl.data.items import FramesCheck, ImageCheck
from timm_sscl.data.manifest import describe_data
from timm_sscl.data.registry import is_own_dataset
from timm_sscl.data.samples import Samples, WrongLabel, WrongSample


class Squares(Dataset):
    """Grey squares whose level is the label."""
    classes = ['black', 'white']

    def __init__(self, root, split, num_samples=None, size=8, fill=255, **ignored):
        self.root, self.split, self.size, self.fill = root, split, size, fill
        self.targets = [i % 2 for i in range(num_samples or 6)]

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return Image.new('RGB', (self.size, self.size), (self.fill * self.targets[index],) * 3), self.targets[index]


def test_the_built_in_ones_are_in_the_same_table():
    assert {'digits', 'events/digits', 'events/cifar10dvs', 'tonic/NAME', 'torch/cifar10'} <= set(list_datasets())
    assert not any(is_own_dataset(name) for name in list_datasets())
    with pytest.raises(ValueError, match="a data set named 'digits' is registered already"):
        register_dataset('digits')(Squares)
    assert len(create_dataset('digits', split='val')) == 360


def test_a_class_is_given_the_arguments_that_it_names_and_its_options():
    register_dataset('own/squares')(Squares)
    data = create_dataset('own/squares', 'folder', 'train', num_samples=4, size=5, seed=3, class_map='unused')
    assert (data.root, data.split, data.size, len(data), data.fill) == ('folder', 'train', 5, 4, 255)
    assert is_own_dataset('own/squares') and 'own/squares' in list_datasets()
    unregister_dataset('own/squares')
    with pytest.raises(ValueError, match="unknown data set 'own/squares' .*--plugin"):
        create_dataset('own/squares')


def test_a_function_is_told_by_name_what_it_asks_for():
    calls = []

    @register_dataset('events/own')
    def own(training, settings, download=None, gain: float = 1.):
        calls.append((training, settings.timesteps, download, gain))
        return [(torch.zeros(3, 2, 4, 4), 0)]

    create_dataset('events/own', split='train', settings=FrameSettings(3), gain=2.)
    create_dataset('events/own', split='val', settings=FrameSettings(3))
    assert calls == [(True, 3, False, 2.), (False, 3, False, 1.)]


def test_a_name_may_stand_for_many():
    @register_dataset('own/NAME')
    def own(name, split):
        return [(name, split)]

    assert create_dataset('own/a/b', split='x')[0] == ('own/a/b', 'x')
    for name in ('own', 'own/'):
        with pytest.raises(ValueError, match='unknown data set'):
            create_dataset(name)


@pytest.mark.parametrize('kwargs, words', [
    (dict(transform=abs), "data set 'own' has no option 'transform'; set it afterwards: dataset.transform = "),
    (dict(sise=3), "data set 'own' has no option 'sise'; it has size. Did you mean 'size'?"),
    (dict(num_samples=3, size=1), 'cannot be cut to 3 samples .*no parameter num_samples'),
    (dict(), "data set 'own' needs the option size .*--dataset-kwargs size="),
    (dict(split='holdout', size=1), "split 'holdout': data set 'own' has 'train' and 'validation'"),
])
def test_wrong_arguments_are_named(kwargs, words):
    register_dataset('own')(lambda root, training, size: [(0, 0)])
    with pytest.raises(ValueError, match=words):
        create_dataset('own', **kwargs)


class _Stream(IterableDataset):
    def __iter__(self):
        return iter(())


@pytest.mark.parametrize('built, words', [
    (None, 'is a NoneType; it must have __len__ and __getitem__'), (_Stream(), 'is a _Stream'), ([], 'no samples')])
def test_what_is_no_numbered_data_set_is_refused(built, words):
    register_dataset('own')(lambda split: built)
    with pytest.raises(ValueError, match=words):
        create_dataset('own')


@pytest.mark.parametrize('name, builder, error, words', [
    ('own', lambda root: [], ValueError, 'no parameter split or training'), ('own', 3, TypeError, '3 is no class'),
    (' ', Squares, ValueError, 'without spaces'), ('', Squares, ValueError, 'must be a text')])
def test_what_cannot_be_registered(name, builder, error, words):
    before = list_datasets()
    with pytest.raises(error, match=words):
        register_dataset(name)(builder)
    assert list_datasets() == before


# ---- what it gives

class Items(Dataset):
    def __init__(self, items, **attributes):
        self.items = items
        vars(self).update(attributes)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


GREY, RGB = Image.new('L', (4, 4)), Image.new('RGB', (4, 4))
FRAMES = torch.zeros(3, 2, 4, 4)


@pytest.mark.parametrize('item, error, words', [
    (RGB, WrongSample, r"'number 0' is a Image, and must be a pair"),
    ((RGB, 0, 1), WrongSample, 'is a tuple of 3'),
    ((GREY, 0), WrongSample, r'has 1 channels \(L\), the model takes 3'),
    ((np.zeros((4, 4, 3), np.uint8), 0), WrongSample, r'is a ndarray of uint8 of shape \(4, 4, 3\) and no PIL image'),
    ((RGB, 2), WrongLabel, 'has the label 2; the model has 2 classes, 0 to 1'),
    ((RGB, -1), WrongLabel, 'has the label -1;'),
    ((RGB, None), WrongLabel, 'has the label None, which is no whole number'),
    ((RGB, 0.5), WrongLabel, r'has the label 0.5 \(float\), which is no whole number'),
    ((RGB, torch.tensor([0., 1.])), WrongLabel, r'\(Tensor\), which is no whole number'),
])
def test_a_wrong_image_or_label_is_refused(item, error, words):
    samples = Samples(Items([item]), 2, training=True, check=ImageCheck(3), max_unreadable=10)
    with pytest.raises(error, match=words):
        samples[0]


@pytest.mark.parametrize('frames', [
    FRAMES[:2], FRAMES[:, :1], FRAMES[..., :3], FRAMES.int(), FRAMES.numpy(), FRAMES[0], 'frames'])
def test_wrong_frames_are_refused(frames):
    check = FramesCheck((3, 2, 4, 4))
    with pytest.raises(WrongSample, match=r'must be a floating point tensor \(T, 2, H, W\) = \(3, 2, 4, 4\)'):
        Samples(Items([(frames, 0)]), 2, training=False, check=check)[0]
    assert Samples(Items([(FRAMES, 1)]), 2, training=False, check=check)[0][1] == 1
    with pytest.raises(WrongSample, match="'number 0' has NaN or infinite values"):
        Samples(Items([(FRAMES / 0, 0)]), 2, training=False, check=check)[0]


@pytest.mark.parametrize('label', [1, np.int64(1), torch.tensor(1), True])
def test_whole_numbers_of_any_type_are_labels(label):
    assert Samples(Items([(RGB, label)]), 2, training=False, check=ImageCheck(3))[0] == (RGB, label)


def test_lists_of_labels_and_classes_are_checked():
    items = [(RGB, 0), (RGB, 1)]
    assert known_labels(Items(items)) is None and known_labels(Items(items, targets=torch.tensor([0, 1]))) == [0, 1]
    assert known_labels(Items(items, samples=[('a', (0, 0, 1, 1), 0), ('b', (0, 0, 1, 1), 1)])) is None
    with pytest.raises(ValueError, match='targets has 3 labels for 2 samples'):
        known_labels(Items(items, targets=[0, 1, 0]))
    with pytest.raises(ValueError, match='targets must be the labels of the samples, whole numbers'):
        known_labels(Items(items, targets=[0., 1.]))
    with pytest.raises(ValueError, match='training data.*has the label 1'):
        check_labels(Items(items, targets=[0, 1]), 1, 'training')
    with pytest.raises(WrongLabel, match='has the label 0 itself, and 1 in the list'):
        check_first(Samples(Items(items, targets=[1, 1]), 2, training=False), 'validation')
    assert classes_of(Items(items, classes=['a', 'b'])) == {'a': 0, 'b': 1} and classes_of(Items(items)) is None
    for wrong in (2, 'ab', ['a', 'a']):
        with pytest.raises(ValueError, match='classes'):
            classes_of(Items(items, classes=wrong))


def test_one_data_set_for_both_splits_is_refused():
    one, other = Squares('', 'train'), Squares('', 'validation', fill=254)
    with pytest.raises(ValueError, match='Squares gives the same samples for training and validation.*split'):
        check_differ(one, Squares('', 'validation'))
    check_differ(one, other)
    with pytest.raises(ValueError, match='all 4 validation samples'):  # of another number
        check_differ(one, Squares('', 'validation', num_samples=4))


class Noise(Dataset):
    """Different images, the same for the same key."""

    def __init__(self, keys):
        self.keys = list(keys)

    def __len__(self):
        return len(self.keys)

    def __getitem__(self, index):
        key = self.keys[index]
        if key is None:
            raise OSError('unreadable')
        return Image.fromarray(np.random.default_rng(key).integers(0, 256, (4, 4, 3), np.uint8)), key % 2


@pytest.mark.parametrize('train, val', [
    (range(48), range(16)), (range(48), range(40, 48)), (range(16), range(48)[:16][::-1]), (range(9, 50), [20]),
    (range(1500), range(16)), (range(1500), range(1480, 1500)), (range(0, 3000, 2), range(0, 3000, 200))])
def test_validation_that_is_a_part_of_training_is_refused(train, val, caplog):
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match='Noise gives the same samples for training and validation'):
        check_differ(Noise(train), Noise(val))
    check_differ(Noise(train), Noise(val), same_split=True)
    assert 'validation samples that were looked up are among the training' in caplog.text
    assert torch.equal(torch.get_rng_state(), state)


def test_a_shared_part_is_said_and_what_differs_is_not(caplog):
    check_differ(Noise(range(100)), Noise(range(100, 150)))
    check_differ(Noise([0, 1, None]), Noise([None, 2]))  # what cannot be read is no copy
    assert not caplog.text
    check_differ(Noise(range(20)), Noise([25, 26, 7, None]))
    assert "1 of 3 validation samples" in caplog.text
    assert "validation sample 'number 2' is training sample 'number 7'" in caplog.text


def test_items_are_compared_as_they_are():
    image, frames = Image.new('RGB', (4, 4), (1, 2, 3)), torch.rand(2, 2, 4, 4)
    train = Items([(image, 0), (frames, 1), (np.ones(3), np.int64(2))])
    same = [(image.copy(), np.int64(0)), (frames.clone(), torch.tensor(1)), (np.ones(3), 2)]
    other = [(image, 1), (frames + 1, 1), (frames.double(), 1), (frames.flatten(), 1), (np.ones((3, 1)), 2),
             (image.convert('L'), 0)]
    assert find_shared_samples(Items([*same, *other]), train) == ([(0, 0), (1, 1), (2, 2)], 9)


def test_random_images_cannot_be_cached():
    class RandomNoise(Squares):
        def __getitem__(self, index):
            return Image.fromarray(np.random.randint(0, 256, (4, 4, 3), np.uint8)), 0

    check_repeats(Samples(Squares('', 'train'), 2, training=True))
    with pytest.raises(ValueError, match='--teacher-cache: images must be the same in every epoch'):
        check_repeats(Samples(RandomNoise('', 'train'), 2, training=True))


def test_a_data_set_without_files_is_described_by_its_labels():
    data, other = Squares('', 'train'), Squares('', 'train')
    other.targets = other.targets[::-1]
    found = describe_data(data)
    assert found['classes'] == {'black': 0, 'white': 1} and found['samples'] == 6 and found['files'] is None
    assert found['labels'] != describe_data(other)['labels'] and found == describe_data(Squares('', 'train'))
