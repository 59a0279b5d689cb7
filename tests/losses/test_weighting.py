"""Options of the SSCL criterion for its ablation: weights of equal total, and projections of the whole feature."""
import pytest
import timm
import torch
import torch.nn as nn

import timm_sscl  # noqa: F401  registers the spiking_ names
from timm_sscl import SSCLLoss, SSCLTask
from timm_sscl.losses import SSCLCriterion, nce_loss, register_loss
from timm_sscl.training.command_line.options import OptionError, parse_args

T = 2


def _randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _features(n=6, seed=0):
    """Three layers of a student and a teacher, more and less alike."""
    student = [_randn(T, n, 3, 4, 4, seed=seed), _randn(T, n, 4, seed=seed + 1), _randn(T, n, 5, 2, 2, seed=seed + 2)]
    teacher = [s.mean(0, keepdim=True) + noise * _randn(1, *s.shape[1:], seed=seed + 9)
               for s, noise in zip(student, (0.5, 1., 2.))]
    return student, teacher


def _criterion(**options):
    shapes = {f'{whose}_shapes': [(t, 3, 4, 4), (t, 4), (t, 5, 2, 2)] for whose, t in (('student', T), ('teacher', 1))}
    shapes = shapes if options.get('projection') == 'flattened' else {}
    options = {**dict(cka_floor=1e-3, critic='normalized', temperature=0.1), **shapes, **options}
    torch.manual_seed(0)
    return SSCLCriterion(['a', 'b', 'c'], [3, 4, 5], [3, 4, 5], **options).double().train()


def _run(weighting, steps=3, **options):
    """Loss, weights, cka_running and nce of the last of some steps."""
    criterion = _criterion(weighting=weighting, **options)
    for step in range(steps):
        loss = criterion(*_features(seed=10 * step))
    values = criterion.stats.values()
    return loss.item(), *([v[key] for v in values] for key in ('weight', 'cka_running', 'nce'))


# ---- weights

def test_weights_of_equal_total():
    loss, weights, running, nce = _run('cka')
    assert len(set(running)) == 3  # else all weightings were one
    inverse = [1 / max(value, 1e-3) for value in running]
    mean = sum(inverse) / 3
    expected = dict(cka=inverse, uniform=[1.] * 3, cka_mean1=[w / mean for w in inverse], uniform_matched=[mean] * 3)
    for weighting, of_layers in expected.items():
        loss, weights, same_running, same_nce = _run(weighting)
        assert (same_running, same_nce) == (running, nce)  # what is weighted does not depend on the weights
        assert weights == pytest.approx(of_layers, rel=1e-6)  # stats are float32
        assert loss == pytest.approx(sum(w * v for w, v in zip(of_layers, nce)), rel=1e-6)
    assert sum(expected['cka_mean1']) == pytest.approx(3)
    assert sum(expected['uniform_matched']) == pytest.approx(sum(inverse))


def test_floor_enters_the_mean():
    _, weights, running, _ = _run('cka_mean1', cka_floor=0.3)
    assert min(running) < 0.3 < max(running)
    inverse = [1 / max(value, 0.3) for value in running]
    assert weights == pytest.approx([3 * w / sum(inverse) for w in inverse], rel=1e-6)


@pytest.mark.parametrize('weighting', ['cka', 'cka_mean1', 'uniform_matched'])
def test_weights_carry_no_gradient(weighting):
    student, teacher = _features()
    criterion = _criterion(weighting=weighting)
    for s in student:
        s.requires_grad_()
    criterion(student, teacher).backward()
    got = [s.grad.clone() for s in student]
    weights = [v['weight'] for v in criterion.stats.values()]
    for s in student:
        s.grad = None
    pooled = [[x.flatten(3).mean((0, 3)) if x.ndim > 3 else x.mean(0) for x in side] for side in (student, teacher)]
    for weight, s, a, g, h in zip(weights, *pooled, criterion.g_student, criterion.g_teacher):
        (weight * nce_loss(g(s), h(a))).backward()
    for gradient, s in zip(got, student):
        torch.testing.assert_close(gradient, s.grad, rtol=1e-6, atol=1e-12)  # weights read from float32 stats


