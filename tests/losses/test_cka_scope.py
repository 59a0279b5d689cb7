"""CKA of the global batch: several processes give what one gives on the whole batch, and exchange blocks only."""
import pytest
import torch
import torch.distributed as dist

from processes import run_processes
from timm_sscl import SSCLLoss
from timm_sscl.losses import SSCLCriterion
from timm_sscl.training.command_line.options import OptionError, parse_args
from timm_sscl.losses.cka import RunningCKA

SIZES = {2: [(4, 4), (5, 4), (4, 3), (2, 5), (1, 3)], 3: [(4, 4, 4), (2, 1, 3), (1, 5, 2)]}
# float64, the sums over blocks in another order; float32 loses half its digits in the difference of large sums
EXACT = dict(rtol=1e-10, atol=1e-13)
SINGLE = dict(rtol=1e-4, atol=1e-6)


def _randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _features(n, seed=0):
    """Non-negative, as after a ReLU, with a mean far from 0; of two shapes and numbers of time steps."""
    student = [_randn(2, n, 3, 4, 4, seed=seed).relu() + 1, _randn(2, n, 5, seed=seed + 1).relu()]
    teacher = [student[0].mean(0, keepdim=True)[:, :, :2] + _randn(1, n, 2, 4, 4, seed=seed + 2),
               student[1][:1] + _randn(1, n, 5, seed=seed + 3)]
    return student, teacher


def _criterion(**options):
    torch.manual_seed(0)
    return SSCLCriterion(['a', 'b'], [3, 5], [2, 5], cka_floor=0.01, **options).double().train()


def _gradients(module):
    return torch.cat([p.grad.flatten() for p in module.parameters()])


def _run(sizes, rank=None):
    """Two steps of everything, on the whole batch or on a process's part of it."""
    def part(x):
        return x if rank is None else x.split(sizes, 1)[rank]

    n, results = sum(sizes), {}
    cka, silent = (RunningCKA(0.3, 'global').double() for _ in range(2))
    single = RunningCKA(1., 'global')
    criterion = _criterion(cka_scope='global')
    for step in range(2):
        student, teacher = ([part(x) for x in features] for features in _features(n, seed=10 * step))
        batch, running = cka(student[0], teacher[0])
        results[f'cka {step}'] = torch.stack([batch, running])
        results[f'silent {step}'] = torch.stack(silent(torch.full_like(student[0], 0.3), teacher[0]))
        results[f'float32 {step}'] = single(student[0].half(), teacher[0].float())[0]
        criterion.zero_grad()
        loss = criterion(student, teacher)
        loss.backward()
        results[f'criterion {step}'] = loss.detach()
        results[f'float32 weights {step}'] = torch.tensor([values['weight'] for values in criterion.stats.values()])
        results[f'gradient {step}'] = _gradients(criterion)
    results['terms'] = cka.terms
    return results


def _worker(rank):
    world_size = dist.get_world_size()
    results = {sizes: _run(sizes, rank) for sizes in SIZES[world_size]}
    own = RunningCKA(1.).double()
    student, teacher = ([x.split(SIZES[world_size][1], 1)[rank] for x in features]
                        for features in _features(sum(SIZES[world_size][1])))
    results['process scope'] = own(student[0], teacher[0])[0]
    # fewer than 4 samples in all
    tiny = [x[:, :1] for x in _features(4)[0]], [x[:, :1] for x in _features(4)[1]]
    cka = RunningCKA(0.3, 'global').double()
    cka(student[0], teacher[0])
    before = cka.value.clone()
    results['tiny'] = torch.stack([*cka(tiny[0][0], tiny[1][0]), before])
    try:
        _criterion(cka_scope='global')(*tiny)
    except ValueError as error:
        results['tiny weights'] = str(error)
    results['tiny uniform'] = _criterion(cka_scope='global', weighting='uniform')(*tiny).item()
    # what travels: a process's features at a time, and sums
    sent = []
    broadcast, all_reduce = dist.broadcast, dist.all_reduce
    dist.broadcast = lambda x, src: (sent.append(x.numel()), broadcast(x, src))[1]
    dist.all_reduce = lambda x, *args: (sent.append(x.numel()), all_reduce(x, *args))[1]
    dist.all_gather = None
    cka(student[0], teacher[0])
    results['sent'] = sent
    return results


