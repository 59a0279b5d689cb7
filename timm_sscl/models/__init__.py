from .resnet_cifar import ResNetCifar, resnet20_cifar
