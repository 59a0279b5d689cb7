"""What holds for every norm and residual by its name, a user's too, in a small timm model.

A variant that is registered before this file is collected runs through all of it.
"""
import copy
from dataclasses import fields

import pytest
import timm
import torch
import torch.nn as nn

from spiking_families import short_resnet
from timm_sscl import SSCLLoss, calibrate, estimate_energy, list_variants
from timm_sscl.conversion.variants.registry import create_variant

T, K = 2, 3
NAMES = [(kind, name) for kind in ('norm', 'residual') for name in list_variants(kind)]
every_variant = pytest.mark.parametrize('kind, name', NAMES, ids=[f'{kind}-{name}' for kind, name in NAMES])


def _model(kind=None, name=None, **options):
    torch.manual_seed(0)
    if name == 'ds':
        options.setdefault('neuron', 'mlf')
    options.update({kind: name} if kind else {})
    return timm.create_model('spiking_test_resnet', num_classes=K, **{'timesteps': T, **options})


def _images(n=4):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def _state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@every_variant
def test_options_have_help_and_errors_name_what_is_wrong(kind, name):
    variant = create_variant(kind, name)
    assert str(variant) == f"{kind}='{name}'"
    assert type(variant).__doc__ or not type(variant).__module__.startswith('timm_sscl.')
    assert all(field.metadata.get('help') for field in fields(variant.Settings))
    with pytest.raises(ValueError, match="has no option 'nonsense'"):
        create_variant(kind, name, nonsense=1)


@pytest.mark.slow
@every_variant
def test_compiled_equals_eager(kind, name):
    model = short_resnet(K, timesteps=T, **{kind: name}, **(dict(neuron='mlf') if name == 'ds' else {}))
    calibrate(model, _images())
    twin = copy.deepcopy(model).train()
    torch._dynamo.reset()
    compiled = torch.compile(twin, backend='aot_eager')
    out, again = model.train()(_images()), compiled(_images())
    torch.testing.assert_close(again, out, rtol=1e-5, atol=1e-5)  # float32
    for net, y in ((model, out), (twin, again)):
        y.square().sum().backward()
    for (key, p), q in zip(model.named_parameters(), twin.parameters()):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-5, msg=key)
    for (key, b), c in zip(model.named_buffers(), twin.buffers()):
        torch.testing.assert_close(c, b, rtol=1e-5, atol=1e-5, msg=key)  # running statistics moved alike


@every_variant
def test_training_moves_what_it_adds_and_sscl_learns_through_it(kind, name):
    model, ann = _model(kind, name), timm.create_model('test_resnet', num_classes=K)
    calibrate(model, _images())
    sscl = SSCLLoss(model, ann)
    loss = nn.functional.cross_entropy(model.train()(_images()), torch.arange(4) % K) + sscl(_images())
    loss.backward()
    assert loss.isfinite()
    for key, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), key
    added = create_variant(kind, name).own_state(model)
    assert set(added) <= set(model.state_dict())
    assert {key for key, _ in model.named_parameters()} & set(added) <= model.no_weight_decay()


@every_variant
def test_taking_it_away_leaves_the_model_that_was(kind, name):
    options = dict(neuron='mlf') if name == 'ds' else {}
    plain, model = _model(**options), _model(kind, name)
    before = [type(m) for m in plain.modules()]
    model._explicit = frozenset()  # as of a model that nothing was asked for
    state = _state(plain)
    model.load_state_dict(state)
    assert getattr(model.settings, kind) is None and [type(m) for m in model.modules()] == before
    assert model.state_dict().keys() == state.keys()
    with torch.no_grad():
        assert torch.equal(model.eval()(_images()), plain.eval()(_images()))


@every_variant
def test_measuring_leaves_no_trace(kind, name):
    model = _model(kind, name).train()
    calibrate(model, _images())
    before = _state(model)
    estimate_energy(model, _images())
    model.spiking_report().macs(_images())
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert model.timesteps == T and all(m.training for m in model.modules())


@every_variant
def test_neurons_with_parameters_per_channel_and_per_step_go_along(kind, name):
    if name in ('mpbn', 'ds'):  # which say what neurons they take
        pytest.skip('takes neurons of one kind')
    model = _model(kind, name, neuron='glif')
    assert {n.timesteps for n in model.neurons().values()} == {T}
    model(_images()).sum().backward()
    other = timm.create_model('spiking_test_resnet', num_classes=K)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(other.eval()(_images()), model.eval()(_images()))