@pytest.mark.parametrize('weighting', ['cka', 'cka_mean1', 'uniform_matched'])
def test_small_batch_raises_where_the_weights_need_a_cka(weighting):
    with pytest.raises(ValueError, match='batch of 3'):
        _criterion(weighting=weighting)(*_features(3))
    assert torch.isfinite(_criterion(weighting='uniform')(*_features(3)))


# ---- projections

def test_flattened_projection_sees_the_whole_feature():
    criterion = _criterion(projection='flattened', weighting='uniform')
    assert [g.in_features for g in criterion.g_student] == [T * 48, T * 4, T * 20]
    assert [g.in_features for g in criterion.g_teacher] == [48, 4, 20]
    student, teacher = _features()
    total = 0.
    for s, a, g, h in zip(student, teacher, criterion.g_student, criterion.g_teacher):
        rows = [[side[:, i].flatten() for i in range(6)] for side in (s, a)]  # time first, then channels, then space
        total += nce_loss(g(torch.stack(rows[0])), h(torch.stack(rows[1]))).item()
    assert criterion(student, teacher).item() == pytest.approx(total, rel=1e-12)


def test_flattened_projection_of_equal_weights_is_the_pooled_one():
    """A map that gives every place and step the same weight, 1 / (T * places), is the pooled feature's."""
    pooled, flat = _criterion(), _criterion(projection='flattened')
    with torch.no_grad():
        for name in ('g_student', 'g_teacher'):
            shapes = getattr(flat, name.replace('g_', '') + '_shapes')
            for g, h, shape in zip(getattr(pooled, name), getattr(flat, name), shapes):
                places = torch.Size(shape[2:]).numel()
                spread = g.weight[:, None, :, None].expand(-1, shape[0], -1, places) / (shape[0] * places)
                h.weight.copy_(spread.reshape(h.weight.shape))
                h.bias.copy_(g.bias)
    assert flat(*_features()).item() == pytest.approx(pooled(*_features()).item(), rel=1e-10)


def test_flattened_projection_refuses_other_shapes():
    with pytest.raises(ValueError, match='needs student_shapes'):
        SSCLCriterion(['a'], [3], [3], projection='flattened')
    with pytest.raises(ValueError, match='needs teacher_shapes'):
        SSCLCriterion(['a'], [3], [3], projection='flattened', student_shapes=[(T, 3, 4, 4)])
    with pytest.raises(ValueError, match=r'student_shapes.*C = \[3\]'):
        SSCLCriterion(['a'], [3], [3], projection='flattened', student_shapes=[(3, 4, 4)], teacher_shapes=[(1, 3, 4)])
    with pytest.raises(ValueError, match="projection='flat'.*pooled, flattened"):
        _criterion(projection='flat')
    criterion = _criterion(projection='flattened')
    student, teacher = _features()
    with pytest.raises(ValueError, match=r"student feature 'a'.*\(1, 6, 3, 4, 4\).*\(2, 3, 4, 4\).*input_size"):
        criterion([student[0][:1], *student[1:]], teacher)
    with pytest.raises(ValueError, match="teacher feature 'c'.*input size"):
        criterion(student, [*teacher[:2], teacher[2][..., :1]])


def _models():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return (timm.create_model('spiking_test_resnet', num_classes=5, timesteps=T),
                timm.create_model('test_resnet', num_classes=5))


