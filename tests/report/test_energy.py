"""Energy of a small network by hand: the stem multiplies at every timestep, and a spike is an addition per weight."""
import pytest
import torch
import torch.nn as nn

from timm_sscl import convert_to_spiking, estimate_energy

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
