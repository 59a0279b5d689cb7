"""convert_to_spiking on any module: outputs, shared activations, hooks, what stays analog, the report."""
import copy
import logging
from typing import NamedTuple

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

from spiking_families import ANALOG, B, K, Net, T, ann_of, count_of, images_of, neurons_of, pickled, spiking_of
from timm_sscl import LIF, convert_to_spiking


def test_recurrent_layer_stays_analog_and_is_reported():
    class Recurrent(Net):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(3, 3, batch_first=True)

        def forward(self, x):
            b, c, h, w = x.shape
            x = self.lstm(x.flatten(2).transpose(1, 2))[0].transpose(1, 2).reshape(b, c, h, w)
            return super().forward(x)

    model = convert_to_spiking(Recurrent(), timesteps=T)
    record, = [r for r in model.spiking_report() if r.name == 'lstm']
    assert record.now == 'LSTM' and 'recurrent' in record.reason
    assert model(images_of()).shape == (B, K)


@torch.no_grad()
def test_plain_module():
    net = Net()
    model = convert_to_spiking(net, timesteps=T).eval()
    assert model is net and isinstance(model.act, LIF)
    x = images_of()
    assert model(x).shape == (B, K) and model(x, per_step=True).shape == (T, B, K)
    assert torch.equal(model(x, per_step=True).mean(0), model(x))
    assert torch.equal(model(x[:, None].repeat(1, T, 1, 1, 1)), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x)) and torch.equal(pickled(model)(x), model(x))
    assert model.load_state_dict(Net().state_dict(), strict=True)


@pytest.mark.parametrize('build', [torchvision.models.resnet18, torchvision.models.mobilenet_v3_small])
def test_torchvision(build):
    torch.manual_seed(0)
    ann = build(num_classes=K)
    state = copy.deepcopy(ann.state_dict())
    model = convert_to_spiking(ann, timesteps=T)
    model.load_state_dict(state, strict=True)
    assert neurons_of(model) and count_of(model, ANALOG) == 0
    x = images_of()
    out = model.train()(x)
    out.sum().backward()
    assert out.shape == (B, K) and model(x, per_step=True).shape == (T, B, K)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


class _Outputs(NamedTuple):
    logits: torch.Tensor
    features: torch.Tensor


class _Structured(Net):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        features = self.act(self.bn(self.conv(x)))
        logits = self.fc(features.mean((2, 3)))
        if self.kind is dict:
            return dict(logits=logits, features=[features])
        return _Outputs(logits, features) if self.kind is _Outputs else self.kind([logits, features])


@pytest.mark.parametrize('kind', [list, tuple, dict, _Outputs])
def test_structured_output_is_decoded_entry_by_entry(kind):
    model, x = convert_to_spiking(_Structured(kind), timesteps=T), images_of()
    out, steps = model(x), model(x, per_step=True)
    assert type(out) is type(steps) is kind
    logits, features = (out['logits'], out['features'][0]) if kind is dict else out
    assert logits.shape == (B, K) and features.shape[:2] == (B, 4)
    assert (steps['logits'] if kind is dict else steps[0]).shape == (T, B, K)


