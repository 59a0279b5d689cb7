"""fold_gains: what folds and what does not, and that outputs stay the same."""
import copy

import pytest
import torch
import torch.nn as nn

from spiking_families import FAMILIES, ann_of, give_statistics
from timm_sscl import calibrate, convert_ann, convert_to_spiking, fold_gains

T, B, K = 4, 4, 5

# float64: the same products in another order; a flipped spike shows at 1e-3 and more
ROUND_OFF = dict(rtol=1e-9, atol=1e-9)


def _images(size=32):
    return torch.randn(B, 3, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _folds(model, images):
    model.eval()
    with torch.no_grad():
        before, reference = model(images, per_step=True), copy.deepcopy(model)
        assert fold_gains(model, images[:1]) is model
        result = model.spiking_report().folds
        assert torch.allclose(model(images, per_step=True), before, **ROUND_OFF)
        assert torch.equal(reference(images, per_step=True), before)
    assert before.std() > 1e-3  # a silent network would keep its output whatever is folded
    return result


class _Net(nn.Module):
    """conv-act, conv-bn-act with a residual sum, pooling, linear-act, shared act, weight used twice."""

    def __init__(self):
        super().__init__()
        self.conv1, self.act1 = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()
        self.conv2, self.bn2, self.act2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        self.act3, self.pool, self.conv3 = nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 6, 1)
        self.act4, self.fc, self.act5, self.head = nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, K)

    def forward(self, x):
        x = self.act1(self.conv1(x))
        y = self.act2(self.bn2(self.conv2(x)))
        x = self.act3(x + y)
        x = self.act4(self.conv3(self.pool(x)))
        x = self.act5(self.fc(x.mean((2, 3))))
        return self.head(x)


def _trained_statistics(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, .5, 2.)
            nn.init.normal_(module.running_mean)
    return model


def test_gains():
    torch.manual_seed(0)
    model = convert_to_spiking(_trained_statistics(_Net()).double(), timesteps=T)
    calibrate(model, _images())
    result = {f.name: f for f in _folds(model, _images())}
    assert result['act1'].into == 'conv1.weight, conv1.bias' and result['act2'].into == 'bn2.weight, bn2.bias'
    assert result['act4'].into == 'conv3.weight, conv3.bias' and result['act5'].into == 'fc.weight, fc.bias'
    assert not result['act3'].done and 'add' in result['act3'].into
    assert [n for n, lif in model.neurons().items() if lif.gain is not None] == ['act3']


@pytest.mark.parametrize('per_channel', [True, False])
def test_scales(per_channel):
    torch.manual_seed(0)
    model = convert_ann(_trained_statistics(_Net()).double(), _images(), T, per_channel=per_channel)
    result = {(f.name, f.factor): f for f in _folds(model, _images())}
    assert result['act3', 'scale'].into == 'conv3.weight'  # through max pooling
    assert not result['act1', 'scale'].done and 'add' in result['act1', 'scale'].into
    assert not result['act2', 'scale'].done
    assert not result['act4', 'scale'].done and 'mean' in result['act4', 'scale'].into
    assert result['act5', 'scale'].into == 'head.weight'
    assert result['act1', 'gain'].done and result['act2', 'gain'].done


@pytest.mark.slow
@pytest.mark.parametrize('family', ['resnet18', 'vgg11_bn', 'test_vit', 'convnext_atto', 'densenet',
                                    'mobilenetv3_small_050'])
def test_models(family):
    model = convert_to_spiking(ann_of(family), timesteps=2).double()
    images = _images(FAMILIES[family].size)
    calibrate(model, images)
    give_statistics(model, images)
    result = _folds(model, images)
    assert len(result) == len(model.neurons()) and sum(f.done for f in result) >= 1
    if family == 'resnet18':  # all but those behind a residual sum
        assert sum(f.done for f in result) == 9 and all('others take' in f.into for f in result if not f.done)
    if family == 'vgg11_bn':
        assert all(f.done for f in result)


def test_shared_weight_and_repeated_neuron_stay():
    class Shared(_Net):
        def forward(self, x):
            x = self.act1(self.conv2(self.act1(self.conv1(x))) + 0.)
            x = self.act2(self.conv2(x))
            return self.head(self.act4(self.conv3(x)).mean((2, 3)))

    torch.manual_seed(0)
    model = convert_to_spiking(Shared().double(), timesteps=T)
    calibrate(model, _images())
    result = {f.name: f for f in _folds(model, _images())}
    assert 'runs 2 times' in result['act1'].into and 'shared' in result['act2'].into and result['act4'].done


def test_checkpoint_of_a_folded_model():
    torch.manual_seed(0)
    model = convert_to_spiking(_trained_statistics(_Net()).double(), timesteps=T)
    calibrate(model, _images())
    fold_gains(model, _images())
    other = convert_to_spiking(_Net().double(), timesteps=2)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other.eval()(_images()), model.eval()(_images()))
