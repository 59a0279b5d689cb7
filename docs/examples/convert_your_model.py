#!/usr/bin/env python3
"""A network of your own becomes spiking, is calibrated and trained, on the bundled digits."""
import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.transforms.functional import to_tensor

from timm_sscl import calibrate, convert_to_spiking
from timm_sscl.data import DigitsDataset
from timm_sscl.report import FiringRates

torch.manual_seed(0)


class Net(nn.Module):
    """An ordinary ANN: one activation is a module, one is a function call."""

    def __init__(self, num_classes=10):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32)
        self.act = nn.ReLU()
        self.fc = nn.Linear(32 * 4 * 4, num_classes)

    def forward(self, x):
        x = self.act(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x)))
        return self.fc(x.flatten(1))


def load(split):
    """Images (N, 3, 16, 16) and labels (N,)."""
    data = DigitsDataset(split, transform=lambda image: to_tensor(image.resize((16, 16))))
    return torch.stack([image for image, _ in data]), torch.tensor(data.targets)


images, labels = load('train')
model = convert_to_spiking(Net(), timesteps=4, input_size=(3, 16, 16))
print(model.spiking_report())
calibrate(model, images[:128])  # so that no layer starts silent

optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for epoch in range(3):
    model.train()
    for index in torch.randperm(len(images)).split(64):
        loss = F.cross_entropy(model(images[index]), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, y = load('validation')
    with torch.no_grad(), FiringRates(model.eval()) as rates:
        correct = (model(x).argmax(1) == y).float().mean().item()
    layers = ', '.join(f'{name} {rate:.2f}' for name, rate in rates.per_layer().items())
    print(f'spiking network, epoch {epoch + 1}: {100 * correct:.1f} %')
    print(f'  firing rates: {layers}')
