"""An ANN on event frames sees one frame after the other; its outputs and features are averaged."""
import copy
import pickle

import pytest
import timm
import torch

from sscl_reference import outputs_of, tapped
from timm_sscl import SSCLLoss, SSCLTask, calibrate, convert_to_spiking
from timm_sscl.data.events import EventDigits
from timm_sscl.distillation.frames_ann import accept_frames
from timm_sscl.distillation.teacher_input import TeacherInput
from timm_sscl.features.stages import stage_indices

T, B = 3, 5


@pytest.fixture
def frames():
    digits = EventDigits(num_samples=B)
    return torch.stack([digits[i][0] for i in range(B)])[:, :T].contiguous()


def create(name='test_resnet', **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, in_chans=2, num_classes=10, **kwargs)


def test_logits_are_the_mean_over_the_frames(frames):
    model = accept_frames(create().eval())
    with torch.no_grad():
        one_by_one = torch.stack([model(frames[:, t]) for t in range(T)]).mean(0)
        assert torch.allclose(model(frames), one_by_one, atol=1e-6)  # the same convolutions on another batch, float32
        assert not torch.allclose(model(frames[:, :1]), one_by_one, atol=1e-3)  # the comparison can fail


def test_the_model_stays_what_it_was(frames):
    plain, model = create().eval(), accept_frames(create().eval())
    assert isinstance(model, type(plain)) and accept_frames(model) is model
    assert list(model.state_dict()) == list(plain.state_dict())
    create().load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(model(frames[:, 0]), plain(frames[:, 0]))
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(copied(frames), model(frames)) and copied.fc.weight is not model.fc.weight
    spiking = create('spiking_test_resnet', timesteps=T)
    kind = type(spiking)
    assert type(accept_frames(spiking)) is kind  # takes frames already


def test_a_model_that_is_converted_later_sees_frames_as_steps(frames):
    model = convert_to_spiking(accept_frames(create().eval()), timesteps=T)
    expected = convert_to_spiking(create().eval(), timesteps=T)
    with torch.no_grad():
        assert torch.equal(model(frames), expected(frames))


def teacher_by_hand(teacher, frames, indices):
    """Mean logits and mean features of one frame after the other."""
    logits, features = [], []
    with torch.no_grad():
        for t in range(T):
            final, stages = teacher.forward_intermediates(frames[:, t], indices=indices)
            features.append([*stages, teacher.forward_head(final, pre_logits=True)])
            logits.append(teacher(frames[:, t]))
    return torch.stack(logits).mean(0), [torch.stack(f).mean(0) for f in zip(*features)]


def test_task_compares_with_the_teachers_means(frames):
    student, teacher = create('spiking_test_resnet', timesteps=T), create().eval()
    task = SSCLTask(student, teacher, losses={'sscl': 1., 'kd': 1.}, input_size=(2, 32, 32), verbose=False)
    logits, features = task.teach(frames)
    expected, means = teacher_by_hand(teacher, frames, task.teacher_reader.indices)
    assert torch.allclose(logits, expected, atol=1e-6)
    assert [tuple(f.shape) for f in features] == [(1, *m.shape) for m in means]
    assert all(torch.allclose(f[0], m, atol=1e-5) for f, m in zip(features, means))
    result = task(frames, torch.arange(B))
    result['loss'].backward()
    assert result['output'].shape == (B, 10)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())


def test_kd_alone_reads_no_features(frames):
    student, teacher = create('spiking_test_resnet', timesteps=T), create().eval()
    task = SSCLTask(student, teacher, losses='kd', verbose=False)
    logits, features = task.teach(frames)
    assert features is None and torch.allclose(logits, teacher_by_hand(teacher, frames, [0])[0], atol=1e-6)


def test_a_spiking_teacher_takes_the_frames_as_steps(frames):
    student, teacher = create('spiking_test_resnet', timesteps=T), create('spiking_test_resnet', timesteps=T).eval()
    task = SSCLTask(student, teacher, losses='sscl', input_size=(2, 32, 32), verbose=False)
    logits, features = task.teach(frames)
    with torch.no_grad():
        assert torch.allclose(logits, teacher(frames), atol=1e-6)
    assert all(f.shape[:2] == (T, B) for f in features)


