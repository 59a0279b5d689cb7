"""Rates, entropy, MACs and energy of ternary, integer and analog output, of amplitudes, against counts by hand."""
import math

import pytest
import timm
import torch
import torch.nn as nn

from timm_sscl import FiringRates, calibrate, convert_to_spiking, estimate_energy, record_spikes
from timm_sscl.features.rates import RateRecorder
from timm_sscl.neurons import lif_backend
from timm_sscl.report.energy import AC_PJ, MAC_PJ
from timm_sscl.report.macs import count_macs
from timm_sscl.report.representation import level_entropy, spike_entropy

T, B, D, K = 3, 8, 6, 5


@pytest.fixture(autouse=True)
def _eager():
    with lif_backend('eager'):
        yield


def _net(neuron, **options):
    """Linear, neuron, linear: MACs of the second are those of the neuron's output."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, D), nn.ReLU(), nn.Linear(D, K))
    model = convert_to_spiking(net, timesteps=T, neuron=neuron, neuron_kwargs=options, example_inputs=torch.zeros(1, 4))
    calibrate(model, _x())
    return model.eval()


def _x():
    return 3 * torch.randn(B, 4, generator=torch.Generator().manual_seed(0))


def _levels(model):
    """The neuron's output over its amplitude, (T, B, D)."""
    outputs = []
    handle = model[1].register_forward_hook(lambda m, args, out: outputs.append(out.detach()))
    with torch.no_grad():
        model(_x())
    handle.remove()
    amplitude = model[1]._parameters.get('amplitude', torch.ones(()))
    return (outputs[0] / amplitude.detach()).view(T, B, D).double()


WHOLE = [('lif', {}, 1), ('ternary', dict(learn_amplitude=False), 1), ('ternary', {}, 1), ('mlf', {}, 3),
         ('mlf', dict(num_levels=2), 2), ('ilif', dict(max_spikes=5), 5), ('real_spike', {}, 1)]


def _with_amplitude(model, value):
    if 'amplitude' in model[1]._parameters:
        with torch.no_grad():
            model[1].amplitude.mul_(torch.linspace(.5, 1.5, model[1].amplitude.numel()).view_as(model[1].amplitude)
                                    * value)
    return model


@pytest.mark.parametrize('neuron, options, top', WHOLE, ids=str)
def test_rates_and_entropy(neuron, options, top):
    model = _with_amplitude(_net(neuron, **options), .7)
    levels = _levels(model).round()
    with FiringRates(model, per_neuron=True) as rates, torch.no_grad():
        model(_x())
    assert rates.per_layer()['1'] == pytest.approx(float(levels.abs().mean()) / top)
    assert rates.per_step()['1'] == pytest.approx((levels.abs().flatten(1).mean(1) / top).tolist())
    by_neuron = []
    for i in range(D):
        values = levels[..., i].flatten().tolist()
        shares = [values.count(v) / len(values) for v in set(values)]
        by_neuron.append(-sum(p * math.log2(p) for p in shares))
    assert rates.entropy()['1'] == pytest.approx(sum(by_neuron) / D)
    assert len(levels.unique()) > 1


@pytest.mark.parametrize('neuron, options, top', WHOLE, ids=str)
def test_rates_of_a_training_forward(neuron, options, top):
    model = _with_amplitude(_net(neuron, **options), .7).train()
    recorder = RateRecorder(model)
    recorder.begin()
    model(_x())
    rate = recorder.take()['1']
    assert rate.item() == pytest.approx(float(_levels(model).abs().mean()) / top, rel=1e-5)  # float32
    rate.backward()
    assert model[0].weight.grad.abs().sum() > 0
    if 'amplitude' in model[1]._parameters:  # the size of a spike is no part of its rate
        assert model[1].amplitude.grad.abs().max() < 1e-6


@pytest.mark.parametrize('neuron, options, top', WHOLE, ids=str)
def test_additions_by_value(neuron, options, top):
    model = _with_amplitude(_net(neuron, **options), .7)
    shares, energy = count_macs(model, _x()), estimate_energy(model, _x())
    additions = float(_levels(model).abs().mean()) * T * D * K
    assert shares.whole == T * D * K and shares.additions == pytest.approx(additions, rel=1e-5)
    assert energy.macs == T * 4 * D and energy.ann_macs == 4 * D + D * K
    assert energy.spiking == pytest.approx(1e-6 * (MAC_PJ * T * 4 * D + AC_PJ * additions), rel=1e-5)
    kind = 'binary' if model[1].output == 'binary' else 'fractional'
    assert shares.by_module['2'][kind] == T * D * K


