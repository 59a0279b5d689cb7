"""What timm's data sets need besides their name is said before timm looks for it."""
import pytest

from timm_sscl.data import create_dataset


@pytest.mark.parametrize('name, root, split, error, words', [
    ('torch/cifar10', None, 'train', ValueError, ['--data-dir', '--dataset-download']),
    ('torch/cifar10', 'gone', 'train', FileNotFoundError, ["'gone' does not exist", '--dataset-download']),
    ('torch/cifar10', '', 'validation', ValueError, ['cannot read', '--dataset-download']),  # there, but empty
    ('torch/image_folder', 'gone', 'train', FileNotFoundError, ["'gone' does not exist."]),
    ('wds/mine', None, 'train', ValueError, ['--data-dir', '.tar']),
    ('wds/mine', '', 'train', ValueError, ["split 'train'", '--train-split', '.tar|20000', '_info.json']),
])
def test_what_a_data_set_needs_is_said(name, root, split, error, words, tmp_path):
    root = root if root is None else str(tmp_path / root)
    with pytest.raises(error) as raised:
        create_dataset(name, root, split)
    message = str(raised.value).replace(f'{tmp_path}/', '')
    assert all(word in message for word in words), message
    assert ('--dataset-download' in message) == ('--dataset-download' in words)
