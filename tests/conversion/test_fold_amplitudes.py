"""fold_gains of amplitudes that neurons learn: into the next weights, or a reason; outputs stay the same."""
import copy

import pytest
import timm
import torch
import torch.nn as nn

from timm_sscl import calibrate, convert_to_spiking, fold_gains

T, K = 3, 4
ROUND_OFF = dict(rtol=1e-9, atol=1e-9)  # float64: the same products in another order; a flipped spike shows at 1e-3


class _Net(nn.Module):
    """A convolution with groups, a depthwise one, max pooling, a residual sum, and a mean before the classifier."""

    def __init__(self):
        super().__init__()
        self.conv1, self.act1 = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()
        self.grouped, self.act2 = nn.Conv2d(8, 12, 3, padding=1, groups=4), nn.ReLU()
        self.pool, self.depthwise, self.act3 = nn.MaxPool2d(2), nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.ReLU()
        self.conv4, self.act4, self.act5, self.head = nn.Conv2d(12, 12, 1), nn.ReLU(), nn.ReLU(), nn.Linear(12, K)

    def forward(self, x):
        x = self.act1(self.conv1(x))
        x = self.act3(self.depthwise(self.pool(self.act2(self.grouped(x)))))
        x = self.act5(self.act4(self.conv4(x)) + x)
        return self.head(x.mean((2, 3)))


def _images():
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _amplitudes(model, low=.5):
    """Give every amplitude values of its own."""
    with torch.no_grad():
        for i, neuron in enumerate(model.neurons().values()):
            neuron.amplitude.copy_(torch.empty(neuron.amplitude.shape).uniform_(
                low, 2., generator=torch.Generator().manual_seed(i)))


def _net(neuron, **options):
    torch.manual_seed(0)
    model = convert_to_spiking(_Net(), timesteps=T, neuron=neuron, neuron_kwargs=options).double()
    calibrate(model, _images())
    _amplitudes(model)
    return model.eval()


def _fold(model, images):
    with torch.no_grad():
        before = model(images, per_step=True)
        fold_gains(model, images[:1])
        torch.testing.assert_close(model(images, per_step=True), before, **ROUND_OFF)
    assert before.std() > 1e-3  # spikes arrive
    return {fold.name: fold for fold in model.spiking_report().folds if fold.factor == 'amplitude'}


@pytest.mark.parametrize('neuron', ['ternary', 'real_spike'])
def test_into_the_next_weights_or_a_reason(neuron):
    model = _net(neuron)
    twin = copy.deepcopy(model)
    folds = _fold(model, _images())
    assert folds['act1'].into == 'grouped.weight' and folds['act2'].into == 'depthwise.weight'  # through max pooling
    assert folds['act3'].into == folds['act4'].into == 'stays: add takes its spikes'
    assert folds['act5'].into == 'stays: mean takes its spikes'
    for name, now in model.neurons().items():
        done = folds[name].done
        assert bool((now.amplitude == 1).all()) == done
        assert done or torch.equal(now.amplitude, twin.get_submodule(name).amplitude)
    assert model.state_dict().keys() == twin.state_dict().keys()
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(twin(_images()), model(_images()))


def test_an_amplitude_that_is_not_positive_stays_before_max_pooling():
    model = _net('real_spike')
    with torch.no_grad():
        model.act1.amplitude[2], model.act2.amplitude[3] = -.7, -.7
    folds = _fold(model, _images())
    assert folds['act1'].into == 'grouped.weight'
    assert folds['act2'].into == 'stays: max_pool2d takes its spikes, and the factor is not positive'


def test_an_amplitude_of_one_is_nothing_to_fold():
    torch.manual_seed(0)
    model = convert_to_spiking(_Net(), timesteps=T, neuron='real_spike').double().eval()
    fold_gains(model, _images())
    assert not model.spiking_report().folds


def test_a_sew_sum_keeps_its_amplitudes():
    torch.manual_seed(0)
    model = timm.create_model('spiking_test_resnet', num_classes=K, timesteps=T, neuron='ternary', residual='sew')
    model = model.double()
    calibrate(model, _images())
    _amplitudes(model)
    with torch.no_grad():
        for module in model.modules():  # norms of an untrained network would silence it in evaluation mode
            if isinstance(module, nn.BatchNorm2d):
                module.weight.fill_(2.)
    folds = _fold(model.eval(), _images())
    sums = {f'layer{i}.0.act{3 if i == 3 else 2}' for i in range(1, 5)}  # layer3 is a Bottleneck
    sums |= {'act1', *(f'layer{i}.0.downsample.3' for i in range(2, 5))}  # the stem's is the first shortcut
    assert all(folds[name].into == 'stays: add takes its spikes' for name in sums)
    assert all(folds[name].done for name in folds.keys() - sums) and len(folds) == 15
