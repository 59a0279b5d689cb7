#!/usr/bin/env python3
"""SSCLLoss in a LightningModule, with averaged weights and checkpoints. On two processes: --devices 2"""
import argparse
import tempfile

import lightning as L
import timm
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torchvision.transforms.functional import to_tensor

from timm_sscl import SSCLLoss, calibrate
from timm_sscl.data import DigitsDataset

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument('--devices', type=int, default=1)


class Classifier(L.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, index):
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch, index):
        self.log('accuracy', 100 * (self.model(batch[0]).argmax(1) == batch[1]).float().mean(), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=5e-3)


class Distilled(Classifier):
    def __init__(self, model, teacher):
        super().__init__(model)
        self.sscl = SSCLLoss(model, teacher, input_size=(3, 16, 16))  # parameters and checkpoints leave the teacher out

    def training_step(self, batch, index):
        loss = super().training_step(batch, index) + 0.1 * self.sscl(batch[0])
        self.log_dict({f'cka/{layer}': stats['cka'] for layer, stats in self.sscl.device_stats.items()})
        return loss

    def validation_step(self, batch, index):
        with self.sscl.record_in_eval():
            super().validation_step(batch, index)
            self.log('sscl', self.sscl(batch[0]), sync_dist=True)


def loader(split, devices, **options):
    data = DigitsDataset(split, transform=lambda image: to_tensor(image.resize((16, 16))))
    return torch.utils.data.DataLoader(data, batch_size=64 // devices, **options)


def fit(module, epochs, devices, folder):
    """Accuracy of the best averaged weights, in percent."""
    best = ModelCheckpoint(folder, monitor='accuracy', mode='max')
    trainer = L.Trainer(
        accelerator='cpu', devices=devices, strategy='ddp' if devices > 1 else 'auto', max_epochs=epochs,
        callbacks=[best, EMAWeightAveraging(decay=0.9)], logger=False, enable_model_summary=False,
        enable_progress_bar=False)
    validation = loader('validation', devices)
    trainer.fit(module, loader('train', devices, shuffle=True, drop_last=True), validation)
    return trainer.validate(module, validation, best.best_model_path)[0]['accuracy']


if __name__ == '__main__':
    args = parser.parse_args()
    torch.manual_seed(0)
    ann = timm.create_model('resnet20_cifar', width=8, num_classes=10)
    student = timm.create_model('spiking_resnet20_cifar', width=8, timesteps=2, num_classes=10)
    with tempfile.TemporaryDirectory() as folder:
        print(f'teacher: {fit(Classifier(ann), 4, args.devices, folder):.1f} %')
        calibrate(student, next(iter(loader('train', 1)))[0])  # so that no layer starts silent
        print(f'spiking student, T=2: {fit(Distilled(student, ann), 6, args.devices, folder):.1f} %')
