"""CRD: its closed form, loops over pairs, the memory, exact negatives, and the index on its way through the script."""
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from loops import LABELS, assert_equal_with_gradient, make_step, randn
from runs import TINY, fails, run_here

from timm_sscl import SSCLTask, create_loss, register_loss
from timm_sscl.losses import crd_side, loss_spec, unregister_loss

N, K, DIM = 40, 30, 8
INDEX = torch.tensor([11, 17, 5, 21, 8, 39])


def _loss(**options):
    options = {**dict(dim=DIM, num_negatives=K), **options}
    torch.manual_seed(0)
    return create_loss('crd', names=['pooled'], student_channels=[4], teacher_channels=[3], num_samples=N,
                       **options).double()


def _step(index=INDEX):
    return make_step(
        randn(2, 6, 5), student_features=[randn(2, 6, 4, seed=2).requires_grad_()],
        teacher_features=[randn(1, 6, 3, seed=3)], index=index)


def _draw(loss):
    """The negatives that the next call draws from this state of the generator."""
    torch.manual_seed(5)
    return torch.randint(N, (loss.num_negatives,))


# ---- one side

@pytest.mark.parametrize('num', [1, 5, 16384])
def test_equal_scores_have_a_closed_form(num):
    """P = 1 / n for all: ln(K + 1) + K ln((K + 1) / K), whatever the score is."""
    score = torch.full((3, 1), .7, dtype=torch.float64)
    value = crd_side(score[:, 0], score.expand(3, num), torch.ones(3, num, dtype=torch.bool), score[0, 0]).item()
    assert value == pytest.approx(math.log(num + 1) + num * math.log1p(1 / num), rel=1e-9)
    if num == 16384:
        assert value == pytest.approx(10.704, abs=5e-4)


def test_a_constant_network_starts_at_the_closed_form():
    loss = _loss(exact=False, num_negatives=16384)
    for bank, embed in ((loss.student_bank, loss.embed_student), (loss.teacher_bank, loss.embed_teacher)):
        bank.copy_(F.normalize(torch.ones(N, DIM), dim=1))
        torch.nn.init.zeros_(embed.weight)
    assert loss(_step()).item() == pytest.approx(2 * 10.704, abs=1e-3)


def test_invalid_negatives_are_extrapolated():
    positive, negative = randn(3), randn(3, 4, seed=1)
    valid = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()
    total = 0.
    for i in range(3):
        terms = [math.log1p(math.exp(v - math.log(4))) for v, ok in zip(negative[i].tolist(), valid[i]) if ok]
        total += math.log1p(math.exp(math.log(4) - positive[i].item())) + 4 * sum(terms) / max(len(terms), 1)
    assert crd_side(positive, negative, valid, torch.zeros(())).item() == pytest.approx(total / 3, rel=1e-6)


# ---- the loss

@pytest.mark.parametrize('exact', [False, True])
def test_against_loops(exact):
    loss, step = _loss(exact=exact, temperature=.5), _step()
    if exact:
        loss.labels.copy_(torch.arange(N) % 5)
    loss.eval()
    drawn = _draw(loss).tolist()
    assert INDEX[0].item() in drawn  # a row's own sample
    student, teacher = step.student_features[0].mean(0), step.teacher_features[0][0]
    rows = [[row / row.square().sum().sqrt() for row in (x @ embed.weight.T + embed.bias)]
            for x, embed in ((student, loss.embed_student), (teacher, loss.embed_teacher))]
    total = 0.
    for own, bank in zip(rows, (loss.teacher_bank, loss.student_bank)):
        scores, exponentials = [], []
        for row, i, y in zip(own, INDEX.tolist(), LABELS.tolist()):
            others = [j for j in drawn if j != i and not (exact and j % 5 == y)]
            scores.append((torch.dot(row, bank[i]) / .5, [torch.dot(row, bank[j]) / .5 for j in others]))
            exponentials += [math.exp(v.item()) for v in (scores[-1][0], *scores[-1][1])]
        z = N * sum(exponentials) / len(exponentials)
        for positive, negatives in scores:
            p = torch.exp(positive) / z
            total = total - torch.log(p / (p + K / N))
            p = [torch.exp(v) / z for v in negatives]
            total = total - K / len(p) * sum(torch.log(K / N / (v + K / N)) for v in p)
    _draw(loss)
    torch.manual_seed(5)
    assert_equal_with_gradient(
        loss(step), total / 6, [step.student_features[0], loss.embed_student.weight, loss.embed_teacher.bias])


