"""Spikes as bits, and firing rates per layer and step, against the spikes that hooks see."""
import pytest
import timm
import torch
import torch.nn as nn

from timm_sscl import calibrate, convert_ann, convert_to_spiking, record_spikes
from timm_sscl.report import FiringRates

T, B, K = 3, 4, 5


def _images(n=B):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class _Net(nn.Module):
    """Odd sizes, so that the last byte is not full; the last layer runs twice."""

    def __init__(self):
        super().__init__()
        self.conv, self.act1 = nn.Conv2d(3, 5, 3), nn.ReLU()
        self.fc, self.act2, self.head = nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, K)

    def forward(self, x):
        x = self.act1(self.conv(x)).mean((2, 3))
        return self.head(self.act2(self.fc(self.act2(self.fc(x)))))


def _model(timesteps=T):
    torch.manual_seed(0)
    model = convert_to_spiking(_Net(), timesteps=timesteps)
    calibrate(model, _images())
    return model.eval()


def _by_hooks(model, x):
    seen = {}
    handles = [lif.register_forward_hook(lambda m, a, out, n=name: seen.setdefault(n, []).append(out.detach().clone()))
               for name, lif in model.neurons().items()]
    out = model(x)
    for handle in handles:
        handle.remove()
    return out, {name: [call.unflatten(0, (model.timesteps, -1)) for call in calls] for name, calls in seen.items()}


@pytest.mark.parametrize('timesteps', [1, 3, 9])
def test_bits_are_the_spikes(timesteps):
    model, x = _model(timesteps), _images()
    expected, seen = _by_hooks(model, x)
    with record_spikes(model) as record:
        assert torch.equal(model(x), expected)
    assert record.layers == list(seen) == ['act1', 'act2'] and record.num_calls('act2') == 2
    for name, calls in seen.items():
        for i, call in enumerate(calls):
            spikes, bits = record.spikes(name, i), record.packed(name, i)
            assert spikes.dtype == torch.bool and torch.equal(spikes, call.bool()) and call.any()
            n = call[0].numel()
            assert bits.dtype == torch.uint8 and bits.shape == (timesteps, -(-n // 8))
            flat = call.flatten(1).long().tolist()
            assert [[bits[t, i // 8].item() >> i % 8 & 1 for i in range(n)] for t in range(timesteps)][:1] == flat[:1]
    assert torch.equal(record['act1'], seen['act1'][0].bool())
    assert record.nbytes == sum(timesteps * -(-call[0].numel() // 8) for calls in seen.values() for call in calls)
    assert not any(lif._forward_hooks for lif in model.neurons().values())


def test_several_forwards_and_layers_that_did_not_run():
    model = _model()
    with record_spikes(model) as record, torch.no_grad():
        model(_images())
        model.set_timesteps(2)
        model(_images(1))
    assert record.num_calls('act1') == 2 and record.spikes('act1', 1).shape[:2] == (2, 1)
    with pytest.raises(KeyError, match='ran 2 times'):
        record['act1']
    with pytest.raises(KeyError, match='act9 did not run.*act1'):
        record['act9']


def test_scales_of_a_converted_ann():
    torch.manual_seed(0)
    model = convert_ann(timm.create_model('resnet10t', num_classes=K), _images(), T).eval()
    _, seen = _by_hooks(model, _images())
    with record_spikes(model) as record, torch.no_grad():
        model(_images())
    assert all(torch.equal(record[name], calls[0] != 0) for name, calls in seen.items())
    assert len(seen) == len(model.neurons())


@pytest.mark.parametrize('reentrant', [True, False])
def test_checkpointing_records_no_call_twice(reentrant):
    model = timm.create_model('spiking_test_resnet', num_classes=K, timesteps=T).train()
    model.set_grad_checkpointing()
    before = timm.layers.use_reentrant_ckpt()
    timm.layers.set_reentrant_ckpt(reentrant)
    try:
        with record_spikes(model) as record:
            model(_images()).sum().backward()
    finally:
        timm.layers.set_reentrant_ckpt(before)
    assert set(record.layers) == set(model.neurons()) and all(record.num_calls(name) == 1 for name in record.layers)


def test_output_that_is_not_binary_is_refused():
    model = _model()
    model.act1.register_forward_hook(lambda m, a, out: out * 2)
    with pytest.raises(ValueError, match='act1: its output is not binary'), record_spikes(model):
        model(_images())
    assert len(model.act1._forward_hooks) == 1


def test_models_that_cannot_be_recorded():
    with pytest.raises(ValueError, match='no spiking neurons'):
        record_spikes(_Net())
    with pytest.raises(ValueError, match='no spiking neurons'):
        FiringRates(_Net())


@pytest.mark.parametrize('compiled', ['the model', 'a copy of the handle', 'in place', 'a part in place'])
@torch.no_grad()
def test_a_compiled_model_is_watched_as_it_is_eagerly(compiled):
    """torch.compile ignores hooks that are added after it."""
    model, x = _model(), _images()
    with FiringRates(model) as rates, record_spikes(model) as record:
        model(x)
    watched = run = model
    if compiled == 'the model':
        watched = run = torch.compile(model, backend='eager')
    elif compiled == 'a copy of the handle':
        run = torch.compile(model, backend='eager')
    elif compiled == 'in place':
        model.compile(backend='eager')
    else:
        model.fc.compile(backend='eager')
        model.act1.compile(backend='eager')
    run(x)  # a graph without hooks is there
    with FiringRates(watched) as again, record_spikes(watched) as recorded:
        run(x)
    assert again.per_layer() == rates.per_layer() and again.per_layer()
    assert recorded.layers == record.layers == ['act1', 'act2']
    assert torch.equal(recorded['act1'], record['act1'])
    assert all(torch.equal(recorded.spikes('act2', i), record.spikes('act2', i)) for i in range(2))
    run(x)
    assert again.per_layer() == rates.per_layer()  # nothing is counted outside


def test_rates_per_step_and_layer():
    model, x = _model(), _images()
    _, seen = _by_hooks(model, x)
    with FiringRates(model, per_neuron=True) as rates, torch.no_grad():
        model(x)
        model(x)  # the same once more
    for name, calls in seen.items():
        spikes = torch.stack(calls).double()  # (calls, T, B, ...)
        per_step = spikes.transpose(0, 1).flatten(1).mean(1).tolist()
        assert rates.per_step()[name] == pytest.approx(per_step, abs=1e-12)
        assert rates.per_layer()[name] == pytest.approx(spikes.mean().item(), abs=1e-12)
        assert len(set(per_step)) > 1  # the steps differ
    assert list(rates.per_step()) == list(rates.per_layer()) == list(rates.entropy())


def test_rates_where_timesteps_change():
    model, x = _model(), _images()
    _, longer = _by_hooks(model, x)
    model.set_timesteps(2)
    _, shorter = _by_hooks(model, x)
    with FiringRates(model) as rates, torch.no_grad():
        model(x)
        model.set_timesteps(T)
        model(x)
    a, b = (torch.stack(seen['act2']).double().transpose(0, 1).flatten(1).mean(1) for seen in (shorter, longer))
    expected = [(a[0] + b[0]) / 2, (a[1] + b[1]) / 2, b[2]]
    assert rates.per_step()['act2'] == pytest.approx([float(e) for e in expected], abs=1e-12)
