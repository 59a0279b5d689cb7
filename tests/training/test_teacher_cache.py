import os

import pytest
import timm
import torch

from runs import TINY, rows_of, run_here
from timm_sscl import SSCLTask
from timm_sscl.training.saving.checkpoint import StorageError
from timm_sscl.training.teachers.teacher_cache import TeacherCache


def teacher_says(batch, calls):
    def teach():
        calls.append(len(batch))
        x = torch.as_tensor(batch, dtype=torch.float32)
        return x[:, None] * torch.ones(3), [
            x[None, :, None, None] * torch.ones(1, 1, 2, 4), x[None, :, None].bfloat16()]
    return teach


def equal(a, b):
    return torch.equal(a[0], b[0]) and len(a[1]) == len(b[1]) and all(
        torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(a[1], b[1]))


def test_asks_once_for_a_sample_and_gives_the_same_again(tmp_path):
    cache, calls = TeacherCache(tmp_path, 6), []
    cache.open(teacher_says([0], [])())
    for batch in ([0, 3], [5, 1], [1, 0], [3, 5, 0], [3, 2], [2]):
        index = torch.tensor(batch)
        assert equal(cache(index, teacher_says(batch, calls)), teacher_says(batch, [])())
    assert calls == [2, 2, 2]  # [3, 2] holds a sample that is new; [2] is known then
    other = TeacherCache(tmp_path, 6, create=False)  # another process of this machine
    other.open(teacher_says([0], [])())
    assert equal(other(torch.tensor([5]), teacher_says([5], calls)), teacher_says([5], [])()) and len(calls) == 3
    again = TeacherCache(tmp_path, 6)  # a run that starts again trusts nothing
    again.open(teacher_says([0], [])())
    again(torch.tensor([5]), teacher_says([5], calls))
    assert len(calls) == 4


def test_disk_without_room_is_an_error(tmp_path):
    with pytest.raises(StorageError, match='--teacher-cache needs .* GiB'):
        TeacherCache(tmp_path, 10 ** 13).open(teacher_says([0], [])())


def other_teacher_says():
    return torch.ones(1, 3), [torch.ones(1, 1, 2, 5)]  # features of another width


def test_file_that_is_not_whole_or_of_another_run_is_refused(tmp_path):
    taught = teacher_says([0], [])()
    with pytest.raises(StorageError, match='is not the cache of this run'):
        TeacherCache(tmp_path, 6, create=False).open(taught)  # none yet; it must not be made empty
    assert not list(tmp_path.iterdir())
    TeacherCache(tmp_path, 6).open(taught)
    for samples, says in ((7, taught), (6, other_teacher_says())):
        with pytest.raises(StorageError, match='is not the cache of this run'):
            TeacherCache(tmp_path, samples, create=False).open(says)
    TeacherCache(tmp_path, 6, create=False).open(taught)
    file = tmp_path / TeacherCache.FILE
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(StorageError, match='is not the cache of this run'):
        TeacherCache(tmp_path, 6, create=False).open(taught)
    assert file.stat().st_size % 16  # nor mended


@pytest.mark.skipif(not hasattr(os, 'posix_fallocate'), reason='reserves blocks')
def test_a_disk_that_is_full_leaves_no_file(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, 'No space left on device')

    TeacherCache(tmp_path, 6).open(teacher_says([0], [])())
    monkeypatch.setattr('os.posix_fallocate', full)
    with pytest.raises(StorageError, match='No space left'):
        TeacherCache(tmp_path, 6).open(teacher_says([0], [])())
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, 'posix_fallocate'), reason='reserves blocks')
def test_the_file_has_all_its_blocks_at_once(tmp_path, monkeypatch):
    """Else a disk that fills up later kills the process (SIGBUS) where it writes to the map."""
    reserve, reserved = os.posix_fallocate, []
    monkeypatch.setattr('os.posix_fallocate', lambda f, *span: reserved.append(span) or reserve(f, *span))
    TeacherCache(tmp_path, 50_000).open(teacher_says([0], [])())
    assert reserved == [(0, (tmp_path / TeacherCache.FILE).stat().st_size)] and reserved[0][1] > 1_000_000


def test_task_takes_what_the_teacher_said_before():
    torch.manual_seed(0)
    task = SSCLTask(timm.create_model('spiking_test_resnet', num_classes=3, timesteps=2),
                    timm.create_model('test_resnet', num_classes=3), losses={'sscl': 0.1, 'kd': 1.}, verbose=False)
    x, y = torch.randn(6, 3, 32, 32), torch.arange(6) % 3
    task.eval()
    taught = task.teach(x)
    task.teacher.forward_intermediates = None  # must not be asked
    assert torch.isfinite(task(x, y, taught)['loss'])


def test_a_run_with_the_cache_is_the_run_without(tmp_path, monkeypatch):
    common = [*TINY, '--output', 'out', '--no-aug', '--loss', 'sscl=0.1,kd=1', '--teacher-epochs', '1']
    run_here([*common, '--experiment', 'asked'], tmp_path, monkeypatch)
    run_here([*common, '--experiment', 'cached', '--teacher-cache', '--workers', '1'], tmp_path, monkeypatch)
    asked, cached = (rows_of(tmp_path / 'out' / name) for name in ('asked', 'cached'))
    assert len(asked) == len(cached) == 2
    for a, b in zip(asked, cached):
        # a teacher's convolution of another batch may round differently in the last bit
        assert float(a['train_loss']) == pytest.approx(float(b['train_loss']), rel=1e-4)
    assert not (tmp_path / 'out/asked' / TeacherCache.FILE).exists()


def test_random_images_are_refused(tmp_path, monkeypatch, capsys):
    for args, word in (([], '--no-aug'), (['--no-aug', '--mixup', '0.2'], '--mixup')):
        with pytest.raises(SystemExit):
            run_here([*TINY, '--teacher-cache', *args], tmp_path, monkeypatch)
        assert word in capsys.readouterr().err
