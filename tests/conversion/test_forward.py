"""Every family, converted: forward and its parts, features, state_dict, gradients, against the ANN."""
import pytest
import timm
import torch
import torch.nn.functional as F

from spiking_families import (
    ANALOG, B, FAMILIES, K, ROUND_OFF, T, ann_of, count_of, every_family, give_statistics, images_of, neurons_of,
    spiking_of)
from timm_sscl import LIF


NO_CHECKPOINTING = {'vgg11_bn'}  # timm's own limit


@every_family
@torch.no_grad()
def test_forward_and_its_parts(family):
    model, x = spiking_of(family), images_of(family)
    out = model(x)
    assert out.shape == (B, K)
    assert out.std() > 0 and not torch.equal(out[0], out[1])  # alive: the equalities below are not 0 == 0
    steps = model(x, per_step=True)
    assert steps.shape == (T, B, K)
    assert torch.equal(steps.mean(0), out)  # exact: the same numbers in the same reduction
    features = model.forward_features(x)
    assert features.shape[0] == T * B
    assert torch.equal(model.forward_head(features), out)
    assert torch.equal(model.forward_head(features, per_step=True), steps)


@every_family
@torch.no_grad()
def test_pre_logits_have_the_anns_shape(family):
    model, x = spiking_of(family), images_of(family)
    features = model.forward_features(x)
    pre = model.forward_head(features, pre_logits=True)
    ann = ann_of(family).eval()
    assert pre.shape == ann.forward_head(ann.forward_features(x), pre_logits=True).shape
    assert pre.shape[0] == B and pre.ndim == 2
    steps = model.forward_head(features, pre_logits=True, per_step=True)
    assert steps.shape == (T,) + pre.shape
    assert torch.equal(steps.mean(0), pre)


@every_family
@torch.no_grad()
def test_forward_intermediates(family):
    model, x = spiking_of(family), images_of(family)
    expected = ann_of(family).eval().forward_intermediates(x)[1]
    final, intermediates = model.forward_intermediates(x)
    assert final.shape[0] == T * B
    assert torch.equal(final, model.forward_features(x))
    assert [i.shape for i in intermediates] == [i.shape for i in expected]
    _, steps = model.forward_intermediates(x, per_step=True)
    assert [s.shape for s in steps] == [(T,) + i.shape for i in expected]
    assert all(torch.equal(s.mean(0), i) for s, i in zip(steps, intermediates))
    only = model.forward_intermediates(x, intermediates_only=True)
    assert all(torch.equal(o, i) for o, i in zip(only, intermediates))


@every_family
@torch.no_grad()
def test_every_neuron_spikes_and_no_activation_is_left(family):
    model, x, outputs = spiking_of(family), images_of(family), {}
    for name, module in model.named_modules():
        if isinstance(module, LIF):
            module.register_forward_hook(lambda m, i, o, name=name: outputs.__setitem__(name, o))
    model(x)
    assert outputs and len(outputs) == len(neurons_of(model)) == count_of(ann_of(family), ANALOG)
    assert all(((o == 0) | (o == 1)).all() for o in outputs.values())
    assert all(o.shape[0] == T * B for o in outputs.values())
    # most of them fire, on this input: binary is not merely zero
    assert sum(bool(o.any()) for o in outputs.values()) > len(outputs) / 2
    assert count_of(model, ANALOG) == 0
    report = model.spiking_report()
    assert {r.name for r in report if r.now == 'LIF'} == set(outputs)


@every_family
def test_parameters_and_state_dict_are_the_anns(family):
    ann, model = ann_of(family), spiking_of(family)
    shapes = [(n, p.shape) for n, p in ann.named_parameters()]
    assert [(n, p.shape) for n, p in model.named_parameters()] == shapes
    ours, theirs = model.state_dict(), ann.state_dict()
    assert set(theirs) <= set(ours) and all('spiking_' in key for key in set(ours) - set(theirs))
    result = model.load_state_dict(theirs, strict=True)
    assert not result.missing_keys and not result.unexpected_keys
    assert all(torch.equal(v, theirs[k]) for k, v in model.state_dict().items() if k in theirs)
    assert model.timesteps == T  # an ANN's checkpoint says nothing about the neurons


@every_family
def test_gradients_and_checkpointing(family):
    """Every parameter learns; gradient checkpointing changes neither the loss nor a gradient."""
    x, y = images_of(family, batch=3).double(), torch.tensor([0, 1, 2])
    losses, grads = [], []
    for checkpointing in (False, True):
        model = spiking_of(family, torch.float64).train()
        if checkpointing and family in NO_CHECKPOINTING:
            with pytest.raises(AssertionError, match='not supported'):
                model.set_grad_checkpointing(True)
            continue
        model.set_grad_checkpointing(checkpointing)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        losses.append(loss.detach())
        grads.append({n: p.grad for n, p in model.named_parameters()})
    plain, checkpointed = grads[0], grads[-1]
    assert not [n for n, g in plain.items() if g is None or not g.isfinite().all()]
    assert sum(bool(g.any()) for g in plain.values()) > .9 * len(plain)  # a silent layer may have none, not the model
    torch.testing.assert_close(losses[0], losses[-1], **ROUND_OFF)
    for name, grad in plain.items():
        torch.testing.assert_close(checkpointed[name], grad, msg=lambda m: f'{name}: {m}', **ROUND_OFF)


@every_family
@torch.no_grad()
def test_batch_equals_its_samples(family):
    model, x = spiking_of(family, torch.float64), images_of(family, batch=3).double()
    out = model(x, per_step=True)
    alone = torch.cat([model(sample[None], per_step=True) for sample in x], dim=1)
    torch.testing.assert_close(out, alone, **ROUND_OFF)


@every_family
@torch.no_grad()
def test_features_only(family):
    f = FAMILIES[family]
    x = images_of(family)
    expected = timm.create_model(f.name, features_only=True, **f.kwargs).eval()(x)
    model = timm.create_model(f'spiking_{f.name}', features_only=True, timesteps=T, **f.neuron, **f.kwargs)
    give_statistics(model, x)
    model.eval()
    features = model(x)
    assert isinstance(features, list) and neurons_of(model) and count_of(model, ANALOG) == 0
    assert [i.shape for i in features] == [i.shape for i in expected]
    steps = model(x, per_step=True)
    assert [s.shape for s in steps] == [(T,) + i.shape for i in expected]
    assert all(torch.equal(s.mean(0), i) for s, i in zip(steps, features))
    assert features[-1].any()


@every_family
@torch.no_grad()
def test_reset_classifier(family):
    model, x = spiking_of(family), images_of(family)
    neurons = len(neurons_of(model))
    model.reset_classifier(7)
    assert model(x).shape == (B, 7) and model(x, per_step=True).shape == (T, B, 7)
    model.reset_classifier(0)
    assert model(x).shape == model.forward_head(model.forward_features(x), pre_logits=True).shape
    assert len(neurons_of(model)) == neurons and count_of(model, ANALOG) == 0
