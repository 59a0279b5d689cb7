"""Queue of past teacher rows: the critics against loops, what is in the queue and when, resuming, several processes."""
import math

import pytest
import torch
import torch.distributed as dist

from processes import run_processes
from timm_sscl.losses import SSCLCriterion, info_nce_loss, nce_loss
from timm_sscl.training.command_line.options import OptionError, parse_args

CRITICS = ['normalized', 'literal', 'infonce']


def _randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- the critics

def _exp_scores(s, a, t=0.1):
    def unit(row):
        norm = math.sqrt(math.fsum(v * v for v in row))
        return [v / norm for v in row]
    return [[math.exp(math.fsum(u * v for u, v in zip(unit(p), unit(q))) / t) for q in a.tolist()] for p in s.tolist()]


def _reference(critic, s, a, queue, num_pairs=None):
    """Loops; queue is a list of rows, possibly empty."""
    e = _exp_scores(s, torch.cat([a, *[row.view(1, -1) for row in queue]]))
    n, columns = len(e), len(e[0])
    if critic == 'infonce':
        forth = sum(-math.log(e[i][i] / sum(e[i])) for i in range(n))
        back = sum(-math.log(e[i][i] / sum(e[j][i] for j in range(n))) for i in range(n))
        return (forth + back) / (2 * n)
    negatives = [e[i][j] for i in range(n) for j in range(columns) if i != j]
    offset = (columns / (n * columns if num_pairs is None else num_pairs) if critic == 'literal'
              else (columns - 1) * math.fsum(negatives) / len(negatives))
    total = 0.
    for i in range(n):
        for j in range(columns):
            total += math.log(e[i][j] / (e[i][j] + offset)) if i == j else math.log(offset / (e[i][j] + offset))
    return -total / n


def _loss(critic, s, a, **queue):
    if critic == 'infonce':
        return info_nce_loss(s, a, **queue)
    return nce_loss(s, a, normalize=critic == 'normalized', **queue)


def _rows(n=4, q=6, d=5):
    a = _randn(n, d)
    return a + _randn(n, d, seed=1), a, _randn(q, d, seed=2)


@pytest.mark.parametrize('critic', CRITICS)
@pytest.mark.parametrize('n,q', [(4, 6), (2, 1), (3, 20)])
def test_against_loops(critic, n, q):
    s, a, queue = _rows(n, q)
    # scores reach 1 / 0.1: some 1e-15 * 10 of round-off
    assert _loss(critic, s, a, queue=queue).item() == pytest.approx(_reference(critic, s, a, queue), rel=1e-12)
    assert _loss(critic, s, a).item() == pytest.approx(_reference(critic, s, a, []), rel=1e-12)


def test_literal_with_num_pairs_against_loops():
    s, a, queue = _rows()
    assert nce_loss(s, a, num_pairs=1000., normalize=False, queue=queue).item() == pytest.approx(
        _reference('literal', s, a, queue, 1000.), rel=1e-12)


@pytest.mark.parametrize('critic', CRITICS)
def test_rows_that_do_not_count_are_as_if_absent(critic):
    s, a, queue = _rows()
    s.requires_grad_()
    mask = torch.tensor([True, False, True, True, False, False])
    junk = torch.where(mask[:, None], queue, 100 * queue)
    for rows, marks in ((junk, mask), (queue, mask.new_zeros(6))):
        value = _loss(critic, s, a, queue=rows, queue_mask=marks)
        expected = _loss(critic, s, a, queue=rows[marks]) if marks.any() else _loss(critic, s, a)
        assert value.item() == pytest.approx(expected.item(), rel=1e-12)
        for got, want in zip(torch.autograd.grad(value, s), torch.autograd.grad(expected, s)):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize('critic', CRITICS)
def test_shapes_that_do_not_fit_raise(critic):
    s, a, queue = _rows()
    with pytest.raises(ValueError, match=r'queue \(6, 4\).*\(Q, d\)'):
        _loss(critic, s, a, queue=queue[:, :4])
    with pytest.raises(ValueError, match=r'queue_mask \(5,\).*\(6,\)'):
        _loss(critic, s, a, queue=queue, queue_mask=torch.ones(5, dtype=torch.bool))


# ---- the criterion

def _criterion(critic='normalized', queue_size=7, **options):
    torch.manual_seed(0)
    return SSCLCriterion(['a', 'b'], [3, 4], [5, 6], dim=8, critic=critic, temperature=0.1, weighting='uniform',
                         queue_size=queue_size, **options).double().train()


def _features(n=4, seed=0):
    return ([_randn(2, n, 3, 4, 4, seed=seed), _randn(2, n, 4, seed=seed + 1)],
            [_randn(1, n, 5, 4, 4, seed=seed + 2), _randn(1, n, 6, seed=seed + 3)])


def _project(g, x):
    return g(x.flatten(3).mean((0, 3)) if x.ndim > 3 else x.mean(0))


