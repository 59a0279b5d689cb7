"""Distillation losses on logits and features against values by hand and loops over their formulas."""
import math

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from runs import TINY, fails

from timm_sscl import SSCLTask, create_loss, register_loss
from timm_sscl.losses import TrainStep, cka, kd_loss, loss_spec
from timm_sscl.losses.at import attention_map, attention_transfer
from timm_sscl.losses.cka_loss import cka_loss
from timm_sscl.losses.dist import dist_loss
from timm_sscl.losses.dkd import dkd_loss
from timm_sscl.losses.hta_kl import hta_kl_loss
from timm_sscl.losses.sp import similarity_loss
from timm_sscl.losses.standardized import standardize
from timm_sscl.losses.tser import step_entropy
from timm_sscl.losses.twsnn import self_distillation_loss

LABELS = torch.tensor([0, 3, 1, 4, 2, 2])


def _randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _logits(seed=0):
    return 2 * _randn(6, 5, seed=seed), 2 * _randn(6, 5, seed=seed + 1)


def _softmax(row, temperature=1.):
    exponentials = [math.exp(v / temperature) for v in row]
    return [v / sum(exponentials) for v in exponentials]


def _kl(p, q):
    return sum(x * math.log(x / y) for x, y in zip(p, q))


def _step(logits, teacher_logits=None, student=None, teacher=None, target=LABELS):
    return TrainStep(torch.zeros(logits.shape[1], 3, 8, 8), target, logits, nn.Linear(2, 2), teacher_logits, student,
                     teacher)


# ---- DKD

def test_dkd_against_loops():
    logits, teacher = _logits()
    total = 0.
    for o, a, y in zip(logits.tolist(), teacher.tolist(), LABELS.tolist()):
        q, p = _softmax(o, 4.), _softmax(a, 4.)
        total += 2. * _kl([p[y], 1 - p[y]], [q[y], 1 - q[y]])
        rest = [j for j in range(5) if j != y]
        total += 3. * _kl(_softmax([a[j] for j in rest], 4.), _softmax([o[j] for j in rest], 4.))
    assert dkd_loss(logits, teacher, LABELS, 2., 3., 4.).item() == pytest.approx(16 * total / 6, rel=1e-12)


def test_dkd_is_kd_where_the_others_weigh_their_probability():
    """alpha = 1 and beta = 1 - p_target, sample by sample (Eq. 6 of its paper)."""
    logits, teacher = _logits()
    total = sum(dkd_loss(o[None], a[None], y[None], 1., 1 - (a / 4).softmax(-1)[y].item(), 4.).item()
                for o, a, y in zip(logits, teacher, LABELS))
    assert total / 6 == pytest.approx(kd_loss(logits, teacher, 4.).item(), rel=1e-10)


@pytest.mark.parametrize('scale', [100., 1e4])
def test_dkd_of_certain_predictions_is_finite(scale):
    """The target's probability rounds to 1, that of the others to 0."""
    logits = (scale * F.one_hot(LABELS, 5)).float().requires_grad_()
    loss = dkd_loss(logits, -logits.detach(), LABELS)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all() and loss > 0


# ---- DIST

def test_dist_against_loops():
    logits, teacher = _logits()
    q, p = [[_softmax(row, 2.) for row in x.tolist()] for x in (logits, teacher)]

    def mean_correlation(a, b):
        values = []
        for x, y in zip(a, b):
            mx, my = sum(x) / len(x), sum(y) / len(y)
            top = sum((u - mx) * (v - my) for u, v in zip(x, y))
            values.append(top / math.sqrt(sum((u - mx) ** 2 for u in x) * sum((v - my) ** 2 for v in y)))
        return sum(values) / len(values)

    rows, columns = mean_correlation(q, p), mean_correlation(list(zip(*q)), list(zip(*p)))
    assert dist_loss(logits, teacher, 2., 3., 5.).item() == pytest.approx(
        4 * (3 * (1 - rows) + 5 * (1 - columns)), rel=1e-10)


