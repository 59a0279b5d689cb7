"""For every neuron, norm and residual: training that is saved and goes on, averaged copies, and several processes."""
import copy
import io

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from processes import run_processes
from timm.utils import ModelEmaV3
from torch.nn.parallel import DistributedDataParallel

from spiking_families import short_resnet
from timm_sscl import calibrate, list_neurons, list_variants

T, K, B = 2, 3, 4
PARTS = [('neuron', name) for name in list_neurons()]
PARTS += [(kind, name) for kind in ('norm', 'residual') for name in list_variants(kind)]
every_part = pytest.mark.parametrize('kind, name', PARTS, ids=[f'{kind}-{name}' for kind, name in PARTS])
# parameters with one entry per timestep, and norms whose statistics differ by timestep
PER_STEP = [('neuron', 'glif'), ('neuron', 'psn'), ('neuron', 'masked_psn'), ('norm', 'tebn'), ('norm', 'bntt'),
            ('norm', 'tab')]


def _untrained(kind, name, seed=0):
    options = dict(neuron='mlf') if name == 'ds' else {}
    return short_resnet(K, seed, timesteps=T, **{**options, kind: name})


def _model(kind, name, dtype=torch.float32):
    model = _untrained(kind, name)
    calibrate(model, _images(0))
    return model.to(dtype).train()


def _images(seed, n=B):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def _sgd(model):
    return torch.optim.SGD(model.parameters(), lr=.05, momentum=.9)


def _train(model, optimizer, steps):
    for seed in steps:
        model.set_progress(seed / 4)
        loss = nn.functional.cross_entropy(model(_images(seed)), torch.arange(B) % K)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@every_part
def test_saved_in_the_middle_and_continued(kind, name):
    """As without the break, to the bit; the model that goes on was made anew with other random numbers."""
    model = _model(kind, name)
    optimizer = _sgd(model)
    _train(model, optimizer, range(2))
    file = io.BytesIO()
    torch.save(dict(model=model.state_dict(), optimizer=optimizer.state_dict()), file)
    _train(model, optimizer, range(2, 4))
    file.seek(0)
    saved = torch.load(file)
    other = _untrained(kind, name, seed=1).train()
    again = _sgd(other)
    other.load_state_dict(saved['model'])
    again.load_state_dict(saved['optimizer'])
    _train(other, again, range(2, 4))
    state = other.state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(state[key], value), key


@every_part
def test_averaged_copies_follow(kind, name):
    model = _model(kind, name)
    ema = ModelEmaV3(model, decay=.5)
    before = {key: value.clone() for key, value in model.named_parameters()}
    _train(model, _sgd(model), range(1))
    ema.update(model)
    for key, value in ema.module.named_parameters():
        expected = .5 * before[key] + .5 * dict(model.named_parameters())[key]
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)  # float32
    assert ema.module.settings == model.settings
    with torch.no_grad():
        assert ema.module.eval()(_images(5)).isfinite().all()


@every_part
def test_bfloat16_and_memory_formats(kind, name):
    """A step in bfloat16 has finite gradients; channels last changes nothing but the order of sums (float64)."""
    model = _model(kind, name, torch.float64).eval()
    x = _images(0).double()
    with torch.no_grad():
        expected = model(x, per_step=True)
        twin = copy.deepcopy(model).to(memory_format=torch.channels_last)
        torch.testing.assert_close(
            twin(x.to(memory_format=torch.channels_last), per_step=True), expected, rtol=1e-9, atol=1e-9)
    half = _model(kind, name, torch.bfloat16)
    out = half(_images(0).bfloat16())
    out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16 and all(
        p.grad is None or p.grad.isfinite().all() for p in half.parameters())
    with torch.autocast('cpu', torch.bfloat16):
        assert _model(kind, name)(_images(0)).isfinite().all()


# ---- two processes

def _gradients(model, x):
    loss = nn.functional.cross_entropy(model(x), torch.arange(len(x)) % K)
    return torch.autograd.grad(loss, list(model.parameters()))


def _on_a_process(rank):
    """Gradients after DDP's mean of every part in PER_STEP; every process has its own images."""
    results = {}
    for kind, name in PER_STEP:
        model = _model(kind, name, torch.float64)
        wrapped = DistributedDataParallel(model)
        nn.functional.cross_entropy(wrapped(_images(rank).double()), torch.arange(B) % K).backward()
        results[name] = [p.grad for p in model.parameters()]
    dist.barrier()
    return results


@pytest.mark.slow
def test_parameters_per_timestep_on_two_processes(tmp_path):
    """DDP's gradients are the means of those of the processes' own batches, in float64, and alike on both."""
    one, other = run_processes(_on_a_process, 2, tmp_path)
    for kind, name in PER_STEP:
        by_batch = [_gradients(_model(kind, name, torch.float64), _images(rank).double()) for rank in range(2)]
        for a, b, *own in zip(one[name], other[name], *by_batch):
            assert torch.equal(a, b)
            torch.testing.assert_close(a, sum(own) / 2, rtol=1e-9, atol=1e-12)
