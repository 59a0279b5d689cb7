from .resnet_cifar import ResNetCifar, ResNetCifarMlp, resnet19_cifar, resnet19_cifar_fc, resnet20_cifar
from .vgg_cifar import VGGCifar, vgg16_cifar