def test_dist_of_constant_rows():
    flat, other = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True), _randn(4, 3)
    assert dist_loss(flat, flat.detach()).item() == 0.
    loss = dist_loss(flat, other, 1.)
    loss.backward()
    assert loss.item() == 4. and torch.isfinite(flat.grad).all()  # no correlation in rows or columns


# ---- standardised logits

def test_standardized_by_hand():
    torch.testing.assert_close(
        standardize(torch.tensor([[1., 2., 3.]], dtype=torch.float64)),
        torch.tensor([[-1., 0., 1.]], dtype=torch.float64), rtol=0, atol=2e-7)  # the deviation is 1 + 1e-7
    assert torch.equal(standardize(torch.full((2, 3), 7.)), torch.zeros(2, 3))


def test_standardized_kd_does_not_see_scale_and_shift():
    logits, teacher = _logits()
    loss = create_loss('kd_standardized', temperature=3.)
    value = loss(_step(logits[None], teacher)).item()
    assert value == pytest.approx(kd_loss(standardize(logits), standardize(teacher), 3.).item(), rel=1e-12)
    # 1e-7 beside the deviation is what is seen
    assert loss(_step(7 * logits[None] + 3, teacher)).item() == pytest.approx(value, rel=1e-5)
    assert loss(_step(5 * teacher[None], teacher)).item() < 1e-9 < loss(_step(-teacher[None], teacher)).item()


# ---- HTA-KL

def test_hta_kl_by_hand():
    p = torch.tensor([[0.6, 0.4]], dtype=torch.float64).log()
    for mass in (0., 0.5, 0.7, 1.):  # both divergences are equal, so that their shares do not matter
        assert hta_kl_loss(p.flip(-1), p, 1., mass).item() == pytest.approx(0.2 * math.log(1.5), rel=1e-12)
    assert 0.2 * math.log(1.5) == pytest.approx(0.0811, abs=5e-5)


def test_hta_kl_against_loops():
    logits, teacher = _logits()
    total = 0.
    for o, a in zip(logits.tolist(), teacher.tolist()):
        q, p = _softmax(o, 2.), _softmax(a, 2.)
        head, mass = set(), 0.
        for j in sorted(range(5), key=lambda j: -p[j]):
            mass += p[j]
            if mass <= 0.7:
                head.add(j)
        g_head = sum(abs(p[j] - q[j]) for j in head)
        g_tail = sum(abs(p[j] - q[j]) for j in range(5) if j not in head)
        total += (g_head * _kl(p, q) + g_tail * _kl(q, p)) / (g_head + g_tail)
    assert hta_kl_loss(logits, teacher, 2., 0.7).item() == pytest.approx(4 * total / 6, rel=1e-12)


# ---- TSER and TWSNN

def test_entropy_of_equal_logits_is_that_of_the_uniform():
    logits = torch.zeros(3, 4, 5, dtype=torch.float64)
    assert step_entropy(logits, 2.).item() == pytest.approx(math.log(5), rel=1e-12)
    assert step_entropy(1000. * F.one_hot(torch.arange(5)).double()).item() == 0.


def test_tser_against_loops():
    o, teacher = 2 * _randn(3, 6, 5), 2 * _randn(6, 5, seed=1)
    total = 0.
    for step in o.tolist():
        for row, a, y in zip(step, teacher.tolist(), LABELS.tolist()):
            q = _softmax(row, 3.)
            total += (0.6 * -math.log(_softmax(row)[y]) + 0.4 * 9 * _kl(_softmax(a, 3.), q)
                      - 0.2 * -sum(v * math.log(v) for v in q))
    loss = create_loss('tser', kd_share=0.4, entropy_weight=0.2, temperature=3.)(_step(o, teacher))
    assert loss.item() == pytest.approx(total / 18, rel=1e-10)


def test_twsnn_against_loops():
    o, teacher = 2 * _randn(3, 6, 5), 2 * _randn(6, 5, seed=1)
    mean, total = o.mean(0).tolist(), 0.
    for step in o.tolist():
        for row, a, s, y in zip(step, teacher.tolist(), mean, LABELS.tolist()):
            q = _softmax(row, 3.)
            total += (-math.log(_softmax(row)[y]) + 0.3 * 9 * _kl(_softmax(a, 3.), q)
                      + 0.7 * 9 * _kl(_softmax(s, 3.), q))
    loss = create_loss('twsnn', teacher_weight=0.3, self_weight=0.7)(_step(o, teacher))
    assert loss.item() == pytest.approx(total / 18, rel=1e-5)


