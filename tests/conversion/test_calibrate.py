"""calibrate: gains from one forward, what they leave alone, and that they travel with the checkpoint."""
import copy
import logging
import pickle

import pytest
import timm
import torch
import torch.nn as nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from timm_sscl import LIF, calibrate, convert_to_spiking

T, B, K = 2, 8, 5


def _images(seed=0):
    return torch.randn(B, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


class _Net(nn.Module):
    """Three layers of very different scale; the last runs twice."""

    def __init__(self):
        super().__init__()
        self.conv, self.act1 = nn.Conv2d(3, 8, 3), nn.ReLU()
        self.bn, self.act2 = nn.BatchNorm2d(8), nn.ReLU()
        self.fc, self.act3, self.head = nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, K)
        with torch.no_grad():
            self.conv.weight.mul_(.01)
            self.fc.weight.mul_(30.)

    def forward(self, x):
        x = self.act2(self.bn(self.act1(self.conv(x))))
        x = self.act3(self.fc(x.mean((2, 3))))
        return self.head(self.act3(x - .5))


def _currents(model, x):
    """Input of every neuron layer and its spikes, in the order of the calls."""
    seen = []
    handles = [lif.register_forward_hook(lambda m, args, out, n=n: seen.append((n, args[0], out)))
               for n, lif in model.neurons().items()]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize('v_threshold', [.5, 1.])
def test_gain_is_one_over_the_root_mean_square(v_threshold):
    torch.manual_seed(0)
    model = convert_to_spiking(_Net(), timesteps=T, v_threshold=v_threshold)
    x = _images()
    drives = calibrate(model, x).spiking_report().drives
    assert [d.name for d in drives] == ['act1', 'act2', 'act3']
    seen = _currents(model.train(), x)
    assert [n for n, _, _ in seen] == ['act1', 'act2', 'act3', 'act3']
    for drive, (name, current, spikes) in zip(drives[:2], seen):
        rms = current.double().square().mean().sqrt().item()
        assert drive.rms == pytest.approx(rms, rel=1e-4)  # float32 sums
        assert drive.gain == pytest.approx(v_threshold / .5 / rms, rel=1e-4)
        assert model.get_submodule(name).gain.item() == pytest.approx(drive.gain, rel=1e-6)
        assert drive.rate == pytest.approx(spikes.double().mean().item(), abs=1e-6)
        assert .05 < drive.rate < .95
    assert drives[2].rate > 0


def test_gain_multiplies_the_current():
    lif = LIF(T)
    x = torch.randn(T * 3, 4, 5, 5, dtype=torch.float64)
    expected = lif(x * .3) * 2.
    lif.set_gain(torch.tensor(.3, dtype=torch.float64), torch.tensor(2., dtype=torch.float64))
    assert torch.equal(lif(x), expected)
    lif.set_gain(torch.full((4, 1, 1), .3, dtype=torch.float64))
    assert torch.equal(lif(x), expected / 2.)
    assert lif(x.bfloat16()).dtype == torch.bfloat16


def test_nothing_else_changes():
    torch.manual_seed(0)
    model = timm.create_model('spiking_test_resnet', num_classes=K, drop_rate=.5, drop_path_rate=.5)
    model.layer1.eval()
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    calibrate(model, _images())
    assert torch.equal(torch.get_rng_state(), state) and [m.training for m in model.modules()] == modes
    after = model.state_dict()
    zero = {k for k, v in before.items() if k.endswith('.weight') and not v.any()}
    assert zero  # the last norm of each branch starts at zero
    gains = {f'{name}.spiking_gain' for name in model.neurons()}
    for key, value in before.items():
        if key not in gains and key != 'spiking_settings':  # which tells that there are gains
            assert torch.equal(after[key], torch.full_like(value, .1) if key in zero else value), key
    assert set(after) == set(before) and all(after[key] != before[key] for key in gains)
    assert all(p.requires_grad for p in model.parameters()) and not any(m._forward_hooks for m in model.modules())
    first = [lif.gain.item() for lif in model.neurons().values()]
    calibrate(model, _images())  # measures from scratch
    assert [lif.gain.item() for lif in model.neurons().values()] == first


