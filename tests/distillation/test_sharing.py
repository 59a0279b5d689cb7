"""Student and teacher with something in common: an error that names it, and two models left as they were."""
import copy

import pytest
import timm
import torch
import torch.nn as nn

import timm_sscl  # noqa: F401  registers the spiking_ names
from timm_sscl import SSCLLoss, SSCLTask


class _Net(nn.Module):
    def __init__(self, stem=None, width=8):
        super().__init__()
        self.stem = stem or nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.body = nn.Sequential(nn.Conv2d(4, width, 3), nn.BatchNorm2d(width), nn.ReLU())
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).mean((2, 3)))


def _nets():
    return _Net(), _Net()


def _share_stem(student, teacher):
    teacher.stem = student.stem


def _share_under_another_name(student, teacher):
    teacher.entry = student.body[1]


def _share_activation(student, teacher):
    teacher.body[2] = student.body[2]


def _share_whole_student(student, teacher):
    teacher.pupil = student


def _share_parameter(student, teacher):
    teacher.head.weight = student.head.weight


def _share_memory(student, teacher):
    teacher.head.weight.data = student.head.weight.data


def _share_part_of_a_parameter(student, teacher):
    both = torch.randn(60)
    student.head.weight.data, teacher.head.weight.data = both[:40].view(5, 8), both[20:].view(5, 8)


def _share_buffer(student, teacher):
    teacher.stem[1].running_mean = student.stem[1].running_mean


def _load_by_assignment(student, teacher):
    teacher.load_state_dict(student.state_dict(), assign=True)


SHARED = [
    (_share_stem, "the module 'stem':"),
    (_share_under_another_name, r"the module 'body.1' \(the teacher's 'entry'\)"),
    (_share_activation, "the module 'body.2'"),
    (_share_whole_student, r"the module '_Net' \(the teacher's 'pupil'\):"),
    (_share_parameter, "share 'head.weight':"),
    (_share_memory, "share 'head.weight':"),
    (_share_part_of_a_parameter, "share 'head.weight':"),
    (_share_buffer, "'stem.1.running_mean'"),
    (_load_by_assignment, 'share .*, .*, .* and 13 more'),
]


def _state(*models):
    return [(p.requires_grad, p.clone()) for m in models for p in m.parameters()] + [
        (m.training, torch.zeros(())) for model in models for m in model.modules()]


@pytest.mark.parametrize('share,match', SHARED, ids=lambda v: getattr(v, '__name__', ''))
@pytest.mark.parametrize('build', ['loss', 'loss of a wrapped teacher', 'task'])
def test_what_is_shared_is_named(share, match, build):
    student, teacher = _nets()
    share(student, teacher)
    before = _state(student, teacher)
    with pytest.raises(ValueError, match=match):
        if build == 'task':
            SSCLTask(student, teacher, 'kd', input_size=(3, 16, 16), verbose=False)
        else:
            SSCLLoss(student, nn.DataParallel(teacher) if 'wrapped' in build else teacher, ['body'],
                     input_size=(3, 16, 16))
    for (flag, value), (old_flag, old) in zip(_state(student, teacher), before):
        assert flag == old_flag and torch.equal(value, old)


@pytest.mark.parametrize('make', [
    lambda student: copy.deepcopy(student),
    lambda student: copy.deepcopy(student).to('meta'),
    lambda student: _Net(),
], ids=['copy', 'meta', 'another'])
def test_models_that_share_nothing_pass(make):
    from timm_sscl.distillation.sharing import check_nothing_shared
    student = _Net()
    check_nothing_shared(student, make(student))


def test_neighbours_in_one_file_share_nothing():
    # two models whose tensors are slices of one storage, as files mapped to memory give them
    from timm_sscl.distillation.sharing import check_nothing_shared
    models = _nets()
    file = torch.randn(2 * sum(p.numel() for p in models[0].parameters()))
    at = 0
    for p in [p for model in models for p in model.parameters()]:
        p.data, at = file[at:at + p.numel()].view(p.shape), at + p.numel()
    check_nothing_shared(*models)


def test_tied_weights_within_a_model_pass():
    student, teacher = _nets()
    for net in (student, teacher):
        net.twin = net.head
        net.tied = nn.Linear(8, 5)
        net.tied.weight = net.head.weight
    loss = SSCLLoss(student, teacher, ['body'], input_size=(3, 16, 16))
    assert [tap.name for tap in loss.taps] == ['body']
    assert student.head.weight.requires_grad and not teacher.head.weight.requires_grad


def test_shallow_copy_of_the_student():
    student = timm.create_model('spiking_test_resnet', timesteps=2)
    with pytest.raises(ValueError, match="the module 'conv1', the module 'bn1', .* more"):
        SSCLLoss(student, copy.copy(student))
    assert all(p.requires_grad for p in student.parameters())


def test_task_without_a_teacher_does_not_look():
    student = _Net()
    SSCLTask(student, student, 'none', verbose=False)
    assert all(p.requires_grad for p in student.parameters())


@pytest.mark.parametrize('number, more', [(1, ''), (3, ''), (4, ' and 1 more'), (6, ' and 3 more')])
def test_three_are_named_and_the_others_counted(number, more):
    student, teacher = (nn.ModuleDict({f'm{i}': nn.Linear(2, 2) for i in range(6)}) for _ in range(2))
    student.extra, teacher.extra = nn.Identity(), nn.Identity()
    for i in range(number):
        teacher[f'm{i}'] = student[f'm{i}']
    with pytest.raises(ValueError, match=f"the module 'm{min(number, 3) - 1}'{more}: the loss"):
        SSCLTask(student, teacher, 'kd', verbose=False)
