"""The teacher's images: resized and renormalised from the student's, in SSCLLoss and SSCLTask; stages by depth."""
import copy
import logging

import pytest
import timm
import torch
import torch.nn.functional as F

from timm_sscl import SSCLLoss, SSCLTask
from timm_sscl.features.stages import match_by_depth
from timm_sscl.distillation.teacher_input import TeacherInput

K = 5
STATS = ((.5, .4, .3), (.2, .3, .4), (.1, .2, .3), (.5, .6, .7))


def _normalised(pixels, mean, std):
    return torch.stack([(pixels[:, c] - mean[c]) / std[c] for c in range(3)], 1)


def test_renormalisation_gives_the_pixels_in_the_teachers_normalisation():
    pixels = torch.rand(4, 3, 8, 8, dtype=torch.float64)
    expected = _normalised(pixels, *STATS[2:])
    assert torch.allclose(
        TeacherInput(renormalize=STATS)(_normalised(pixels, *STATS[:2])), expected, rtol=0, atol=1e-12)
    x = torch.randn(2, 3, 8, 8)
    assert TeacherInput()(x) is x and TeacherInput(size=(8, 8), renormalize=(*STATS[:2], *STATS[:2]))(x) is x


def test_resizing_is_bicubic_and_antialiased():
    x = torch.randn(2, 3, 32, 24)
    for size in ((16, 16), (48, 40)):
        expected = F.interpolate(x, size, mode='bicubic', antialias=True)
        assert torch.equal(TeacherInput(size)(x), expected)
    constant = TeacherInput((7, 5))(torch.full((1, 3, 32, 32), .3))
    assert torch.allclose(constant, torch.full((1, 3, 7, 5), .3))
    assert TeacherInput((7, 5))(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize('kwargs,name', [(dict(size=(0, 3)), 'teacher_size'), (dict(size=(3,)), 'teacher_size'),
                                         (dict(renormalize=STATS[:3]), 'renormalize')])
def test_bad_arguments_are_named(kwargs, name):
    with pytest.raises(ValueError, match=name):
        TeacherInput(**kwargs)


@pytest.mark.parametrize('n,k,expected', [
    (4, 4, ([0, 1, 2, 3], [0, 1, 2, 3])), (4, 3, ([1, 2, 3], [0, 1, 2])), (2, 4, ([0, 1], [1, 3])), (4, 1, ([3], [0])),
    (5, 3, ([1, 3, 4], [0, 1, 2]))])
def test_stages_are_matched_by_relative_depth(n, k, expected):
    assert match_by_depth(n, k) == expected


PAIRS = [('spiking_resnet18', 'test_convnext', {}), ('spiking_test_vit', 'resnet18', {}),
         ('spiking_test_vit', 'test_resnet', {}), ('spiking_efficientvim_m1', 'test_resnet', {}),
         ('spiking_test_resnet', 'crossvit_tiny_240', dict(teacher_size=(240, 240)))]


def _pair(student, teacher):
    torch.manual_seed(0)
    models = []
    for name in (student, teacher):
        kwargs = dict(img_size=32) if 'test_vit' in name else {}
        models.append(timm.create_model(name, num_classes=K, **kwargs))
    return models


@pytest.mark.parametrize('student,teacher,options', PAIRS)
def test_any_teacher_for_any_student(student, teacher, options, caplog):
    model, ann = _pair(student, teacher)
    x, y = (torch.randn(8, 3, 32, 32) if 'efficientvim' not in student else torch.randn(8, 3, 128, 128),
            torch.arange(8) % K)
    with caplog.at_level(logging.INFO, logger='timm_sscl'):
        sscl = SSCLLoss(model, ann, dim=8, **options)
    assert f'{len(sscl.taps)} pairs of taps' in caplog.text and sscl.taps[-1].name == 'pooled'
    loss = F.cross_entropy(model.train()(x), y) + sscl(x)
    loss.backward()
    assert torch.isfinite(loss) and all(p.grad is not None for p in sscl.parameters())
    assert not any(p.requires_grad for p in ann.parameters())
    sscl.close()
    task = SSCLTask(model, ann, 'contrastive', input_size=x.shape[1:], verbose=False, **options).train()
    assert torch.isfinite(task(x, y)['loss'])


def test_teacher_sees_what_was_asked_for():
    model, ann = _pair('spiking_test_resnet', 'test_convnext')
    seen = []
    ann.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    x = torch.randn(4, 3, 32, 32)
    sscl = SSCLLoss(model.train(), ann, dim=8, teacher_size=(64, 48), renormalize=STATS)
    seen.clear()
    model(x)
    sscl(x)
    assert torch.equal(seen[0], TeacherInput((64, 48), STATS)(x))
    other = torch.randn(4, 3, 40, 40)
    model(x)
    sscl(x, teacher_input=other)
    assert seen[1] is other


# ---- a transform of one's own

def _halved(x):
    """Images of half the size, of other values."""
    return 2 * F.avg_pool2d(x, 2) + 1


def _networks():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return (timm.create_model('spiking_test_resnet', num_classes=5, timesteps=2).train(),
                timm.create_model('test_resnet', num_classes=5))


def test_transform_of_ones_own():
    given = TeacherInput(transform=_halved)
    x = torch.randn(4, 3, 32, 32)
    assert torch.equal(given(x), _halved(x)) and given.shape((3, 32, 32)) == (3, 16, 16) and given.shape(None) is None
    frames = torch.randn(2, 5, 2, 8, 8)
    assert torch.equal(given(frames)[1, 3], _halved(frames[1])[3])
    with pytest.raises(ValueError, match=r'teacher_transform does the whole; teacher_size=\(8, 8\)'):
        TeacherInput((8, 8), transform=_halved)
    for wrong in (lambda x: x[:1], lambda x: x.flatten(1), lambda x: None):
        with pytest.raises(ValueError, match='teacher_transform made'):
            TeacherInput(transform=wrong)(x)
    with pytest.raises(ValueError, match='renormalize'):
        SSCLLoss(*_networks(), renormalize=([0.], [1.], [0.], [1.]), teacher_transform=_halved)


def test_transform_in_loss_and_task():
    x = torch.randn(6, 3, 32, 32)
    student, teacher = _networks()
    sscl = SSCLLoss(student, teacher, input_size=(3, 32, 32), teacher_transform=_halved)
    student(x)
    value = sscl(x).item()
    plain = SSCLLoss(student, copy.deepcopy(teacher), input_size=(3, 32, 32))
    plain.criterion.load_state_dict(sscl.criterion.state_dict())
    plain.criterion.running_cka.load_state_dict(
        {key: torch.zeros_like(v) for key, v in plain.criterion.running_cka.state_dict().items()})
    student(x)
    assert plain(x, teacher_input=_halved(x)).item() == value
    student(x)
    assert plain(x).item() != value
    task = SSCLTask(student, copy.deepcopy(teacher), 'kd', teacher_transform=_halved, verbose=False)
    assert torch.equal(task.teach(x)[0], teacher.eval()(_halved(x)))
