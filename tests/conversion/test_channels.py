"""Neurons with parameters per channel: their number and axis are seen in a forward, or the conversion refuses."""
import timm
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from timm_sscl import convert_to_spiking
from timm_sscl.neurons import create_neuron


class _Net(nn.Module):
    def __init__(self, second=6):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, second, 3, padding=1)
        self.act, self.fc = nn.ReLU(), nn.Linear(second, 5)

    def forward(self, x):
        x = self.act(self.conv2(self.act(self.conv1(x)))).mean((2, 3))
        return F.relu(self.fc(x))


def _convert(model, neuron='real_spike', **options):
    return convert_to_spiking(model, timesteps=2, neuron=neuron, input_size=(3, 8, 8), **options)


def test_maps_and_vectors_modules_and_functions():
    model = _convert(_Net())
    shapes = {name: neuron.channels for name, neuron in model.neurons().items()}
    assert shapes == {'act': (6, 1, 1), 'functional_act': (5,)}
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 5)
    assert {p.dtype for p in _convert(_Net().double()).parameters()} == {torch.float64}


def test_tokens_and_sequences():
    tokens = convert_to_spiking(nn.Sequential(nn.Linear(4, 7), nn.ReLU()), neuron='glif',
                                example_inputs=torch.zeros(1, 9, 4))
    assert tokens[1].decay.shape == (7,)
    sequence = convert_to_spiking(nn.Sequential(nn.Conv1d(4, 7, 3), nn.ReLU()), neuron='glif',
                                  example_inputs=torch.zeros(1, 4, 9))
    assert sequence[1].decay.shape == (7, 1)


def test_a_module_on_two_widths_is_refused_by_name():
    net = _Net(second=9)
    with pytest.raises(ValueError, match='RealSpike has parameters per channel, but act runs on inputs of 6 and 9 cha'):
        _convert(net)
    assert type(net) is _Net and type(net.act) is nn.ReLU  # as it was
    model = _convert(_Net(second=9), 'glif', neuron_kwargs=dict(per_channel=False))
    assert model.act.decay.shape == ()


def test_an_unknown_axis_is_refused_by_name():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x):
            return self.act(x - 1)

    with pytest.raises(ValueError, match='act has an input of which the axis of the channels is not known'):
        _convert(Net())


def test_a_layer_that_does_not_run_is_refused_by_name():
    class Net(_Net):
        def __init__(self):
            super().__init__()
            self.auxiliary = nn.ReLU()

    with pytest.raises(ValueError, match='but auxiliary did not run'):
        _convert(Net())


def test_a_new_head_and_a_checkpoint_of_another_neuron():
    model = timm.create_model('spiking_test_vit', num_classes=3, neuron='real_spike')
    model.reset_classifier(4)
    lif = timm.create_model('spiking_test_vit', num_classes=4)
    lif.load_state_dict(model.state_dict())
    assert {n: m.channels for n, m in lif.neurons().items()} == {n: m.channels for n, m in model.neurons().items()}


def test_alone():
    with pytest.raises(RuntimeError, match=r'RealSpike has parameters per channel.*channels=\(C, 1, 1\)'):
        create_neuron('real_spike', 2)(torch.zeros(2, 3, 4, 4))
    for bad in (3, [3, 1, 1], (3, 4, 1), ()):
        with pytest.raises(ValueError, match='channels='):
            create_neuron('real_spike', 2, channels=bad)
    assert create_neuron('lif', 2, channels=(3, 1, 1)).channels is None  # has none per channel


def test_settings_that_parameters_are_made_from():
    neuron = create_neuron('plif', 2, tau=.5)
    with pytest.raises(ValueError, match='tau=0.7: the parameters of PLIF were made with tau=0.5'):
        neuron.configure(2, tau=.7)
    assert neuron.settings.tau == .5
    trained = timm.create_model('spiking_test_resnet', num_classes=3, neuron='sliding_psn', neuron_kwargs=dict(k=3))
    other = timm.create_model('spiking_test_resnet', num_classes=3, neuron='sliding_psn').eval()
    other._explicit = frozenset()
    other.load_state_dict(trained.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(other(x), trained.eval()(x))


def test_prelu_has_a_parameter_by_the_name_of_no_neuron():
    class PReLUNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act = nn.Conv2d(3, 6, 3), nn.PReLU()

        def forward(self, x):
            return self.act(self.conv(x)).mean((2, 3))

    ann, model = PReLUNet(), _convert(PReLUNet(), 'psn')
    model.load_state_dict(ann.state_dict())
    other = _convert(PReLUNet(), 'psn').eval()
    other.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(other(x), model.eval()(x))
