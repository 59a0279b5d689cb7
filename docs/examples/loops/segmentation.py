#!/usr/bin/env python3
"""Segmentation with a spiking timm encoder in a U-Net, taught by a real-valued encoder, on scenes made of digits."""
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from torchvision.transforms.functional import to_tensor

import timm_sscl  # noqa: F401, registers the spiking_ names with timm
from timm_sscl import SSCLLoss, calibrate
from timm_sscl.data import DigitsDataset

CLASSES = 3  # background, digits 0 to 4, digits 5 to 9


def scenes(split, seed):
    """Scenes of 2 x 2 digits (N, 3, 32, 32), each in noise, and their masks (N, 32, 32)."""
    data = DigitsDataset(split, transform=lambda image: to_tensor(image.resize((16, 16))))
    images, labels = torch.stack([image for image, _ in data]), torch.tensor(data.targets)
    drawn = torch.randint(len(data), (2 * len(data) // 4, 4), generator=torch.Generator().manual_seed(seed))
    masks = (images[:, 0] > 0.4) * (1 + labels // 5)[:, None, None]
    images = images + 0.2 * torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    rows = [torch.cat([x[drawn[:, [0, 1]]], x[drawn[:, [2, 3]]]], -2) for x in (images, masks)]  # (N, 2, ..., 32, 16)
    return tuple(torch.cat([x[:, 0], x[:, 1]], -1) for x in rows)


def unet(encoder):
    return smp.Unet(encoder, encoder_weights=None, encoder_depth=4, decoder_channels=(64, 32, 16, 8), classes=CLASSES)


def train(model, epochs, sscl=None):
    """Cross-entropy per pixel, and the contrastive loss between the encoders where there is one."""
    parameters = [*model.parameters(), *(sscl.parameters() if sscl is not None else [])]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    for _ in range(epochs):
        model.train()
        for index in torch.randperm(len(images)).split(32)[:-1]:
            loss = F.cross_entropy(model(images[index]), masks[index])
            loss = loss + 0.02 * sscl(images[index]) if sscl is not None else loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@torch.no_grad()
def mean_iou(model):
    """Mean intersection over union of the classes on the validation scenes, in percent."""
    x, y = scenes('validation', seed=1)
    counts = smp.metrics.get_stats(model.eval()(x).argmax(1), y, mode='multiclass', num_classes=CLASSES)
    return 100 * smp.metrics.iou_score(*counts, reduction='macro').item()


torch.manual_seed(0)
images, masks = scenes('train', seed=0)
teacher = unet('tu-test_resnet')
train(teacher, epochs=6)
print(f'real-valued encoder: mean IoU {mean_iou(teacher):.1f} %')

student = unet('tu-spiking_test_resnet')  # T=4; the decoder sees the encoder's mean over time
encoder = student.encoder.model
encoder.set_timesteps(2)
calibrate(encoder, images[:64])
sscl = SSCLLoss(encoder, teacher.encoder.model, input_size=(3, 32, 32))  # between the encoders' feature maps
train(student, epochs=6, sscl=sscl)
print(f'spiking encoder, T=2: mean IoU {mean_iou(student):.1f} %')