def test_flattened_projection_in_a_task_and_a_loop():
    torch.manual_seed(0)
    x, y = torch.randn(6, 3, 32, 32), torch.arange(6) % 5
    options = dict(projection='flattened', weighting='cka_mean1')
    task = SSCLTask(*_models(), 'sscl', {'sscl': options}, input_size=(3, 32, 32), verbose=False).train()
    student, teacher = _models()
    sscl = SSCLLoss(student.train(), teacher, input_size=(3, 32, 32), **options)
    own = task.trainable_module.losses['sscl']
    sizes = [g.in_features for g in own.g_student]
    assert sizes == [g.in_features for g in sscl.criterion.g_student] and sizes[-1] == T * 96
    assert [g.in_features * T for g in own.g_teacher] == sizes
    sscl.criterion.load_state_dict(own.state_dict())
    result = task(x, y)
    result['loss'].backward()
    student(x)
    # the same tensors read in two ways; float32 sums of other strides
    assert sscl(x).item() == pytest.approx(result['sscl_loss'].item(), rel=1e-5)
    assert all(g.weight.grad.abs().sum() > 0 for g in [*own.g_student, *own.g_teacher])
    with pytest.raises(ValueError, match="student feature 'layer1'.*input_size"):
        task(torch.randn(6, 3, 64, 64), y)


def test_tokens_are_flattened_as_they_are_read():
    def create(name, **kwargs):
        return timm.create_model(name, num_classes=5, img_size=32, depth=2, **kwargs)

    student, teacher = create('spiking_test_vit', timesteps=T).train(), create('test_vit')
    sscl = SSCLLoss(student, teacher, projection='flattened')
    x = torch.randn(4, 3, 32, 32)
    student(x)
    assert torch.isfinite(sscl(x))
    task = SSCLTask(student, teacher, 'contrastive', {'contrastive': dict(projection='flattened')}, verbose=False)
    assert torch.isfinite(task(x, torch.arange(4))['loss'])
    assert ([g.in_features for g in task.trainable_module.losses['contrastive'].g_student]
            == [g.in_features for g in sscl.criterion.g_student])


def test_losses_of_ones_own_get_shapes_only_where_they_ask_for_them():
    @register_loss('test_plain', needs_features=True)
    class Plain(nn.Module):
        def __init__(self, names, student_channels, teacher_channels):
            super().__init__()

        def forward(self, step):
            return step.logits.mean()

    seen = {}

    @register_loss('test_shapes', needs_features=True, needs_shapes=True)
    class Shapes(Plain):
        def __init__(self, student_shapes, teacher_shapes, **options):
            super().__init__(**options)
            seen.update(student=student_shapes, teacher=teacher_shapes)

    task = SSCLTask(*_models(), {'test_plain': 1., 'test_shapes': 1.}, taps=1, input_size=(3, 64, 32), verbose=False)
    assert seen == dict(student=[(T, 96, 2, 1), (T, 96)], teacher=[(1, 96, 2, 1), (1, 96)])
    assert torch.isfinite(task.train()(torch.randn(2, 3, 64, 32), torch.arange(2))['loss'])


# ---- command line

def test_command_line():
    args, _ = parse_args([])
    assert (args.loss_options['sscl']['weighting'], args.loss_options['sscl']['projection']) == ('cka', 'pooled')
    args, _ = parse_args(['--sscl-weighting', 'uniform_matched', '--sscl-projection', 'flattened',
                          '--loss', 'sscl=1,contrastive=1'])
    sscl, contrastive = args.loss_options['sscl'], args.loss_options['contrastive']
    assert sscl['weighting'] == 'uniform_matched' and 'weighting' not in contrastive
    assert sscl['projection'] == contrastive['projection'] == 'flattened'
    with pytest.raises(OptionError, match='--sscl-weighting.*cka'):
        parse_args(['--sscl-weighting', '1/cka'])
    with pytest.raises(OptionError, match='too small for CKA weights'):
        parse_args(['--batch-size', '2', '--sscl-weighting', 'cka_mean1'])
    parse_args(['--batch-size', '2', '--sscl-weighting', 'uniform'])
