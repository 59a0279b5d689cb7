"""Every seam in one file: neuron, surrogate, norm, loss, data set, activation and model of one's own.

    accelerate launch train.py --plugin docs/examples/plugins/all_seams.py \
        --dataset own/shapes --dataset-kwargs fill=200 --model spiking_shape_net \
        --neuron learnt_decay --neuron-kwargs tau=0.7 --surrogate bell --surrogate-kwargs width=0.8 \
        --norm scaled --norm-kwargs start=0.9 --loss sscl=0.1,sparse=0.1 --loss-kwargs sparse.rate=0.2 \
        --sscl-taps stage1,stage2 --epochs 5 --warmup-epochs 1 --img-size 32
"""
import random
from dataclasses import dataclass

import torch
import torch.nn as nn
from PIL import Image, ImageDraw
from timm.models import register_model
from torch.utils.data import Dataset

from timm_sscl import (
    SpikingNeuron, register_activation, register_dataset, register_loss, register_neuron, register_surrogate,
    register_variant)
from timm_sscl.conversion import BatchNormOverTime, BatchNormVariant, VariantSettings
from timm_sscl.knobs import knob
from timm_sscl.neurons import NeuronSettings


@register_neuron('learnt_decay')
class LearntDecay(SpikingNeuron):
    """A leaky neuron that learns its decay factor."""

    @dataclass(frozen=True)
    class Settings(NeuronSettings):
        tau: float = knob(0.5, 'decay factor at the start of training')
        v_threshold: float = knob(0.5, 'firing threshold')

    def __init__(self, timesteps, **settings):
        super().__init__(timesteps, **settings)
        self.w = nn.Parameter(torch.logit(torch.tensor(self.settings.tau)))

    def start(self, x):
        return (torch.zeros_like(x),)

    def constants(self):
        return (self.w.sigmoid(),)

    @staticmethod
    def step(x, state, constants, t, settings):
        (v,), (tau,) = state, constants
        u = tau * v + x
        spikes = settings.spike(u, settings.v_threshold)
        return spikes, (u * (1 - spikes),)


@register_surrogate('bell')
def bell(u, v_threshold, width=0.5):
    """A bell around the threshold."""
    return torch.exp(-((u - v_threshold) / width) ** 2)


class ScaledNorm(BatchNormOverTime):
    """A batch norm with a learnable factor."""
    own_state = ('factor',)

    def normalise(self, x):
        return self.factor * super().normalise(x)


@register_variant('norm', 'scaled')
class Scaled(BatchNormVariant):
    """All batch norms have a learnable factor."""
    mixin = ScaledNorm
    label = 'scaled'
    changes_state = True

    @dataclass(frozen=True)
    class Settings(VariantSettings):
        start: float = knob(1.0, 'factor at the start of training')

    def set_up(self, norm, settings):
        self.set_parameter(norm, 'factor', torch.tensor(self.settings.start))


@register_loss('sparse', needs_firing_rates=True)
def sparse(step, rate: float = 0.1):
    """Squared distance of the mean firing rate from a target.

    Args:
        rate: Target, spikes per neuron and timestep.
    """
    return (torch.stack(list(step.firing_rates.values())).mean() - rate).square()


@register_activation
class SquarePlus(nn.Module):
    """A smooth ReLU; a neuron in the spiking network."""

    def forward(self, x):
        return (x + torch.sqrt(x * x + 1)) / 2


class ShapeNet(nn.Module):
    def __init__(self, num_classes, in_chans):
        super().__init__()
        self.num_classes = num_classes
        self.stage1 = nn.Sequential(nn.Conv2d(in_chans, 8, 3, 2, 1), nn.BatchNorm2d(8), SquarePlus())
        self.stage2 = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), SquarePlus())
        self.fc = nn.Linear(16, num_classes)

    def forward(self, x):
        return self.fc(self.stage2(self.stage1(x)).mean((2, 3)))


@register_model
def shape_net(pretrained=False, num_classes=2, in_chans=3, **kwargs):
    return ShapeNet(num_classes, in_chans)


@register_dataset('own/shapes')
class Shapes(Dataset):
    """Circles and squares of random sizes and places, before random greys."""
    classes = ['circle', 'square']

    def __init__(self, split, num_samples=None, fill=255):
        self.targets = [i % 2 for i in range(num_samples or 256)]
        self.split, self.fill = split, fill

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        generator = random.Random(f'{self.split} {index}')  # other samples in another split
        size, x, y, grey = (generator.randint(*ends) for ends in ((8, 18), (0, 12), (0, 12), (0, 99)))
        image = Image.new('RGB', (32, 32), (grey,) * 3)
        draw = ImageDraw.Draw(image)
        (draw.rectangle if self.targets[index] else draw.ellipse)((x, y, x + size, y + size), fill=(self.fill,) * 3)
        return image, self.targets[index]
