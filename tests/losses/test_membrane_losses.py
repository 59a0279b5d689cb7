"""Losses on membrane potentials: IM-Loss and RMP-Loss by hand, their options, and training with them."""
import math

import pytest
import torch
import torch.nn as nn
from loops import randn

from timm_sscl import SSCLTask, convert_to_spiking, create_loss
from timm_sscl.losses import TrainStep, im_loss, rmp_loss


def _step(membranes, progress=None):
    timesteps, batch = membranes[0].shape[:2]
    return TrainStep(torch.zeros(batch, 3, 8, 8), torch.arange(batch), torch.zeros(timesteps, batch, 5),
                     nn.Linear(2, 2), membranes={str(i): u for i, u in enumerate(membranes)},
                     progress=None if progress is None else torch.tensor(progress))


def _membranes():
    return [randn(4, 2, 3, seed=i).requires_grad_() for i in range(4)]


# ---- IM-Loss

@pytest.mark.parametrize('target, level', [('threshold', 1.), ('half', .5), ('half_per_step', .125)])
def test_im_is_the_distance_of_means(target, level):
    membranes = _membranes()
    loss = create_loss('im', target=target)(_step(membranes))
    means = [sum(u.flatten().tolist()) / 24 for u in membranes]
    assert loss.item() == pytest.approx(sum((m - level) ** 2 for m in means[1:3]) / 2, rel=1e-12)
    gradients = torch.autograd.grad(loss, membranes, allow_unused=True)
    assert gradients[0] is None and gradients[3] is None  # the first and the last layer are left out
    for gradient, mean in zip(gradients[1:3], means[1:3]):  # the same for all elements
        expected = torch.full_like(gradient, 2 * (mean - level) / 24 / 2)
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=0.)


def test_im_is_zero_at_its_target():
    flat = [torch.full((4, 2, 3), .125, dtype=torch.float64) for _ in range(3)]
    assert create_loss('im', target='half_per_step')(_step(flat)).item() == 0.
    assert create_loss('im')(_step(flat)).item() == pytest.approx(.875 ** 2, rel=1e-12)
    assert im_loss(torch.tensor([1., 3.]), 1.).item() == 2.


def test_im_of_all_layers_and_of_none():
    membranes = _membranes()
    assert create_loss('im', skip_ends=False)(_step(membranes)).item() == pytest.approx(
        sum((u.mean().item() - 1) ** 2 for u in membranes) / 4, rel=1e-12)
    with pytest.raises(ValueError, match='skip_ends=True: 2 neuron layers .0, 1. leave none'):
        create_loss('im')(_step(membranes[:2]))
    with pytest.raises(ValueError, match="im.target|target='third'"):
        create_loss('im', target='third')


# ---- RMP-Loss

def test_rmp_by_hand():
    u = torch.tensor([[[.5, .3, .7, -.2, 1.4]]], dtype=torch.float64, requires_grad=True)
    loss = rmp_loss([u])
    assert loss.item() == pytest.approx((.25 + .09 + .09 + .04 + .16) / 5, rel=1e-12)
    gradient, = torch.autograd.grad(loss, u)
    # .3 goes to 0 and .7 to 1
    assert gradient.flatten().tolist() == pytest.approx([-1 / 5, .6 / 5, -.6 / 5, -.4 / 5, .8 / 5], rel=1e-12)


def test_rmp_against_loops():
    membranes = _membranes()
    expected = sum(sum(min(abs(v), abs(1 - v)) ** 2 for v in u.flatten().tolist()) / 24 for u in membranes) / 4
    assert create_loss('rmp', schedule='constant')(_step(membranes)).item() == pytest.approx(expected, rel=1e-12)
    inner = create_loss('rmp', schedule='constant', skip_ends=True)(_step(membranes)).item()
    assert inner == pytest.approx(rmp_loss(membranes[1:3]).item(), rel=1e-12)


@pytest.mark.parametrize('progress', [0., .25, .5, 1.])
def test_rmp_grows_by_a_cosine(progress):
    membranes = _membranes()
    loss = create_loss('rmp')(_step(membranes, progress)).item()
    expected = (1 - math.cos(math.pi * progress)) / 2 * rmp_loss(membranes).item()
    assert loss == pytest.approx(expected, rel=1e-6)  # progress is float32
    assert progress or loss == 0.


def test_rmp_says_what_it_lacks():
    with pytest.raises(ValueError, match='schedule=cosine: needs the progress.*set_progress'):
        create_loss('rmp')(_step(_membranes()))
    with pytest.raises(ValueError, match='schedule'):
        create_loss('rmp', schedule='linear')


# ---- in a task

@pytest.mark.parametrize('name, options', [
    ('im', dict(target='half')), ('rmp', {}), ('rmp', dict(schedule='constant', skip_ends=True))])
def test_training_lowers_them(name, options):
    torch.manual_seed(0)
    net = nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(8, 8), nn.ReLU())), nn.Linear(8, 5))
    student = convert_to_spiking(net, timesteps=2, example_inputs=torch.randn(2, 8))
    task = SSCLTask(student, None, {name: 1.}, {name: options}, task_loss_weight=0., verbose=False).train()
    task.set_progress(.5)
    optimizer = torch.optim.SGD(student.parameters(), lr=.1)
    x, y, values = torch.randn(32, 8), torch.arange(32) % 5, []
    for _ in range(100):
        loss = task(x, y)['loss']
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < .7 * values[0]