def test_self_teacher_of_the_correct_steps():
    # sample 0 is right at the first step only, sample 1 never
    o = torch.tensor([[[2., 0.], [2., 0.]], [[0., 1.], [2., 0.]]], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 1])
    never = 9 * _kl([0.5, 0.5], _softmax([2., 0.], 3.))
    assert never == pytest.approx(0.491, abs=5e-4)
    first = 9 * _kl(_softmax([2., 0.], 3.), _softmax([0., 1.], 3.)) / 2  # the right step itself differs by nothing
    loss = self_distillation_loss(o, target, 'correct')
    assert loss.item() == pytest.approx((first + never) / 2, rel=1e-10)
    masked = self_distillation_loss(o, target, 'correct_masked')
    assert masked.item() == pytest.approx(first / 2, rel=1e-10)
    gradient, = torch.autograd.grad(masked, o)
    assert gradient[:, 1].abs().max() == 0. and gradient[1, 0].abs().max() > 0
    assert gradient[0, 0].abs().max() < 1e-12  # no gradient through the self-teacher


def test_twsnn_needs_labels_for_correct_steps():
    soft = torch.full((6, 5), 0.2, dtype=torch.float64)
    step = _step(_randn(2, 6, 5), _randn(6, 5, seed=1), target=soft)
    assert torch.isfinite(create_loss('twsnn')(step))
    with pytest.raises(ValueError, match="loss 'twsnn' needs one label per sample"):
        create_loss('twsnn', steps='correct')(step)


# ---- features

def test_attention_by_hand():
    """Maps that are active at one place each, two different ones: 2 / (H W)."""
    s, a = torch.zeros(1, 2, 3, 4, 4), torch.zeros(1, 2, 3, 4, 4)
    s[0, :, :, 0, 0], a[0, :, :, 3, 3] = 5., 0.1
    assert attention_transfer(_step(_randn(1, 2, 5), None, [s], [a])).item() == pytest.approx(2 / 16, rel=1e-6)


