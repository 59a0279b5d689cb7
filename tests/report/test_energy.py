"""Energy of small networks by hand: the stem multiplies at every timestep, and a spike is an addition per weight."""
import pytest
import torch
import torch.nn as nn

from timm_sscl import FiringRates, convert_ann, convert_to_spiking, estimate_energy

T, B = 3, 5


def test_energy_is_the_formula_by_hand():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 2))
    model, x, spikes = convert_to_spiking(net, timesteps=T, v_threshold=.2).eval(), torch.randn(B, 4), []
    for i in (1, 3):
        model[i].register_forward_hook(lambda module, args, out: spikes.append(out.sum().item()))
    model(x)
    first, second = spikes
    assert first > 0 and second > 0
    spikes.clear()
    energy = estimate_energy(model, x)
    additions = (first * 7 + second * 2) / B  # a spike is added by every weight behind it
    assert energy.macs == T * 4 * 6 and energy.ann_macs == 4 * 6 + 6 * 7 + 7 * 2
    assert energy.additions == pytest.approx(additions, rel=1e-6)  # a float32 rate
    assert energy.spiking == pytest.approx((4.6 * T * 24 + .9 * additions) * 1e-6, rel=1e-6)  # microjoules
    assert energy.ann == pytest.approx(4.6 * 80 * 1e-6, rel=1e-12)
    layers = energy.layers
    assert list(layers) == ['0', '2', '4'] and [layer.macs for layer in layers.values()] == [T * 24, 0, 0]
    assert [layers['2'].additions, layers['4'].additions] == pytest.approx([first * 7 / B, second * 2 / B], rel=1e-6)
    assert [layer.ann for layer in layers.values()] == pytest.approx([4.6e-6 * n for n in (24, 42, 14)], rel=1e-12)
    assert sum(layer.spiking for layer in layers.values()) == pytest.approx(energy.spiking, rel=1e-12)
    assert energy.ratio == pytest.approx(energy.spiking / energy.ann, rel=1e-12)


def test_energy_of_a_converted_ann_has_the_spikes_of_its_own_forward():
    """Spikes have the height of the threshold, which folds into the weights behind them: still additions."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 16, 3))
    images = torch.rand(B, 1, 4, 4)
    model = convert_ann(net, images, timesteps=T)
    assert model[1].scale is not None
    for neuron, channels in ((model[1], 4), (model[3], 5)):  # heights per channel
        neuron.set_gain(neuron.gain, neuron.scale * torch.linspace(.5, 1.5, channels)[:, None, None])
    with FiringRates(model) as rates, torch.no_grad():
        model(images)
    first, second = (rate * T for rate in rates.per_layer().values())  # spikes per neuron and image
    assert first > 0 and second > 0
    energy = estimate_energy(model, images)
    assert energy.macs == T * 9 * 4 * 16
    assert energy.additions == pytest.approx(first * 4 * 16 * 5 + second * 5 * 16 * 3, rel=1e-5)  # float32 rates


def test_a_layer_that_is_silent_on_the_first_images_adds_at_the_rate_of_all():
    torch.manual_seed(0)
    model = convert_to_spiking(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), timesteps=T).eval()
    nn.init.constant_(model[0].weight, 1.)
    nn.init.zeros_(model[0].bias)
    dark, bright = torch.zeros(8, 4), torch.ones(8, 4)
    with FiringRates(model, inputs=True) as rates:
        model(torch.cat([dark, bright]))
    energy = estimate_energy(model, dark, rates)
    assert estimate_energy(model, dark).additions == 0
    assert energy.additions == pytest.approx(T * 12 * rates.per_layer()['1'], rel=1e-6) and energy.additions > 0


def test_rates_that_do_not_fit_are_refused():
    model = convert_to_spiking(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), timesteps=T)
    x = torch.ones(2, 4)
    with FiringRates(model) as rates:
        model(x)
    with pytest.raises(ValueError, match=r'inputs=True'):
        estimate_energy(model, x, rates)
    with FiringRates(model, inputs=True) as rates:
        pass
    with pytest.raises(ValueError, match='counted on no image'):
        estimate_energy(model, x, rates)
    with rates:
        model(x)
    model.set_timesteps(T + 1)
    with pytest.raises(ValueError, match='3 timesteps, and the model has 4'):
        estimate_energy(model, x, rates)