class _Shared(nn.Module):
    """One activation under two names, one of them called twice."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.act = nn.ReLU()
        self.same_act = self.act

    def forward(self, x):
        x = self.act(self.conv1(x))
        x = self.act(self.conv2(x))
        return self.same_act(x - .1).mean((2, 3))


@torch.no_grad()
def test_shared_activation_stays_one_neuron_without_memory():
    torch.manual_seed(0)
    model = convert_to_spiking(_Shared(), timesteps=T, v_threshold=.05)
    assert model.act is model.same_act and len(neurons_of(model)) == 1
    assert len([r for r in model.spiking_report() if r.now == 'LIF']) == 1
    x = images_of()
    out = model(x)
    assert out.any() and torch.equal(model(x), out)  # a call leaves nothing behind
    other = copy.deepcopy(model)
    assert other.act is other.same_act and torch.equal(other(x), out)
    # every place starts from rest, as three separate neurons would
    neuron = dict(timesteps=T, v_threshold=.05)
    h = LIF(**neuron)(model.conv1(torch.cat([x] * T)))
    h = LIF(**neuron)(model.conv2(h))
    lone = LIF(**neuron)(h - .1).mean((2, 3)).unflatten(0, (T, B)).mean(0)
    assert torch.equal(out, lone)


def test_forward_hooks_survive_the_swap():
    net, seen = Net(), []
    handle = net.act.register_forward_hook(lambda m, i, o: seen.append((type(m), o)))
    pre = net.act.register_forward_pre_hook(lambda m, i: seen.append('pre'))
    model = convert_to_spiking(net, timesteps=T)
    model(images_of())
    assert seen[0] == 'pre' and seen[1][0] is LIF and seen[1][1].shape[0] == T * B
    handle.remove()
    pre.remove()
    model(images_of())
    assert len(seen) == 2


def test_backward_hooks_survive_the_swap():
    net, seen = Net(), []
    handle = net.act.register_full_backward_hook(lambda m, grad_in, grad_out: seen.append(grad_out[0].shape))
    model = convert_to_spiking(net, timesteps=T)
    model(images_of()).sum().backward()
    assert seen and seen[0][0] == T * B
    handle.remove()
    model(images_of()).sum().backward()
    assert len(seen) == 1


@pytest.mark.parametrize('training', [True, False])
def test_training_flag_is_kept(training):
    net = Net().train(training)
    net.bn.eval()  # a frozen norm stays frozen
    model = convert_to_spiking(net)
    assert model.training is training and model.act.training is training and model.bn.training is False


def test_requires_grad_and_parameter_identity_are_kept():
    net = Net()
    net.conv.weight.requires_grad_(False)
    before = {n: id(p) for n, p in net.named_parameters()}
    model = convert_to_spiking(net)
    assert {n: id(p) for n, p in model.named_parameters()} == before  # an optimizer made before still trains it
    assert not model.conv.weight.requires_grad


class RelPosMlp(nn.Module):
    """Named as timm's: its input is a table of coordinates and has no batch axis."""

    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(2, 8), nn.GELU(), nn.Linear(8, 4)
        self.drop = nn.Dropout(0.)

    def forward(self):
        return self.fc2(self.act(self.fc1(torch.ones(T * 3, 2)))).mean(0)


class _WithBias(Net):
    def __init__(self):
        super().__init__()
        self.rel_pos = RelPosMlp()

    def forward(self, x):
        return self.fc(self.act(self.bn(self.conv(x))).mean((2, 3)) + self.rel_pos())


def test_position_bias_stays_analog_and_is_reported():
    net = _WithBias()
    bias = net.rel_pos()
    model = convert_to_spiking(net, timesteps=T)
    assert type(model.rel_pos.act) is nn.GELU and isinstance(model.act, LIF)
    assert torch.equal(model.rel_pos(), bias)
    record, = [r for r in model.spiking_report() if r.name.startswith('rel_pos')]
    assert record.now != 'LIF' and 'position bias' in record.reason
    assert model(images_of()).shape == (B, K)


@torch.no_grad()
def test_swinv2_cr_position_bias():
    """timm's own: with T dividing the table's rows a neuron there would mix positions in silence."""
    kwargs = dict(img_size=32, window_size=2, embed_dim=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), num_classes=K)
    torch.manual_seed(0)
    model = timm.create_model('spiking_swinv2_cr_tiny_224', timesteps=T, **kwargs).eval()
    biases = [r for r in model.spiking_report() if 'position bias' in r.reason]
    assert len(biases) == 4 and all('meta_mlp' in r.name for r in biases)
    assert count_of(model, ANALOG) == 4 and neurons_of(model)
    assert model(images_of()).shape == (B, K)


@pytest.mark.parametrize('family,gate', [('seresnet18', 'Sigmoid'), ('regnety_002', 'Sigmoid'),
                                         ('efficientnet_b0', 'Sigmoid'), ('mobilenetv3_small_050', 'Hardsigmoid')])