def test_attention_is_of_the_mean_over_time():
    """Not the mean of the squares, which for spikes is the rate itself."""
    s = (torch.rand(4, 3, 5, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.4).double()
    a = _randn(1, 3, 5, 4, 4)
    expected = F.normalize(s.mean(0).square().mean(1).flatten(1)) - F.normalize(a[0].square().mean(1).flatten(1))
    pooled = [_randn(4, 3, 5), _randn(1, 3, 5)]
    loss = attention_transfer(_step(_randn(4, 3, 5), None, [s, pooled[0]], [a, pooled[1]]))
    assert loss.item() == pytest.approx(expected.square().mean().item(), rel=1e-12)
    with pytest.raises(ValueError, match='no tap has one'):
        attention_transfer(_step(_randn(4, 3, 5), None, pooled[:1], pooled[1:]))


def test_attention_of_maps_of_two_sizes_and_of_silence():
    a = _randn(1, 3, 5, 4, 4)
    large = a.repeat_interleave(2, 3).repeat_interleave(2, 4)  # pooled, it is the same map
    assert attention_transfer(_step(_randn(1, 3, 5), None, [large], [a])).item() == pytest.approx(0., abs=1e-15)
    silent = torch.zeros(2, 3, 5, 4, 4, dtype=torch.float64, requires_grad=True)
    attention_transfer(_step(_randn(2, 3, 5), None, [silent], [a])).backward()
    assert torch.isfinite(silent.grad).all() and attention_map(silent[0]).abs().max() == 0


def test_similarity_preserving_against_loops():
    s, a = _randn(5, 7), _randn(5, 3, seed=1)

    def gram(x):
        rows = [[sum(u * v for u, v in zip(p, q)) for q in x.tolist()] for p in x.tolist()]
        return [[v / math.sqrt(sum(w * w for w in row)) for v in row] for row in rows]

    expected = sum((u - v) ** 2 for p, q in zip(gram(s), gram(a)) for u, v in zip(p, q)) / 25
    assert similarity_loss(s, a).item() == pytest.approx(expected, rel=1e-12)
    rotation = torch.linalg.qr(_randn(7, 7, seed=2)).Q
    assert similarity_loss(3 * s @ rotation, s).item() == pytest.approx(0., abs=1e-20)


def test_cka_loss_is_one_minus_cka():
    s, a = _randn(2, 8, 3, 2, 2), _randn(1, 8, 6, seed=1)
    for unbiased in (True, False):
        expected = 1 - cka(s.transpose(0, 1), a[0], unbiased)
        assert cka_loss(s, a, unbiased).item() == pytest.approx(expected.item(), rel=1e-10)
    rotation = torch.linalg.qr(_randn(6, 6, seed=2)).Q
    assert cka_loss(5 * a @ rotation, a).item() == pytest.approx(0., abs=1e-12)


def test_cka_loss_gradient_is_orthogonal_to_the_feature():
    """The scale of a feature does not matter. A shift of all samples does not either."""
    s, a = _randn(2, 8, 5).requires_grad_(), _randn(1, 8, 6, seed=1)
    cka_loss(s, a).backward()
    assert abs((s.grad * s).sum().item()) < 1e-12 < s.grad.abs().max().item()
    torch.testing.assert_close(s.grad.sum(1), torch.zeros(2, 5, dtype=torch.float64), rtol=0, atol=1e-12)


def test_cka_loss_of_a_silent_tap():
    s = torch.zeros(2, 8, 5, dtype=torch.float64, requires_grad=True)
    loss = cka_loss(s, _randn(1, 8, 6))
    loss.backward()
    assert loss.item() == 1. and s.grad.abs().max() == 0.


def test_kdsnn_features_against_loops():
    torch.manual_seed(0)
    s, a = [_randn(3, 4, 2, 3, 3), _randn(3, 4, 5)], [_randn(1, 4, 6, 3, 3, seed=1), _randn(1, 4, 5, seed=2)]
    state = torch.get_rng_state()
    loss = create_loss('kdsnn_features', names=['a', 'b'], student_channels=[2, 5], teacher_channels=[6, 5]).double()
    assert torch.equal(torch.get_rng_state(), state)
    assert sum(p.numel() for p in loss.parameters()) == 12  # a map where the channels differ
    weight = next(loss.parameters())
    mapped = F.conv2d(s[0].mean(0), weight[:, :, None, None])
    expected = ((mapped - a[0][0]).square().mean() + (s[1].mean(0) - a[1][0]).square().mean()) / 2
    assert loss(_step(_randn(3, 4, 5), None, s, a)).item() == pytest.approx(expected.item(), rel=1e-12)
    always = create_loss('kdsnn_features', names=['a'], student_channels=[5], teacher_channels=[5], align=True)
    assert sum(p.numel() for p in always.parameters()) == 25


@pytest.mark.parametrize('name, options, words', [
    ('dkd', dict(temperature=0.), 'temperature=0.0'), ('dist', dict(temperature=-1.), 'temperature=-1.0'),
    ('hta_kl', dict(head_mass=1.5), r'head_mass=1.5: must lie in \[0, 1\]'),
    ('tser', dict(kd_share=2.), 'kd_share=2.0'),
    ('twsnn', dict(steps='right'), 'steps=right: must be one of'),
    ('kd_standardized', dict(temperature=0.), 'temperature')])
def test_options_out_of_range(name, options, words):
    with pytest.raises(ValueError, match=words):
        create_loss(name, **options)


# ---- EnOF, and what a task tells a loss

def _models(teacher='test_resnet', **kwargs):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return (timm.create_model('spiking_test_resnet', num_classes=5, timesteps=2).train(),
                timm.create_model(teacher, num_classes=7, **kwargs))


def test_enof_is_kd_through_the_teachers_classifier():
    head = nn.Linear(4, 7).double()
    s, a = [_randn(3, 6, 2, 4, 4), _randn(3, 6, 4)], [_randn(1, 6, 2, 4, 4, seed=1), _randn(1, 6, 4, seed=2)]
    step = _step(_randn(3, 6, 5), None, s, a)
    step.teacher_head = head
    taps = dict(names=['a', 'b'], student_channels=[2, 4], teacher_channels=[2, 4])
    value = create_loss('enof', **taps, temperature=2.)(step)
    assert value.item() == pytest.approx(kd_loss(head(s[1].mean(0)), head(a[1][0]), 2.).item(), rel=1e-12)
    mapped = create_loss('enof', **{**taps, 'student_channels': [2, 3]})
    assert sum(p.numel() for p in mapped.parameters()) == 3 * 4 + 4


def test_enof_in_a_task():
    """The head is the teacher's own, is no part of what is trained, and the classes may differ from the student's."""
    student, teacher = _models()
    task = SSCLTask(student, teacher, {'enof': 1.}, taps=1, verbose=False).train()
    x, y = torch.randn(4, 3, 32, 32), torch.arange(4)
    result = task(x, y)
    result['loss'].backward()
    pooled = student.forward_head(student.forward_features(x), pre_logits=True)
    with torch.no_grad():
        logits = teacher(x)
    assert pooled.shape == (4, 96)
    assert result['enof_loss'].item() == pytest.approx(
        kd_loss(teacher.get_classifier()(pooled), logits, 1.).item(), rel=1e-4)  # float32, and batch norm twice
    assert not any('head' in name for name, _ in task.trainable_module.named_parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_teacher_without_a_classifier():
    student, _ = _models()
    with pytest.raises(ValueError, match="a loss uses the teacher's classifier, but ResNet has none"):
        SSCLTask(student, timm.create_model('test_resnet', num_classes=0), {'enof': 1.}, taps=1, verbose=False)


def test_losses_are_told_the_progress():
    seen = []

    @register_loss('test_progress')
    def progress(step):
        seen.append(None if step.progress is None else step.progress.item())
        return step.logits.mean() * 0

    task = SSCLTask(_models()[0], None, {'test_progress': 1.}, verbose=False).train()
    x, y = torch.randn(2, 3, 32, 32), torch.arange(2)
    task(x, y)
    for share in (0., 0.25, 1.):
        task.set_progress(share)
        task(x, y)
    assert seen == [None, 0., 0.25, 1.]
    assert not any('progress' in key for key in task.trainable_module.state_dict())
    with pytest.raises(ValueError, match='progress=1.5'):
        task.set_progress(1.5)


def test_dkd_warms_up():
    logits, teacher = _logits()
    step, full = _step(logits[None], teacher), dkd_loss(*_logits(), LABELS).item()
    loss = create_loss('dkd', warmup=0.2)
    with pytest.raises(ValueError, match='warmup=0.2: needs the progress'):
        loss(step)
    for share, factor in ((0., 0.), (0.05, 0.25), (0.2, 1.), (0.9, 1.)):
        step.progress = torch.tensor(share, dtype=torch.float64)
        assert loss(step).item() == pytest.approx(factor * full, rel=1e-12)
    with pytest.raises(ValueError, match='warmup=2'):
        create_loss('dkd', warmup=2.)


def test_mixup_and_a_loss_that_needs_labels_are_refused(tmp_path, monkeypatch, capsys):
    argv = ['--dataset', 'digits', '--loss', 'dkd=1', '--mixup', '0.2', *TINY]
    code, line = fails(argv, tmp_path, monkeypatch, capsys)
    assert code and '--mixup and --cutmix make soft targets, but the loss dkd needs labels' in line


def test_needs_may_depend_on_options(tmp_path, monkeypatch, capsys):
    spec = loss_spec('twsnn')
    assert not spec.needs_labels and not spec.with_options(dict(temperature=2.)).needs_labels
    assert spec.with_options(dict(steps='correct')).needs_labels and loss_spec('dkd').with_options({}).needs_labels
    argv = ['--dataset', 'digits', '--loss', 'twsnn', '--loss-kwargs', 'twsnn.steps=correct', '--mixup', '0.2', *TINY]
    code, line = fails(argv, tmp_path, monkeypatch, capsys)
    assert code and 'but the loss twsnn needs labels with twsnn.steps=correct; leave them out' in line