@pytest.fixture(scope='module')
def processes(tmp_path_factory):
    return {n: run_processes(_worker, n, tmp_path_factory.mktemp(f'{n}_processes')) for n in SIZES}


@pytest.mark.slow
@pytest.mark.parametrize('sizes', [sizes for of_world in SIZES.values() for sizes in of_world], ids=str)
def test_processes_equal_one_on_the_whole_batch(processes, sizes):
    expected = _run(sizes)
    assert expected['gradient 1'].abs().max() > 1e-2 and expected['float32 weights 1'][0] > 1
    for of_rank in processes[len(sizes)]:
        for name, value in of_rank[sizes].items():
            if name.startswith('gradient'):
                continue
            tolerance = SINGLE if name.startswith('float32') else EXACT
            torch.testing.assert_close(value, expected[name], equal_nan=True, msg=lambda m: f'{name}: {m}', **tolerance)
    assert expected['silent 0'].isnan().all()  # exactly 0 / 0, on several processes as well
    for step in range(2):  # DDP's mean
        mean = torch.stack([of_rank[sizes][f'gradient {step}'] for of_rank in processes[len(sizes)]]).mean(0)
        torch.testing.assert_close(mean, expected[f'gradient {step}'], **EXACT)


@pytest.mark.slow
def test_it_is_another_number_than_the_mean_over_processes(processes):
    for world_size, of_ranks in processes.items():
        sizes = SIZES[world_size][1]
        if max(sizes) >= 4:
            assert abs(of_ranks[0]['process scope'] - of_ranks[0][sizes]['cka 0'][0]) > 1e-3


@pytest.mark.slow
def test_fewer_than_four_samples_in_all(processes):
    for world_size, of_ranks in processes.items():
        for result in of_ranks:
            batch, running, before = result['tiny']
            assert batch.isnan() and running == before  # not taken in
            assert f'batch of {world_size} is too small' in result['tiny weights']
            assert result['tiny uniform'] == result['tiny uniform']  # the loss itself is defined


@pytest.mark.slow
def test_features_travel_one_process_at_a_time(processes):
    for world_size, of_ranks in processes.items():
        sizes = SIZES[world_size][1]
        per_sample = 2 * 3 * 4 * 4  # the student's, the larger
        for result in of_ranks:  # all_gather was taken away before
            assert max(result['sent']) == max(sizes) * per_sample
            assert sorted(n // per_sample for n in result['sent'] if n >= 2 * per_sample) == sorted(
                n for n in sizes if n >= 2)


def test_one_process_is_as_before():
    student, teacher = _features(6)
    for scope in ('process', 'global'):
        torch.manual_seed(0)
        values = [torch.stack(RunningCKA(0.3, scope)(s, a)) for s, a in zip(student, teacher)]
        expected = [torch.stack(RunningCKA(0.3)(s, a)) for s, a in zip(student, teacher)]
        assert all(torch.equal(v, e) for v, e in zip(values, expected))
    assert _criterion(cka_scope='global')(student, teacher).item() == _criterion()(student, teacher).item()
    with pytest.raises(ValueError, match='batch of 3'):
        _criterion(cka_scope='global')(*_features(3))


def test_scopes_that_do_not_exist_raise():
    with pytest.raises(ValueError, match="scope='batch'.*process, global"):
        _criterion(cka_scope='batch')


def test_options(monkeypatch):
    args, _ = parse_args(['--sscl-cka-scope', 'global'])
    assert args.loss_options['sscl']['cka_scope'] == 'global'
    with pytest.raises(OptionError, match='too small'):
        parse_args(['--sscl-cka-scope', 'global', '--batch-size', '2'])
    monkeypatch.setenv('WORLD_SIZE', '2')
    parse_args(['--sscl-cka-scope', 'global', '--batch-size', '2'])
    with pytest.raises(OptionError, match='too small'):
        parse_args(['--batch-size', '2'])


def test_reaches_a_loss_in_a_loop():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.Flatten(2))
    sscl = SSCLLoss(model.train(), torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1)), ['0'], ['0'], cka_scope='global')
    assert [cka.scope for cka in sscl.criterion.running_cka] == ['global']
