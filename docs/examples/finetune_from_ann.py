#!/usr/bin/env python3
"""A trained ANN gives a spiking network its weights, and then teaches it, on the bundled digits."""
import copy

import timm
import torch
import torch.nn.functional as F
from torchvision.transforms.functional import to_tensor

from timm_sscl import SSCLLoss, calibrate, convert_ann
from timm_sscl.data import DigitsDataset

torch.manual_seed(0)


def load(split):
    """Images (N, 3, 16, 16) and labels (N,)."""
    data = DigitsDataset(split, transform=lambda image: to_tensor(image.resize((16, 16))))
    return torch.stack([image for image, _ in data]), torch.tensor(data.targets)


def train(model, epochs, lr, sscl=None):
    """Cross-entropy, and the contrastive loss where there is one."""
    parameters = [*model.parameters(), *(sscl.parameters() if sscl is not None else [])]
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    for _ in range(epochs):
        model.train()
        for index in torch.randperm(len(images)).split(64)[:-1]:
            loss = F.cross_entropy(model(images[index]), labels[index])
            loss = loss + 0.1 * sscl(images[index]) if sscl is not None else loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model):
    """Top-1 on the validation images, in percent."""
    x, y = load('validation')
    return 100 * (model.eval()(x).argmax(1) == y).float().mean().item()


images, labels = load('train')
ann = timm.create_model('resnet20_cifar', width=8, num_classes=10)
train(ann, epochs=4, lr=3e-3)
print(f'ANN: {accuracy(ann):.1f} %')

# without any training: thresholds from the ANN's activations, many timesteps
converted = convert_ann(copy.deepcopy(ann), images[:512], timesteps=32, percentile=99.9)
print(f'spiking, converted, T=32: {accuracy(converted):.1f} %')

# with training: the ANN's weights, calibrated gains, few timesteps
student = timm.create_model('spiking_resnet20_cifar', width=8, timesteps=2, num_classes=10)
student.load_state_dict(ann.state_dict())
calibrate(student, images[:128])
print(f'spiking, ANN\'s weights, T=2, before training: {accuracy(student):.1f} %')
train(student, epochs=4, lr=2e-3, sscl=SSCLLoss(student, ann, input_size=(3, 16, 16)))
print(f'spiking, ANN\'s weights, T=2, after 4 epochs: {accuracy(student):.1f} %')