def test_squeeze_excite_gate_stays_analog_and_is_reported(family, gate):
    ann, model = ann_of(family), spiking_of(family)
    gates = [n for n, m in ann.named_modules() if 'sigmoid' in type(m).__name__.lower()]
    assert gates and [type(model.get_submodule(n)) for n in gates] == [type(ann.get_submodule(n)) for n in gates]
    records = {r.name: r for r in model.spiking_report() if 'gate' in r.reason}
    assert set(records) == set(gates) and all(r.now == r.was for r in records.values())
    # the gate's input is the spiking squeeze: real values leave it
    seen = []
    model.get_submodule(gates[0]).register_forward_hook(lambda m, i, o: seen.append(o))
    model(images_of(family))
    assert seen and ((seen[0] > 0) & (seen[0] < 1)).any()


def test_conversion_is_logged(caplog):
    with caplog.at_level(logging.INFO, logger='timm_sscl'):
        convert_to_spiking(Net(), timesteps=2)
    assert '1 activations became LIF' in caplog.text and 'timesteps=2' in caplog.text


class _WithTable(Net):
    """A position bias that no name tells: T divides the rows of its table."""

    def __init__(self):
        super().__init__()
        self.table = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 4))
        self.table2 = _Table()

    def forward(self, x):
        table = self.table(torch.ones(T * 3, 2, device=x.device)) + self.table2(torch.ones(T * 3, 2, device=x.device))
        return self.fc(self.act(self.bn(self.conv(x))).mean((2, 3)) + table.mean(0))


class _Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 4)

    def forward(self, x):
        return F.gelu(self.fc(x))


def test_activation_without_a_batch_axis_is_found_by_a_probe():
    net = _WithTable()
    calls = []
    net.act.register_forward_hook(lambda *_: calls.append(1))
    net.train()
    state = torch.get_rng_state()
    model = convert_to_spiking(net, timesteps=T)
    assert torch.equal(torch.get_rng_state(), state) and not calls and model.training and model.act.training
    assert type(model.table[1]) is nn.ReLU and 'functional_act' not in model.table2._modules
    assert isinstance(model.act, LIF)
    reasons = {r.name: r.reason for r in model.spiking_report()}
    assert 'no batch axis' in reasons['table.1'] and 'no batch axis' in reasons['table2.functional_act']
    model(images_of())
    assert calls == [1]


class _Foreign(nn.Module):
    """A user's own neuron."""

    def forward(self, x):
        return (x > 0).to(x.dtype)


class _OwnLIF(LIF):
    pass


def test_report_tells_what_the_model_is_now():
    model = convert_to_spiking(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.GELU(), nn.ReLU6()))
    assert len(model.spiking_report().neurons) == 3
    model[1], model[3] = _Foreign(), _OwnLIF(4)
    report = model.spiking_report()
    assert [(r.name, r.was, r.now) for r in report] == [
        ('1', 'ReLU', '_Foreign'), ('3', 'GELU', '_OwnLIF'), ('4', 'ReLU6', 'LIF')]
    assert [r.name for r in report.neurons] == ['3', '4'] and '2 neuron layers' in str(report)
    assert 'replaced by _Foreign' in str(report)
    model.append(nn.SiLU()).append(nn.Sequential(LIF(4)))
    report = model.spiking_report()
    assert [(r.name, r.now) for r in report.analog] == [('1', '_Foreign'), ('5', 'SiLU')]
    assert [r.name for r in report.neurons] == ['3', '4', '6.0'] and 'added after the conversion' in str(report)


@pytest.mark.parametrize('layers', [
    lambda: (nn.Flatten(), nn.Linear(784, 8), nn.ReLU(), nn.Linear(8, 2)),
    lambda: (nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2704, 2))])
def test_conversion_of_a_flattening_network_is_quiet(layers, capfd, caplog, recwarn):
    """A probe that fails on a first guess says nothing."""
    convert_to_spiking(nn.Sequential(*layers()))
    assert capfd.readouterr() == ('', '') and not list(recwarn)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
