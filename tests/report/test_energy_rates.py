"""Energy at rates counted batch by batch is that of all images at once: scales, shared layers, several calls, compiled
and deployed models.
"""
import pytest
import timm
import torch
import torch.nn as nn

from timm_sscl import FiringRates, calibrate, convert_ann, convert_to_spiking, estimate_energy
from timm_sscl.export import deploy

T = 2


class Block(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.conv, self.act = conv, nn.ReLU()

    def forward(self, x):
        return self.act(self.conv(x))


class Shared(nn.Module):
    """Two blocks with one convolution, the second on a smaller map."""
    def __init__(self):
        super().__init__()
        self.stem, conv = Block(nn.Conv2d(3, 6, 3, padding=1)), nn.Conv2d(6, 6, 3, padding=1)
        self.first_block, self.b = Block(conv), Block(conv)
        self.pool, self.fc = nn.MaxPool2d(2), nn.Linear(6, 4)

    def forward(self, x):
        return self.fc(self.b(self.pool(self.first_block(self.stem(x)))).amax((2, 3)))


class Mixed(Shared):
    """One convolution on analog currents, then on spikes."""
    def forward(self, x):
        analog = self.first_block.conv(self.stem.conv(x))
        return self.fc(self.first_block(self.b(self.stem.act(analog))).amax((2, 3)))


def _images(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(24, 3, 16, 16, generator=generator) * torch.linspace(.4, 3, 24)[:, None, None, None]


def _spiking(net, **options):
    model = convert_to_spiking(net, timesteps=T, **options).eval()
    calibrate(model, _images())
    return model


def _resnet(**options):
    return _spiking(timm.create_model('test_resnet', num_classes=4), **options)


def _from_ann():
    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Conv2d(6, 5, 3), nn.ReLU(),
                        nn.Flatten(), nn.Linear(20, 4))
    return convert_ann(net, _images(), timesteps=4)  # a threshold per channel


MODELS = {
    'convert_ann': _from_ann, 'shared': lambda: _spiking(Shared()), 'mixed': lambda: _spiking(Mixed()),
    'compiled': lambda: torch.compile(_resnet()), 'deployed': lambda: deploy(_resnet(), _images()[:1]),
    'max pooling': _resnet, 'sums of spikes': lambda: _resnet(residual='sew'),
    'amplitudes': lambda: _resnet(neuron='ilif'), 'signs': lambda: _resnet(neuron='ternary')}


@pytest.mark.parametrize('make', MODELS.values(), ids=MODELS)
def test_energy_at_the_rates_of_batches_is_that_of_all_images(make):
    torch.manual_seed(0)
    model, images = make(), _images()
    with FiringRates(model, inputs=True) as rates, torch.no_grad():
        for batch in images.split(10):
            model(batch)
    whole, few = estimate_energy(model, images), estimate_energy(model, images[:8])
    found = estimate_energy(model, images[:8], rates)
    assert whole.additions > 1.05 * few.additions > 0  # the first images are darker
    assert found.spiking == pytest.approx(whole.spiking, rel=1e-5)  # rates are float32 means
    assert (found.macs, found.ann_macs) == (whole.macs, whole.ann_macs)
    for name, layer in whole.layers.items():
        assert found.layers[name] == pytest.approx(layer, rel=1e-5)
    assert not any('_orig_mod' in name for name in found.layers)


@pytest.mark.parametrize('shown', [24, 8])
@pytest.mark.parametrize('neuron,pool,macs', [
    ('lif', nn.AvgPool2d, T * 6 * 4 * 64), ('real_spike', nn.AvgPool2d, T * 6 * 4 * 64),
    ('real_spike', nn.MaxPool2d, 0), ('lif', nn.MaxPool2d, 0), ('liaf', nn.MaxPool2d, T * 6 * 4 * 64)])
def test_a_layer_that_is_silent_on_the_first_images_has_the_kind_of_the_others(neuron, pool, macs, shown):
    """Averages of spikes multiply, and so does analog output; zeros would add."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), pool(2), nn.Conv2d(6, 4, 8), nn.Flatten())
    model, images = _spiking(net, neuron=neuron), _images()
    images[:8] = 0
    model[0].bias.data.zero_()
    if neuron == 'real_spike':
        model[1].amplitude.data.uniform_(.3, .9)
    with FiringRates(model, inputs=True) as rates, torch.no_grad():
        model(images)
    energy, whole = estimate_energy(model, images[:shown], rates), estimate_energy(model, images)
    assert estimate_energy(model, images[:8]).layers['3'][2:] == (0, 0.)
    assert energy.layers['3'].macs == whole.layers['3'].macs == macs
    assert energy.spiking == pytest.approx(whole.spiking, rel=1e-5)  # float32 means


def test_an_ann_and_no_images_are_refused():
    with pytest.raises(ValueError, match='Sequential has no spiking neurons'):
        estimate_energy(nn.Sequential(nn.Conv2d(3, 4, 3)), _images())
    with pytest.raises(ValueError, match=r'images: have shape \(0, 3, 16, 16\), no image'):
        estimate_energy(_spiking(Shared()), _images()[:0])


def test_rates_of_another_model_and_of_parts_of_a_forward_are_refused():
    model, images = _spiking(Shared()), _images()
    wrapped = nn.Sequential(model)
    with FiringRates(wrapped, inputs=True) as rates:
        wrapped(images)
    with pytest.raises(ValueError, match="another model, since layer 'stem.conv' did not run"):
        estimate_energy(model, images, rates)
    with FiringRates(model, inputs=True) as rates:
        for _ in range(2):
            model.forward(images)  # without the hooks of the model
    with pytest.raises(ValueError, match="layer 'first_block.conv' runs 2 times in a forward, and was counted 1"):
        estimate_energy(model, images, rates)