@pytest.mark.parametrize('name', ['test_resnet', 'test_vit', 'test_convnext', 'test_nfnet', 'test_efficientnet',
                                  'levit_128s', 'densenet121', 'gmlp_ti16_224'])
def test_every_layer_fires_and_gets_a_gradient(name):
    """densenet: max pooling of spikes leaves few zeros, a skewed input; gmlp: its classifier starts at zero."""
    torch.manual_seed(0)
    model = timm.create_model(f'spiking_{name}', timesteps=T, num_classes=K).train()
    size = 224 if '224' in name or 'levit' in name else 64
    x = torch.randn(4, 3, size, size)
    drives = calibrate(model, x).spiking_report().drives
    assert {d.name for d in drives} == set(model.neurons()) and all(0 < d.rate < 1 for d in drives)
    got = set()
    for layer, lif in model.neurons().items():
        lif.register_full_backward_hook(lambda m, gi, go, layer=layer: got.add(layer) if gi[0].any() else None)
    out = model(x)
    out = sum(out) if isinstance(out, tuple) else out
    (out * torch.randn_like(out)).sum().backward()
    assert got == set(model.neurons())


def test_gains_travel_with_the_checkpoint_and_are_optional(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model('spiking_test_vit', num_classes=K, img_size=32).eval()
    ann_state = timm.create_model('test_vit', num_classes=K, img_size=32).state_dict()
    calibrate(model, _images())
    x, expected = _images(1), model(_images(1))
    torch.save(model.state_dict(), tmp_path / 'model.pth')
    create = dict(num_classes=K, img_size=32)
    loaded = timm.create_model('spiking_test_vit', checkpoint_path=str(tmp_path / 'model.pth'), **create).eval()
    assert torch.equal(loaded(x), expected)
    overlay = dict(file=str(tmp_path / 'model.pth'), num_classes=K)
    start = timm.create_model('spiking_test_vit', pretrained=True, pretrained_cfg_overlay=overlay, **create).eval()
    assert torch.equal(start(x), expected)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(clone(x), expected)
    gains = {n: lif.gain.item() for n, lif in loaded.neurons().items()}
    loaded.load_state_dict(ann_state, strict=True)  # an ANN's weights leave the gains
    assert {n: lif.gain.item() for n, lif in loaded.neurons().items()} == gains
    plain = timm.create_model('spiking_test_vit', **create)
    loaded.load_state_dict(plain.state_dict(), strict=True)  # a spiking checkpoint without gains has none
    assert all(lif.gain is None for lif in loaded.neurons().values())


def test_moves_with_the_model():
    model = convert_to_spiking(_Net())
    calibrate(model, _images())
    model.double()
    assert model.act1.gain.dtype == torch.float64 and model(_images().double()).dtype == torch.float64


def test_bad_input_names_what_is_wrong():
    with pytest.raises(ValueError, match='convert_to_spiking'):
        calibrate(_Net(), _images())
    model = convert_to_spiking(_Net())
    with pytest.raises(ValueError, match='images'):
        calibrate(model, torch.full((2, 3, 32, 32), float('nan')))
    model.act1.set_gain(None, torch.tensor(2.))
    with pytest.raises(ValueError, match='convert_ann'):
        calibrate(model, _images())


def test_silent_and_idle_layers_are_named(caplog):
    class Dead(_Net):
        def __init__(self):
            super().__init__()
            self.idle = nn.ReLU()

        def forward(self, x):
            x = self.act1(self.conv(x) * 0. - 1.)
            return self.head(self.fc(x.mean((2, 3))))

    model = convert_to_spiking(Dead())
    with caplog.at_level(logging.WARNING, logger='timm_sscl'):
        drives = calibrate(model, _images()).spiking_report().drives
    assert [(d.name, d.rate) for d in drives] == [('act1', 0.)]
    assert ('never fire' in caplog.text and 'act1' in caplog.text
            and 'did not run' in caplog.text and 'idle' in caplog.text)


def _pruned(layer):
    prune.l1_unstructured(layer, 'weight', .5)
    return layer


# the old weight norm and spectral norm warn that they are old
_COMPUTED = [
    pytest.param(weight_norm, marks=pytest.mark.filterwarnings('ignore')), parametrizations.weight_norm, spectral_norm,
    parametrizations.spectral_norm, parametrizations.orthogonal, _pruned]
_IDS = ['weight_norm (old)', 'weight_norm', 'spectral_norm (old)', 'spectral_norm', 'orthogonal', 'pruned']


@pytest.mark.parametrize('compute', _COMPUTED, ids=_IDS)
def test_weights_that_are_computed(compute):
    """The gains are those of the network whose weights are plain and have the same values."""
    torch.manual_seed(0)
    net = _Net()
    for layer in (net.conv, net.fc, net.head):
        compute(layer)
    net.eval()(_images())  # computes the weights of the old kinds
    plain = _Net()
    for name in ('conv', 'fc', 'head'):
        plain.get_submodule(name).load_state_dict(
            dict(weight=net.get_submodule(name).weight.detach(), bias=net.get_submodule(name).bias))
    expected = calibrate(convert_to_spiking(plain, timesteps=T), _images()).spiking_report().drives
    model = convert_to_spiking(net, timesteps=T).train()
    before = copy.deepcopy(model.state_dict())
    assert calibrate(model, _images()).spiking_report().drives == expected
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items() if 'spiking_' not in key)