def test_analog_output_is_macs():
    model = _net('liaf')
    energy = estimate_energy(model, _x())
    assert energy.macs == T * (4 * D + D * K) and energy.additions == 0
    with FiringRates(model, per_neuron=True) as rates, torch.no_grad():
        model(_x())
    assert rates.per_layer()['1'] == pytest.approx(float((_levels(model) != 0).double().mean()))
    assert rates.entropy() == {}
    with pytest.raises(ValueError, match=r"'1' \(LIAF\) passes on analog values"):
        RateRecorder(model)
    assert 'output of the neurons: analog (layers behind it multiply)' in str(model.spiking_report())


def test_a_parallel_neuron_multiplies():
    model = _net('psn')
    energy = estimate_energy(model, _x())
    assert energy.macs == T * 4 * D + T * T * D and energy.ann_macs == 4 * D + D * K
    assert count_macs(model, _x()).by_module['1'] == dict(binary=0, fractional=0, analog=T * T * D)


def test_two_amplitudes_in_a_sum_do_not_fold():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, D), nn.Linear(4, D), nn.Linear(D, K)
            self.act1, self.act2 = nn.ReLU(), nn.ReLU()

        def forward(self, x):
            return self.c(self.act1(self.a(x)) + self.act2(self.b(x)))

    torch.manual_seed(0)
    model = convert_to_spiking(Net(), timesteps=T, neuron='real_spike', example_inputs=torch.zeros(1, 4))
    calibrate(model, _x())
    assert count_macs(model, _x()).whole == T * D * K  # both are 1: sums of spikes
    with torch.no_grad():
        model.act1.amplitude.fill_(.8)
        model.act2.amplitude.fill_(.37)
    assert count_macs(model, _x()).whole == 0


def test_a_layer_that_always_has_the_top_level_fires_always():
    model = _net('ilif')
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(1.)
    drive, = calibrate(model, _x()).spiking_report().drives
    assert drive.rate == .25  # it fires at every step, but not at the top level
    with torch.no_grad():
        model[0].bias.fill_(1e3)
    with FiringRates(model) as rates, torch.no_grad():
        model(_x())
    assert rates.per_layer()['1'] == 1


def test_records_are_of_binary_spikes():
    for neuron in ('ternary', 'mlf', 'liaf'):
        model = _net(neuron)
        with pytest.raises(ValueError, match=f'1 .*not binary but {model[1].output}'):
            record_spikes(model)
    model = _with_amplitude(_net('real_spike'), .7)
    with record_spikes(model) as record, torch.no_grad():
        model(_x())
    assert torch.equal(record['1'].double(), _levels(model).round())


@pytest.mark.parametrize('neuron, text', [
    ('lif', None), ('ternary', 'ternary (-1, 0 or 1), times an amplitude'), ('ilif', 'integer (0 to 4)'),
    ('real_spike', 'binary, times an amplitude')])
def test_report_says_what_the_neurons_pass_on(neuron, text):
    shown = str(_net(neuron).spiking_report())
    assert (f'output of the neurons: {text}\n' in shown) if text else 'output of the neurons' not in shown


def test_entropy_by_its_formula():
    p = torch.tensor([[.25, 0., .5], [.25, 0., .5]], dtype=torch.float64)
    assert level_entropy(p).tolist() == [1.5, 0, 1]
    rate = torch.rand(7, dtype=torch.float64)
    torch.testing.assert_close(level_entropy(rate[None]), spike_entropy(rate))


def test_maps_of_a_timm_model_with_amplitudes_per_channel():
    torch.manual_seed(0)
    model = timm.create_model('spiking_test_resnet', num_classes=3, neuron='real_spike', timesteps=2).eval()
    x = torch.randn(2, 3, 32, 32)
    calibrate(model, x)
    plain = count_macs(model, x)
    with torch.no_grad():
        for neuron in model.neurons().values():
            neuron.amplitude.copy_(torch.rand_like(neuron.amplitude) + .5)
    scaled = count_macs(model, x)
    inside = [name for name in plain.by_module if name.endswith('conv2')]  # takes act1's spikes, no sum
    assert inside and all(scaled.by_module[name]['binary'] == plain.by_module[name]['binary'] > 0 for name in inside)
