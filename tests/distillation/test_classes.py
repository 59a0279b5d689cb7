"""Logits of different numbers of classes: an error before the first step, and never a broadcast."""
import pytest
import timm
import torch
import torch.nn as nn

import timm_sscl  # noqa: F401  registers the spiking_ names
from timm_sscl import SSCLTask, register_loss
from timm_sscl.losses import kd_loss, kd_step_loss


def _models(ours, theirs):
    return (timm.create_model('spiking_test_resnet', num_classes=ours, timesteps=2),
            timm.create_model('test_resnet', num_classes=theirs))


@pytest.mark.parametrize('ours,theirs', [(5, 10), (5, 1), (1, 5), (5, 0)])
@pytest.mark.parametrize('losses', ['kd', {'kd_step': 1.}, {'sscl': 1., 'kd': 0.5}], ids=str)
def test_it_is_found_at_the_start(losses, ours, theirs):
    student, teacher = _models(ours, theirs)
    features = 96  # of a timm model without a head
    with pytest.raises(ValueError, match=f'kd.* has {ours} classes and the teacher .*{theirs or features}'):
        SSCLTask(student, teacher, losses, verbose=False)
    assert all(p.requires_grad for p in teacher.parameters())


def test_what_runs_counts_and_not_what_the_model_says():
    student, teacher = _models(5, 5)
    teacher.fc = nn.Linear(96, 7)
    assert teacher.num_classes == 5
    with pytest.raises(ValueError, match='has 5 classes.* 7'):
        SSCLTask(student, teacher, 'kd', verbose=False)


@pytest.mark.parametrize('theirs', [1, 7, 0])
def test_features_do_not_depend_on_classes(theirs):
    task = SSCLTask(*_models(5, theirs), 'sscl', verbose=False).train()
    result = task(torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(4))
    assert torch.isfinite(result['loss'])


def test_users_loss_is_held_to_it_unless_it_says_otherwise():
    @register_loss('test_mse', needs_teacher=True)
    def mse(step):
        return (step.logits - step.teacher_logits).square().mean()

    @register_loss('test_mapped', needs_teacher=True, other_classes=True)
    def mapped(step):
        return (step.logits - step.teacher_logits[:, :5]).square().mean()

    with pytest.raises(ValueError, match='test_mse.* 5 classes .* 1'):
        SSCLTask(*_models(5, 1), {'test_mse': 1.}, verbose=False)
    SSCLTask(*_models(5, 7), {'test_mapped': 1.}, verbose=False)
    SSCLTask(*_models(5, 5), {'test_mse': 1.}, verbose=False)


class _Odd(nn.Module):
    """A model that no probe runs: it wants 17 x 19 images."""

    def __init__(self, classes, num_classes=None):
        super().__init__()
        self.fc = nn.Linear(3 * 17 * 19, classes)
        if num_classes is not None:
            self.num_classes = num_classes

    def forward(self, x):
        if x.shape[-2:] != (17, 19):
            raise ValueError('17 x 19')
        return self.fc(x.flatten(1))


def test_models_that_no_probe_runs():
    with pytest.raises(ValueError, match='has 5 classes.* 7'):  # what they say
        SSCLTask(_Odd(5, 5), _Odd(7, 7), 'kd', verbose=False)
    with pytest.raises(ValueError, match='has 5 classes.* 1'):  # what the training images will show
        SSCLTask(_Odd(5), _Odd(1), 'kd', input_size=(3, 17, 19), verbose=False)
    task = SSCLTask(_Odd(5), _Odd(1), 'kd', verbose=False).train()  # and at the latest in the first step
    with pytest.raises(ValueError, match=r'\(4, 5\).*\(4, 1\)'):
        task(torch.zeros(4, 3, 17, 19), torch.arange(4))


@pytest.mark.parametrize('logits,teacher', [((4, 5), (4, 1)), ((4, 1), (4, 5)), ((4, 5), (1, 5)), ((4, 5), (5,))])
def test_kd_never_broadcasts(logits, teacher):
    with pytest.raises(ValueError, match='same samples and classes'):
        kd_loss(torch.zeros(logits), torch.zeros(teacher))
    with pytest.raises(ValueError, match='same samples|must be'):
        kd_step_loss(torch.zeros(2, *logits), torch.zeros(teacher))


def test_kd_step_takes_logits_of_every_step():
    with pytest.raises(ValueError, match=r'\(T, B, K\)'):
        kd_step_loss(torch.zeros(4, 5), torch.zeros(4, 5))