def test_the_loss_in_a_loop_compares_with_the_teachers_means(frames):
    student, teacher = create('spiking_test_resnet', timesteps=T), create().eval()
    sscl = SSCLLoss(student, teacher, input_size=(2, 32, 32), dim=8, cka_momentum=1.)
    sscl.eval()
    with outputs_of(*tapped(student)) as student_features:
        student(frames)
    loss = sscl(frames)
    indices = stage_indices(teacher)
    _, means = teacher_by_hand(teacher, frames, indices)
    assert torch.allclose(loss, sscl.from_features(student_features, means), rtol=1e-4)  # float32, another batch
    loss.backward()
    assert student.conv1[0].weight.grad.abs().sum() > 0


def test_student_that_runs_another_number_of_steps_is_told(frames):
    student = create('spiking_test_resnet', timesteps=T + 1)
    with pytest.raises(ValueError, match=r'3 frames per sample.*timesteps=4.*set_timesteps\(3\)'):
        student(frames)


def test_teachers_frames_are_resized_like_images(frames):
    resize = TeacherInput((40, 40), ((0., 0.), (1., 1.), (.5, .5), (2., 2.)))
    resized = resize(frames)
    assert resized.shape == (B, T, 2, 40, 40)
    assert all(torch.equal(resized[:, t], resize(frames[:, t])) for t in range(T))


def test_calibration_and_macs_on_event_frames(frames):
    student = create('spiking_test_resnet', timesteps=T)
    drives = calibrate(student, frames).spiking_report().drives
    per_step = 2 * 9 * student.conv1[0].out_channels * 16 * 16
    assert len(drives) == len(student.neurons()) and all(0 < d.rate < 1 for d in drives)
    report = student.spiking_report()
    binary = report.macs(frames)
    assert binary.by_module['conv1.0']['binary'] == T * per_step  # the stem adds: its input is 0 and 1
    counts = report.macs(frames * 3)  # not binary: its MACs are MACs
    assert counts.by_module['conv1.0'] == dict(binary=0, fractional=0, analog=T * per_step)
    assert counts.total == binary.total


# ---- the mean frame

def test_a_teacher_may_see_the_mean_frame(frames):
    student, plain = create('spiking_test_resnet', timesteps=T), create().eval()
    teacher = accept_frames(create().eval(), frames='mean')
    with torch.no_grad():
        assert torch.equal(teacher(frames), plain(frames.mean(1)))
        assert torch.equal(teacher(frames[:, 0]), plain(frames[:, 0]))  # images as before
        copied = pickle.loads(pickle.dumps(teacher))
        assert torch.equal(copied(frames), plain(frames.mean(1)))
        assert not torch.allclose(teacher(frames), accept_frames(plain)(frames), atol=1e-3)  # the comparison can fail
    task = SSCLTask(student, teacher, losses={'sscl': 1., 'kd': 1.}, input_size=(2, 32, 32), verbose=False)
    logits, features = task.teach(frames)
    with torch.no_grad():
        final, stages = plain.forward_intermediates(frames.mean(1), indices=task.teacher_reader.indices)
        expected = [*stages, plain.forward_head(final, pre_logits=True)]
        assert torch.allclose(logits, plain(frames.mean(1)), atol=1e-6)  # the same convolutions in float32
    assert [tuple(f.shape) for f in features] == [(1, *e.shape) for e in expected]
    assert all(torch.allclose(f[0], e, atol=1e-5) for f, e in zip(features, expected))


def test_sscl_loss_compares_with_the_mean_frame(frames):
    student = create('spiking_test_resnet', timesteps=T).train()
    losses = []
    for seen, teacher_input in (('mean', None), ('each', frames.mean(1)), ('each', None)):
        torch.manual_seed(0)
        sscl = SSCLLoss(student, accept_frames(create().eval(), frames=seen), dim=4, input_size=(2, 32, 32))
        student(frames)
        losses.append(sscl(frames, teacher_input).item())
        sscl.close()
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # float32
    assert abs(losses[0] - losses[2]) > 1e-3


def test_mean_frame_is_of_an_ann():
    with pytest.raises(ValueError, match="frames='mean': is for an ANN"):
        accept_frames(create('spiking_test_resnet', timesteps=T), frames='mean')
    with pytest.raises(ValueError, match="frames='sum': must be one of each, mean"):
        accept_frames(create(), frames='sum')
    assert accept_frames(accept_frames(create(), 'mean')).frames_as == 'each'  # the last one counts