@pytest.mark.parametrize('critic', CRITICS)
def test_steps_against_loops(critic):
    """Four steps of four samples into a queue of seven: it fills, overflows, and the projections move meanwhile."""
    criterion = _criterion(critic)
    optimizer = torch.optim.SGD(criterion.parameters(), lr=0.1)
    queues = [[], []]  # newest first, in the order of a batch
    for step in range(4):
        student, teacher = _features(seed=10 * step)
        expected = 0.
        for i, name in enumerate('ab'):
            s = _project(criterion.g_student[i], student[i]).detach()
            a = _project(criterion.g_teacher[i], teacher[i]).detach()
            nce = _reference(critic, s, a, queues[i])
            expected += nce
            queues[i] = [*a, *queues[i]][:7]
        filled = min(4 * step, 7)
        loss = criterion(student, teacher)
        assert loss.item() == pytest.approx(expected, rel=1e-11)
        bound = {'infonce': (math.log(4) + math.log(4 + filled)) / 2}.get(critic, math.log(3 + filled)) - nce
        assert criterion.stats['b']['mi_bound'] == pytest.approx(bound, rel=1e-5)  # stats are float32
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize('critic', CRITICS)
def test_gradient_flows_through_the_batchs_own_rows_only(critic):
    criterion, twin = _criterion(critic), _criterion(critic)
    criterion(*_features())
    student, teacher = _features(seed=10)
    criterion(student, teacher).backward()
    with torch.no_grad():
        queue = [_project(g, x) for g, x in zip(twin.g_teacher, _features()[1])]
    total = sum(_loss(critic, _project(g, s), _project(h, a), queue=rows)
                for g, h, s, a, rows in zip(twin.g_student, twin.g_teacher, student, teacher, queue))
    total.backward()
    for p, q in zip(criterion.parameters(), twin.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-13)


def test_accumulated_batch_has_the_negatives_of_the_whole():
    """Three micro-batches of 4: with a queue of 8, each has the 11 negatives that the batch of 12 has."""
    criterion = _criterion(queue_size=8)
    for seed in range(3):
        criterion(*_features(seed=10 * seed))
    assert criterion.queue_filled == 8
    student, teacher = _features(12, seed=90)
    whole = _criterion(queue_size=0)
    whole(student, teacher)
    criterion([s[:, :4] for s in student], [a[:, :4] for a in teacher])
    for values in (*whole.stats.values(), *criterion.stats.values()):
        assert values['mi_bound'] + values['nce'] == pytest.approx(math.log(11), rel=1e-5)


def test_queue_smaller_than_the_batch():
    criterion = _criterion(queue_size=2)
    student, teacher = _features()
    criterion(student, teacher)
    rows = torch.stack([_project(g, a)[:2] for g, a in zip(criterion.g_teacher, teacher)])
    assert torch.equal(criterion.queue, rows) and criterion.queue_filled == 2


def test_evaluation_uses_the_queue_and_leaves_it():
    criterion = _criterion()
    criterion(*_features())
    before = criterion.queue.clone()
    value = criterion.eval()(*_features(seed=10)).item()
    assert torch.equal(criterion.queue, before) and criterion.queue_filled == 4
    assert criterion.train()(*_features(seed=10)).item() == value


def test_resumed_run_has_the_same_negatives():
    criterion, resumed = _criterion(), _criterion()
    criterion(*_features())
    resumed.load_state_dict(criterion.state_dict())
    for seed in (10, 20):
        assert resumed(*_features(seed=seed)).item() == criterion(*_features(seed=seed)).item()
    assert not any('queue' in key for key in _criterion(queue_size=0).state_dict())


def test_no_queue_is_the_plain_loss():
    plain = SSCLCriterion(
        ['a', 'b'], [3, 4], [5, 6], dim=8, critic='normalized', temperature=0.1, weighting='uniform').double().train()
    criterion = _criterion(queue_size=0)
    plain.load_state_dict(criterion.state_dict())
    for seed in range(2):
        assert plain(*_features(seed=seed)).item() == criterion(*_features(seed=seed)).item()


def test_compiles_once_while_the_queue_fills():
    criterion, plain = _criterion('infonce'), _criterion('infonce')
    compiled = torch.compile(criterion, fullgraph=True, backend='aot_eager')
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(3):
            features = _features(seed=10 * step)
            assert compiled(*features).item() == pytest.approx(plain(*features).item(), rel=1e-12)
    assert torch.equal(criterion.queue, plain.queue)


@pytest.mark.parametrize('queue_size', [-1, 2.5])
def test_sizes_that_are_none_raise(queue_size):
    with pytest.raises(ValueError, match=f'queue_size={queue_size}'):
        _criterion(queue_size=queue_size)


def test_command_line():
    args, _ = parse_args(['--sscl-queue', '512', '--loss', 'sscl,contrastive'])
    assert args.loss_options['sscl']['queue_size'] == args.loss_options['contrastive']['queue_size'] == 512
    with pytest.raises(OptionError, match='queue_size=-1'):
        parse_args(['--sscl-queue', '-1'])


# ---- two processes

SPLIT = (5, 3)


def _run(rank=None):
    """Losses, gradients and the queue over three steps, on the whole batch or on a process's part of it."""
    criterion, results = _criterion(), []
    for step in range(3):
        student, teacher = ([x if rank is None else x.split(SPLIT, 1)[rank] for x in features]
                            for features in _features(8, seed=10 * step))
        criterion.zero_grad()
        loss = criterion(student, teacher)
        loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in criterion.parameters()])
        if rank is not None:  # DDP's mean
            dist.all_reduce(gradients)
            gradients /= 2
        results.append((loss.detach(), gradients, criterion.queue.clone(), criterion.queue_filled.clone()))
    return results


@pytest.mark.slow
def test_two_processes_hold_one_queue(tmp_path):
    expected = _run()
    for of_rank in run_processes(_run, 2, tmp_path):
        for got, want in zip(of_rank, expected):
            for x, y in zip(got, want):
                torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)  # gradients summed in another order