def test_memory_moves_in_place_in_training_only():
    loss, step = _loss(), _step()
    names = ['student_bank', 'teacher_bank', 'log_scale', 'labels']
    buffers = {name: getattr(loss, name) for name in names}
    before = {name: b.clone() for name, b in buffers.items()}
    loss.eval()(step)
    assert all(torch.equal(b, before[name]) or name == 'log_scale' for name, b in buffers.items())
    assert loss.log_scale.isnan().all()
    loss.train()(step)
    assert all(getattr(loss, name) is b for name, b in buffers.items())  # a CUDA graph writes to the same memory
    rest = [i for i in range(N) if i not in INDEX.tolist()]
    for bank, embed, feature in (('student_bank', loss.embed_student, step.student_features[0].mean(0)),
                                 ('teacher_bank', loss.embed_teacher, step.teacher_features[0][0])):
        moved = .5 * before[bank][INDEX] + .5 * F.normalize(embed(feature), dim=1)
        torch.testing.assert_close(getattr(loss, bank)[INDEX], F.normalize(moved, dim=1), rtol=1e-12, atol=1e-14)
        assert torch.equal(getattr(loss, bank)[rest], before[bank][rest])
    assert loss.labels[INDEX].tolist() == LABELS.tolist() and (loss.labels[rest] == -1).all()
    scale = loss.log_scale.clone()
    assert scale.isfinite().all()
    loss(_step(torch.arange(6)))
    assert torch.equal(loss.log_scale, scale)  # that of the first step stays
    assert {*names} <= {*loss.state_dict()} and 'labels' not in _loss(exact=False).state_dict()


def test_all_of_one_class_leave_no_exact_negatives():
    loss, step = _loss(), _step()
    loss.labels.fill_(2)
    step.target = torch.full((6,), 2)
    value = loss(step)
    value.backward()
    assert value.isfinite() and step.student_features[0].grad.isfinite().all()


def test_labels_are_needed_for_exact_negatives_only():
    spec = loss_spec('crd')
    assert spec.needs_labels and not spec.with_options(dict(exact=False)).needs_labels and spec.needs_index
    assert 'num_samples' not in spec.options
    step = _step()
    step.target = torch.full((6, 5), .2)
    assert _loss(exact=False)(step).isfinite()
    with pytest.raises(ValueError, match="loss 'crd' needs one label per sample"):
        _loss()(step)
    for option in (dict(momentum=2.), dict(num_negatives=0), dict(temperature=0.)):
        with pytest.raises(ValueError, match=next(iter(option))):
            _loss(**option)


# ---- in a task

def _task(**kwargs):
    torch.manual_seed(0)
    return SSCLTask(
        timm.create_model('spiking_test_resnet', num_classes=5, timesteps=2),
        timm.create_model('test_resnet', num_classes=5), {'crd': 1.}, {'crd': dict(num_negatives=64)}, verbose=False,
        input_size=(3, 32, 32), **kwargs).train()


def test_maps_and_student_are_trained():
    task = _task(num_samples=8)
    task(torch.randn(4, 3, 32, 32), torch.arange(4), index=torch.tensor([7, 2, 0, 3]))['crd_loss'].backward()
    assert all(p.grad.abs().max() > 0 for p in task.trainable_module.losses.parameters())
    assert task.student.conv1[0].weight.grad.abs().max() > 0
    assert task.trainable_module.losses['crd'].labels.tolist() == [2, -1, 1, 3, -1, -1, -1, 0]


def test_index_is_asked_for():
    x, y = torch.randn(4, 3, 32, 32), torch.arange(4)
    with pytest.raises(ValueError, match="num_samples=None: loss 'crd' uses the indices"):
        _task()
    task = _task(num_samples=8)
    for index in (None, torch.arange(3), torch.arange(4.)):
        with pytest.raises(ValueError, match='index=.*: loss crd uses the indices'):
            task(x, y, index=index)


# ---- in the script

def test_every_sample_comes_with_its_index(tmp_path, monkeypatch):
    """Of two epochs, with mixup, whose images are mixed but whose indices stay."""
    seen = []

    @register_loss('index', needs_index=True)
    def see(step):
        seen.append(step.index.clone())
        return step.logits.square().mean()

    try:
        run_here(['--loss', 'index', '--mixup', '0.2', '--workers', '0', *TINY], tmp_path, monkeypatch)
    finally:
        unregister_loss('index')
    epochs = torch.cat(seen).view(2, 64)
    assert all(torch.equal(epoch.sort().values, torch.arange(64)) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])


def test_mixup_and_exact_negatives_are_refused(tmp_path, monkeypatch, capsys):
    code, line = fails(['--dataset', 'digits', '--loss', 'crd', '--mixup', '0.2', *TINY], tmp_path, monkeypatch, capsys)
    assert code and 'the loss crd needs labels' in line
