"""torch.jit.trace of a spiking model: accepted by its own check, and the model's numbers and gradients afterwards."""
import copy
import io

import pytest
import timm
import torch

import timm_sscl  # noqa: F401  registers the spiking_ names
from timm_sscl import calibrate, lif

MODELS = {'test_resnet': dict(zero_init_last=False), 'test_vit': dict(img_size=32)}

pytestmark = pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning', 'ignore::FutureWarning',
                                        'ignore::DeprecationWarning')


def _images(n, seed=0):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize('name,training,settings', [
    ('test_vit', False, {}), ('test_resnet', False, {}), ('test_resnet', True, {}),
    ('test_resnet', True, dict(v_reset=None)), ('test_resnet', True, dict(detach_reset=True)),
    ('test_resnet', False, dict(v_reset=-0.25))], ids=str)
def test_trace_is_the_model(name, training, settings):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(f'spiking_{name}', timesteps=3, num_classes=5, **MODELS[name], **settings).double()
        calibrate(model, _images(4, seed=9))
    model.train(training)
    traced = torch.jit.trace(copy.deepcopy(model), _images(2))  # its check is on
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    x = _images(5, seed=1)  # another batch size
    expected = model(x)
    gradients = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    assert expected.std() > 1e-3 and max(g.abs().max() for g in gradients) > 1e-3
    # round-off of other operations may not flip a spike here: both integrate in the same order
    for copied in (traced, torch.jit.load(file)):
        out = copied(x)
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-12)
        for p, g in zip(torch.autograd.grad(out.square().sum(), list(copied.parameters())), gradients):
            torch.testing.assert_close(p, g, rtol=1e-7, atol=1e-9 * g.abs().max().item() + 1e-12)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
def test_traced_neuron_fires_as_the_neuron(dtype):
    x = (torch.randn(4, 200, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    traced = torch.jit.trace(lambda x: lif(x), x)
    assert torch.equal(traced(x), lif(x)) and traced(x).dtype == dtype
    assert set(traced(x).unique().tolist()) == {0., 1.}
