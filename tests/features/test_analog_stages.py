"""Stages whose output is not spikes (residual='ms'): both readers read the neuron behind them."""
import logging

import pytest
import timm
import torch

from spiking_families import short_resnet
from timm_sscl import SSCLLoss, SSCLTask, calibrate
from timm_sscl.features.finding import find_taps, named_taps
from timm_sscl.features.reader import FeatureReader

T, B, K, SIZE = 2, 4, 3, (3, 32, 32)
BEHIND = ['layer2.0.act2', 'layer3.0.act3', 'layer4.0.act2']  # entry neurons of the next stages; layer3 is a Bottleneck


def _model(**options):
    torch.manual_seed(0)
    model = timm.create_model('spiking_test_resnet', num_classes=K, timesteps=T, **{'residual': 'ms', **options})
    calibrate(model, _images())
    return model


def _images():
    return torch.randn(B, *SIZE, generator=torch.Generator().manual_seed(0))


def _spikes_behind(model, x):
    """What the neurons behind the first three stages fire in one forward, (T, B, ...)."""
    seen = {}
    handles = [model.get_submodule(name).register_forward_hook(
        lambda m, args, out, name=name: seen.update({name: out})) for name in BEHIND]
    model(x)
    for handle in handles:
        handle.remove()
    return [seen[name].unflatten(0, (T, B)) for name in BEHIND]


@pytest.mark.parametrize('zero_init', [True, False], ids=['identity', 'blocks'])
def test_both_readers_read_the_neuron_behind(zero_init, caplog):
    """Where blocks start as the identity, neurons within a stage see the stage's output as well."""
    model, x = _model(layers=(2, 2, 1, 1), zero_init_last=zero_init).eval(), _images()
    with caplog.at_level(logging.INFO):
        taps = find_taps(model)
    assert [tap.module for tap in taps[:3]] == BEHIND and taps[3].module == 'layer4.act'
    assert [tap.name for tap in taps] == ['layer1', 'layer2', 'layer3', 'layer4', 'pooled']
    said = 'the output of layer1 is not spikes; its feature is read at the neuron behind it, layer2.0.act2'
    assert said in caplog.text
    assert named_taps(model, ['layer1', 'layer3']) == [taps[0], taps[2]]
    reader, by_name = FeatureReader(model), FeatureReader(model, ['layer3', 'layer1'])
    with torch.no_grad():
        expected, features = _spikes_behind(model, x), reader(model, x)[1]
        assert all(torch.equal(a, b) for a, b in zip(expected, features))
        assert all(set(f.unique().tolist()) == {0., 1.} for f in features[:4])
        assert torch.equal(by_name(model, x)[1][1], expected[0]) and torch.equal(by_name(model, x)[1][0], expected[2])
    assert [f.shape[2] for f in features] == reader.channels == [tap.channels for tap in taps]
    reader.keep([1, 3])
    with torch.no_grad():
        assert torch.equal(reader(model, x)[1][0], expected[1])


def test_a_stage_of_spikes_and_a_module_by_name_are_as_they_were(caplog):
    with caplog.at_level(logging.INFO):
        assert not FeatureReader(_model(residual=None)).behind and not FeatureReader(_model(residual='sew')).behind
    assert 'is not spikes' not in caplog.text
    block = named_taps(_model(), ['layer1.0'])  # a module, whose output is asked for
    assert block[0].module == 'layer1.0'


@pytest.mark.parametrize('norm', [None, 'mpbn'])
def test_task_and_loss_agree_and_leave_no_trace(norm):
    """Statistics of a norm inside the neuron move as without the loss, and hooks of the neuron see one call."""
    results, states, criterion = [], [], {}
    for losses in 'sscl', 'none', 'loss':
        student, teacher = _model(norm=norm).train(), timm.create_model('test_resnet', num_classes=K)
        x, y = _images(), torch.arange(B) % K
        torch.manual_seed(1)
        if losses == 'loss':
            sscl = SSCLLoss(student, teacher, input_size=SIZE)
            sscl.criterion.load_state_dict(criterion)
            student(x)
            results.append(sscl(x))
        else:
            task = SSCLTask(student, teacher, losses, input_size=SIZE, verbose=False).train()
            if losses == 'sscl':
                criterion = {k: v.clone() for k, v in task.trainable_module.losses['sscl'].state_dict().items()}
            calls = []
            student.get_submodule(BEHIND[0]).register_forward_hook(lambda m, args, out: calls.append(out))
            results.append(task(x, y))
            assert len(calls) == 1
        states.append(student.state_dict())
    assert torch.equal(results[0]['output'], results[1]['output'])
    torch.testing.assert_close(results[2], results[0]['sscl_loss'])
    for state in states[1:]:
        assert all(torch.equal(value, states[0][key]) for key, value in state.items())


def test_gradients_reach_the_stage_through_the_neuron():
    model = _model(zero_init_last=False).train()
    feature = FeatureReader(model)(model, _images())[1][0]
    grads = torch.autograd.grad(feature.sum(), [model.conv1[0].weight, model.layer1[0].conv1.weight])
    assert all(grad.abs().sum() > 0 for grad in grads)


@pytest.mark.slow
def test_compiled_with_gradient_checkpointing():
    model = short_resnet(timesteps=T, residual='ms').train()
    calibrate(model, _images())
    reader, x = FeatureReader(model), _images()
    expected = reader(model, x)[1]
    model.set_grad_checkpointing(True)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: reader(model, x)[1], backend='aot_eager')
    for a, b in zip(compiled(x), expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)  # float32
