"""Arguments of the losses that would give a wrong number in silence: dtypes, shapes, scales."""
import pytest
import timm
import torch
import torch.nn.functional as F

import timm_sscl  # noqa: F401  registers the spiking_ names
from timm_sscl import SSCLLoss, SSCLTask, nce_loss
from timm_sscl.losses import firing_rate_loss, info_nce_loss, kd_loss, tet_loss


def _randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize('dtype,scale', [(torch.bfloat16, 1.), (torch.float16, 1.), (torch.float16, 300.)])
def test_tet_of_half_precision_is_summed_in_float32(dtype, scale):
    logits, target = (_randn(3, 64, 50) * scale).to(dtype), torch.arange(64) % 50
    value = tet_loss(logits, target)
    # of the same rounded logits in float64; bfloat16 sums would keep 8 bits, and 900 squared is no float16
    x = logits.double()
    expected = 0.95 * F.cross_entropy(x.flatten(0, 1), target.repeat(3)) + 0.05 * (x - 1).square().mean()
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize('logits,target', [
    ((4, 5), (4,)), ((3, 4, 5), (1,)), ((3, 4, 5), (12,)), ((3, 4, 5), (4, 7)), ((3, 4, 5), (1, 5)),
    ((3, 4, 5), (4, 1)), ((3, 4, 5, 2), (4,))])
def test_tet_says_what_it_takes(logits, target):
    target = torch.zeros(target, dtype=torch.long if len(target) == 1 else torch.float32)
    with pytest.raises(ValueError, match=r'\(T, B, K\)'):
        tet_loss(torch.zeros(logits), target)


@pytest.mark.parametrize('shape', [(5,), (3, 4, 5), (4, 5, 2, 2)])
def test_kd_takes_one_row_per_sample(shape):
    # the mean over the batch would be another for any other shape
    with pytest.raises(ValueError, match=r'\(B, K\)'):
        kd_loss(torch.zeros(shape), torch.zeros(shape))


@pytest.mark.parametrize('temperature', [0., -2., float('nan')])
def test_kd_takes_a_positive_temperature(temperature):
    with pytest.raises(ValueError, match='temperature'):
        kd_loss(_randn(4, 5), _randn(4, 5), temperature)


def test_firing_rate_loss_of_nothing_and_of_no_band():
    with pytest.raises(ValueError, match='no firing rates'):
        firing_rate_loss(torch.zeros(0), 0.1, 0.2)
    with pytest.raises(ValueError, match='low=0.5'):
        firing_rate_loss(torch.tensor([0.3]), 0.5, 0.1)


@pytest.mark.parametrize('loss', [nce_loss, info_nce_loss])
@pytest.mark.parametrize('scale', [1e-30, 1e-12, 1e8, 1e25, 1e37])
def test_critics_see_directions_only(loss, scale):
    s, a = _randn(6, 8), _randn(6, 8, seed=1)
    # the scale rounds every number once
    for pair in ((scale * s, a), (s, scale * a)):
        assert loss(*pair).item() == pytest.approx(loss(s, a).item(), rel=1e-5)
    leaf = s.clone().requires_grad_()
    loss(scale * leaf, a).backward()
    plain = s.clone().requires_grad_()
    loss(plain, a).backward()
    torch.testing.assert_close(leaf.grad, plain.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('rows', [4, 16])
def test_teacher_of_another_number_of_images(rows):
    # 16 rows are as many as the student's features have: they would be compared as 16 images without time
    student = timm.create_model('spiking_test_resnet', timesteps=2, num_classes=5).train()
    sscl = SSCLLoss(student, timm.create_model('test_resnet', num_classes=5))
    x = _randn(8, 3, 32, 32)
    student(x)
    with pytest.raises(ValueError, match=f'teacher_input holds {rows} samples, x holds 8'):
        sscl(x, teacher_input=_randn(rows, 3, 32, 32))


@pytest.mark.parametrize('losses', ['kd', 'sscl'])
def test_teacher_that_somebody_put_in_training_mode(losses):
    torch.manual_seed(0)
    student = timm.create_model('spiking_test_resnet', timesteps=2, num_classes=5)
    teacher = timm.create_model('test_resnet', num_classes=5)
    task = SSCLTask(student, teacher, losses, verbose=False).train()
    x, y = _randn(8, 3, 32, 32), torch.arange(8) % 5
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    expected = task.teach(x)[0]
    teacher.train()
    assert torch.equal(task.teach(x)[0], expected)
    teacher.train()
    task(x, y)
    assert not teacher.training and all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


class _Dict(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 5, 3)

    def forward(self, x):
        return {'logits': self.conv(x).mean((2, 3))}


def test_model_that_returns_no_tensor():
    task = SSCLTask(_Dict(), _Dict(), 'kd', verbose=False).train()
    with pytest.raises(TypeError, match='_Dict returns a dict.*logits'):
        task(_randn(4, 3, 8, 8), torch.arange(4))
