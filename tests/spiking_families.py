"""Small models of many timm families, plain and converted, with inputs on which they fire."""
import copy
import functools
import pickle
from typing import Dict, NamedTuple, Optional

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

from timm_sscl import LIF, convert_to_spiking

T, B, K = 3, 2, 5

# float64 sums taken in another order (other batch size, memory format, recomputation): values here are below about 100
# and a flipped spike or a wrong step shows at 1e-3 and more.
ROUND_OFF = dict(rtol=1e-9, atol=1e-10)

# by class name, as timm has several classes of one activation
ANALOG = {'ReLU', 'ReLU6', 'LeakyReLU', 'PReLU', 'ELU', 'SELU', 'CELU', 'GELU', 'GELUTanh', 'QuickGELU', 'SiLU',
          'Swish', 'Mish', 'Hardswish', 'HardSwish', 'HardMish', 'Hardtanh', 'Tanh', 'Softplus', 'Softsign'}


class Family(NamedTuple):
    name: str
    kwargs: Dict[str, object] = {}
    size: int = 32
    neuron: Dict[str, object] = {}  # layers behind a LayerNorm have small currents: a low threshold wakes them


LOW = dict(v_threshold=.05)
NARROW = dict(channels=(16, 24, 32, 40))
FAMILIES = {
    'test_resnet': Family('test_resnet'),
    'resnet18': Family('resnet18', NARROW),
    'resnet50': Family('resnet50', dict(NARROW, layers=(1, 2, 1, 1))),
    'resnet10t': Family('resnet10t'),
    'resnetblur18': Family('resnetblur18', NARROW),
    'seresnet18': Family('seresnet18', NARROW),
    'vgg11_bn': Family('vgg11_bn', dict(mlp_ratio=1 / 64)),  # the head's 7x7 convolution has 100 M weights otherwise
    'regnety_002': Family('regnety_002'),
    'test_efficientnet': Family('test_efficientnet'),
    'efficientnet_b0': Family('efficientnet_b0'),
    'mobilenetv2_035': Family('mobilenetv2_035'),
    'mobilenetv3_small_050': Family('mobilenetv3_small_050'),
    # at 32 px nothing is left to pool
    'densenet': Family('densenet121', dict(growth_rate=8, block_config=(2, 3, 2, 2)), 64),
    'test_convnext': Family('test_convnext', {}, 32, LOW),
    'convnext_atto': Family('convnext_atto', dict(depths=(1, 1, 2, 1)), 32, LOW),
    'test_vit': Family('test_vit', dict(img_size=32), 32, LOW),
    'deit_tiny_distilled': Family('deit_tiny_distilled_patch16_224', dict(img_size=32, depth=3), 32, LOW),
}
# one small model per way of being built, for what need not be repeated over all of them
SMALL = ['test_resnet', 'regnety_002', 'mobilenetv3_small_050', 'densenet', 'test_convnext', 'test_vit']

# mobilenetv2_035 has the same class
every_family = pytest.mark.parametrize('family', [f for f in FAMILIES if f != 'efficientnet_b0'])
small_families = pytest.mark.parametrize('family', SMALL)


def images_of(family: str = 'test_resnet', batch: int = B, seed: int = 1, frames: Optional[int] = None) -> torch.Tensor:
    """Smooth like photographs: a max-pooled spike map of white noise is all ones, which kills DenseNet's stem."""
    size, generator = FAMILIES[family].size, torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch * (frames or 1), 3, size // 8, size // 8, generator=generator)
    x = F.interpolate(coarse, size=(size, size), mode='bicubic')
    return x if frames is None else x.unflatten(0, (batch, frames))


def ann_of(family: str, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    f = FAMILIES[family]
    return _wake_branches(timm.create_model(f.name, num_classes=K, **{**f.kwargs, **kwargs}))


def _wake_branches(model: nn.Module) -> nn.Module:
    """Scales that start at 0 (a residual branch's last norm) or 1e-6 (layer scale) hide the branch from a test."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1 and name.endswith(('weight', 'gamma')) and p.abs().max() < 1e-3:
                p.fill_(1.)
    return model


def give_statistics(model: nn.Module, x: torch.Tensor) -> None:
    """Fill every BatchNorm with the statistics of x: with stock ones, deep layers are silent in eval mode."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # a plain average instead of a slow exponential one
    model.train()
    with torch.no_grad():
        for _ in range(2):
            model(x)
    for m, momentum in zip(norms, momenta):
        m.momentum = momentum


@functools.lru_cache(maxsize=None)
def _cached(family: str) -> nn.Module:
    model = convert_to_spiking(ann_of(family), timesteps=T, **FAMILIES[family].neuron)
    give_statistics(model, images_of(family, batch=8, seed=2))
    return model.eval()


def spiking_of(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A converted model that fires, in eval mode; the caller may change it."""
    return copy.deepcopy(_cached(family)).to(dtype)


def neurons_of(model: nn.Module):
    return [m for m in model.modules() if isinstance(m, LIF)]


def count_of(model: nn.Module, names) -> int:
    return sum(type(m).__name__ in names for m in model.modules())


def short_resnet(num_classes: int = K, seed: int = 0, **options) -> nn.Module:
    """timm's test_resnet with a plain stem and two empty stages; spiking, where options of the conversion are given.

    A BasicBlock with an identity as shortcut and a Bottleneck with a convolution are left: 6 of 12 neurons, for tests
    that compile, which takes up to a second for each.
    """
    torch.manual_seed(seed)
    model = timm.create_model(
        'test_resnet', num_classes=num_classes, stem_type='', channels=(64, 64, 16, 64), zero_init_last=False)
    model.layer2, model.layer4 = nn.Sequential(), nn.Sequential()
    return convert_to_spiking(model, **options) if options else model


class Net(nn.Module):
    """A plain module: convolution, norm, activation, classifier."""

    def __init__(self, act: Optional[nn.Module] = None):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.act = nn.ReLU() if act is None else act
        self.fc = nn.Linear(4, K)

    def forward(self, x):
        return self.fc(self.act(self.bn(self.conv(x))).mean((2, 3)))


# ---------------------------------------------------------------------------------------------------- it stays a model

def pickled(model):
    return pickle.loads(pickle.dumps(model))