@pytest.mark.parametrize('compute,name', [
    pytest.param(weight_norm, 'fc.weight_g', marks=pytest.mark.filterwarnings('ignore')),
    (parametrizations.weight_norm, 'fc.parametrizations.weight.original0'), (_pruned, 'fc.weight_orig')])
def test_computed_weights_that_are_zero_throughout_become_small(compute, name):
    torch.manual_seed(0)
    model = _Net()
    compute(model.fc)
    model = convert_to_spiking(model, timesteps=T)
    with torch.no_grad():
        model.get_parameter(name).zero_()
        model.fc.bias.zero_()
    drives = {d.name: d for d in calibrate(model, _images()).spiking_report().drives}
    assert drives['act3'].rate > 0 and drives['act3'].rms > 0 and model.get_parameter(name).any()


def test_a_mask_of_zeros_stays(caplog):
    torch.manual_seed(0)
    model = convert_to_spiking(_Net(), timesteps=T)
    prune.custom_from_mask(model.fc, 'weight', torch.zeros(8, 8))
    model.fc.bias.data.fill_(-1.)
    assert calibrate(model, _images()).spiking_report().drives[2].rate == 0
    assert not model.fc.weight.any() and 'act3' in caplog.text


def test_failure_leaves_gains_and_weights():
    torch.manual_seed(0)
    model = timm.create_model('spiking_test_resnet', num_classes=K)
    calibrate(model, _images(1))
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.layer1[0].bn2.weight.zero_()  # would be revived
        before['layer1.0.bn2.weight'].zero_()
    model.layer2.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        calibrate(model, _images())
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], value) for key, value in before.items())
    assert not any(lif._forward_pre_hooks or lif._forward_hooks for lif in model.neurons().values())


def test_current_that_is_not_finite_is_named():
    model = convert_to_spiking(_Net(), timesteps=T)
    model.bn.bias.data[0] = float('inf')
    with pytest.raises(ValueError, match='act2'):
        calibrate(model, _images())
    assert model.act1.gain is None  # as before


def test_no_layer_that_runs():
    class Idle(_Net):
        def forward(self, x):
            return self.head(x.mean((2, 3)).repeat(1, 3)[:, :8])

    with pytest.raises(ValueError, match='none of its neuron layers'):
        calibrate(convert_to_spiking(Idle(), timesteps=T), _images())
