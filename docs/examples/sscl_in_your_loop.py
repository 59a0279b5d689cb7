#!/usr/bin/env python3
"""SSCLLoss in a plain PyTorch loop: a spiking student and its real-valued teacher, on the bundled digits."""
import timm
import torch
import torch.nn.functional as F
from torchvision.transforms.functional import to_tensor

from timm_sscl import SSCLLoss, calibrate
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
            x, y = images[index], labels[index]
            loss = F.cross_entropy(model(x), y)
            if sscl is not None:
                loss = loss + 0.1 * sscl(x)  # after model(x), on the same images
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model):
    """Top-1 on the validation images, in percent."""
    x, y = load('validation')
    return 100 * (model.eval()(x).argmax(1) == y).float().mean().item()


images, labels = load('train')
teacher = timm.create_model('resnet20_cifar', width=8, num_classes=10)
train(teacher, epochs=4, lr=3e-3)
print(f'teacher: {accuracy(teacher):.1f} %')

student = timm.create_model('spiking_resnet20_cifar', width=8, timesteps=2, num_classes=10)
calibrate(student, images[:128])  # so that no layer starts silent
sscl = SSCLLoss(student, teacher, input_size=(3, 16, 16))
train(student, epochs=6, lr=5e-3, sscl=sscl)
print(f'spiking student, T={student.timesteps}: {accuracy(student):.1f} %')
for layer, stats in sscl.stats.items():
    print(f'  {layer}: CKA {stats["cka_running"]:.2f}, weight {stats["weight"]:.2f}, bound {stats["mi_bound"]:.2f}')
sscl.close()
