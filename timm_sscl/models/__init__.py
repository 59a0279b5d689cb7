"""`spiking_<name>` for every timm architecture, and the paper's networks that timm lacks."""
from .loading import load
from .resnet_cifar import ResNetCifar, ResNetCifarMlp, resnet19_cifar, resnet19_cifar_fc, resnet20_cifar
from .vgg_cifar import VGGCifar, vgg16_cifar

__all__ = [
    'ResNetCifar', 'ResNetCifarMlp', 'VGGCifar', 'load', 'resnet19_cifar', 'resnet19_cifar_fc',
    'resnet20_cifar', 'vgg16_cifar',
]
