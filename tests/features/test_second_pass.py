"""A head that runs a second time, for the pooled feature, leaves no trace: no dropout drawn, no statistics moved."""
import copy

import pytest
import timm
import torch
import torch.nn as nn

from timm_sscl import SSCLLoss, SSCLTask
from timm_sscl.features.second_pass import second_pass

SIZE = (3, 32, 32)


@pytest.fixture(scope='module', params=['test_resnet', 'test_convnext', 'mobilenetv4_conv_small_035'])
def pair(request):
    """Student and teacher; dropout in front of the classifier, and of the last also a batch norm in the head."""
    student = timm.create_model(f'spiking_{request.param}', num_classes=3, timesteps=2, drop_rate=0.5).train()
    return student, timm.create_model(request.param, num_classes=3)


def step(pair, losses):
    """One training forward of copies, from the same random state."""
    student, teacher = copy.deepcopy(pair)
    task = SSCLTask(student, teacher, losses, input_size=SIZE, verbose=False).train()
    torch.manual_seed(0)
    x, y = torch.randn(4, *SIZE), torch.tensor([0, 1, 2, 0])
    return task, task(x, y), torch.rand(())


def test_a_loss_on_features_changes_neither_the_output_nor_the_statistics(pair):
    (plain, without, drawn), (task, result, drawn_too) = step(pair, 'none'), step(pair, 'contrastive')
    assert torch.equal(without['output'], result['output']) and drawn == drawn_too
    states = [t.trainable_module.student.state_dict() for t in (plain, task)]
    assert all(torch.equal(a, b) for a, b in zip(*(state.values() for state in states)))
    student = task.trainable_module.student
    assert student.drop_rate == 0.5 and all(m.track_running_stats for m in student.modules()
                                            if isinstance(m, nn.BatchNorm2d))


def test_task_and_loss_see_the_same_pooled_feature(pair):
    task, result, _ = step(pair, 'contrastive')
    student, teacher = copy.deepcopy(pair)
    loss = SSCLLoss(student, teacher, input_size=SIZE, weighting='uniform')
    loss.criterion.load_state_dict(task.trainable_module.losses['contrastive'].state_dict())
    torch.manual_seed(0)
    x = torch.randn(4, *SIZE)
    student(x)
    torch.testing.assert_close(loss(x), result['contrastive_loss'])


def test_second_pass_leaves_a_batch_norm_normalising_by_the_batch():
    norm, drop, x = nn.BatchNorm1d(3).train(), nn.Dropout(0.5).train(), torch.randn(8, 3)
    expected = copy.deepcopy(norm)(x)
    before, state = copy.deepcopy(norm.state_dict()), torch.get_rng_state()
    with second_pass([norm, drop]):
        assert torch.equal(drop(norm(x)), expected)
    assert all(torch.equal(a, b) for a, b in zip(norm.state_dict().values(), before.values()))
    assert torch.equal(torch.get_rng_state(), state) and norm.track_running_stats and drop.p == 0.5
