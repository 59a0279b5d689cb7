"""Losses and gradients on two processes equal one process's on the whole batch, whatever the sizes of their parts."""
import pytest
import timm
import torch

import timm_sscl  # noqa: F401  registers the spiking_ names
from processes import run_processes
from timm_sscl import SSCLTask, register_loss
from timm_sscl.losses import loss_is_global

pytestmark = pytest.mark.slow  # starts processes
# a network without BatchNorm, so that what a sample gives does not depend on the rest of its batch
MODEL = 'test_efficientnet_gn'
SIZES = [(4, 4), (5, 4), (4, 3)]
MODES = {
    'none': {},
    'kd': {'kd': 1.},
    'contrastive': {'contrastive': 0.3},
    'sscl': {'sscl': 0.3},
    'per step': {'tet': 0.7, 'kd_step': 0.2},
    'firing_rate': {'firing_rate': 50.},
    'own': {'test_own': 2., 'test_weights': 0.1},
    'together': {'sscl': 0.1, 'kd': 1., 'tet': 1., 'kd_step': 1., 'firing_rate': 10.},
}
OPTIONS = {'sscl': dict(cka_scope='global', queue_size=6), 'contrastive': dict(critic='infonce'),
           'firing_rate': dict(target=(0.5, 0.6))}
# float64; the processes' gradients are summed in another order
ROUND_OFF = dict(rtol=1e-9, atol=1e-12)


def _register():
    @register_loss('test_own')
    def own(step):
        return step.logits.square().mean()

    @register_loss('test_weights')
    def weights(step):
        return sum(p.square().sum() for p in step.student.parameters())  # no mean over samples at all


@pytest.fixture(autouse=True)
def _registry():
    _register()


def _task(mode):
    torch.manual_seed(0)
    student = timm.create_model(f'spiking_{MODEL}', num_classes=5, timesteps=2)
    teacher = timm.create_model(MODEL, num_classes=5)
    return SSCLTask(student, teacher, MODES[mode], OPTIONS, verbose=False, task_loss_weight=0.8).double().train()


def _batch(n):
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, 3, 32, 32, generator=generator, dtype=torch.float64), torch.arange(n) % 5


def _step(mode, sizes, rank=None):
    task = _task(mode)
    x, y = _batch(sum(sizes))
    if rank is not None:
        x, y = x.split(sizes)[rank], y.split(sizes)[rank]
        task.prepare_distributed()
    result = task(x, y)
    result['loss'].backward()
    gradients = torch.cat([p.grad.flatten() for p in task.trainable_module.parameters()])
    return {name: value.item() for name, value in result.items() if value.ndim == 0}, gradients


def _worker(rank):
    torch.set_num_threads(1)
    _register()
    return {(mode, sizes): _step(mode, sizes, rank) for mode in MODES for sizes in SIZES}


@pytest.fixture(scope='module')
def two_processes(tmp_path_factory):
    return run_processes(_worker, 2, tmp_path_factory.mktemp('two_processes'))


@pytest.mark.parametrize('sizes', SIZES, ids=str)
@pytest.mark.parametrize('mode', MODES)
def test_two_processes_equal_one_on_the_whole_batch(two_processes, mode, sizes):
    terms, gradients = _step(mode, sizes)
    assert gradients.abs().max() > 1e-3
    for _, of_rank in (result[mode, sizes] for result in two_processes):
        torch.testing.assert_close(of_rank, gradients, **ROUND_OFF)
    by_rank = [result[mode, sizes][0] for result in two_processes]
    assert sum(of_rank['loss'] for of_rank in by_rank) / 2 == pytest.approx(terms['loss'], rel=1e-12)
    for name, value in terms.items():  # reported as they are: a process's own mean, or the global batch's
        if name == 'loss':
            continue
        values = [of_rank[name] for of_rank in by_rank]
        if name == 'task_loss' or not loss_is_global(name[:-len('_loss')]):
            assert sum(n * v for n, v in zip(sizes, values)) / sum(sizes) == pytest.approx(value, rel=1e-12)
        else:
            assert values == pytest.approx([value] * 2, rel=1e-9)  # through a few more sums: HSIC's differences


def test_mean_by_process_would_be_another_number(two_processes):
    """What the factor is for: on [5, 4] the plain mean over the processes is off."""
    terms, _ = _step('none', (5, 4))
    plain = sum(result['none', (5, 4)][0]['task_loss'] for result in two_processes) / 2
    assert abs(plain - terms['task_loss']) > 1e-3 * terms['task_loss']


def test_losses_that_are_the_global_batchs():
    assert [name for name in ('sscl', 'contrastive', 'firing_rate') if loss_is_global(name)] == [
        'sscl', 'contrastive', 'firing_rate']
    assert not any(loss_is_global(name) for name in ('kd', 'kd_step', 'tet', 'test_own'))


def test_one_process_does_not_communicate(monkeypatch):
    import torch.distributed as dist
    for name in ('all_reduce', 'all_gather', 'broadcast'):
        monkeypatch.delattr(dist, name)
    assert torch.isfinite(_task('together')(*_batch(4))['loss'])
