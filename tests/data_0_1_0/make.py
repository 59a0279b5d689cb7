"""Wrote the other files of this folder, with version 0.1.0 of the library; see README.md."""
import os
import sys
from pathlib import Path

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

from timm_sscl import calibrate, convert_ann, convert_to_spiking
from timm_sscl.training.saving import checkpoint

HERE = Path(__file__).resolve().parent
VIT = dict(num_classes=5, img_size=32, patch_size=8, depth=1, embed_dim=8)
RUN = ['--model', 'spiking_test_vit', '--model-kwargs', 'patch_size=8', 'depth=1', 'embed_dim=8', '--img-size', '32',
       '-T', '3', '--tau', '0.5', '--epochs', '2', '--teacher-epochs', '1', '--warmup-epochs', '0', '--batch-size', '8',
       '--train-num-samples', '32', '--val-num-samples', '20', '--log-interval', '100', '--checkpoint-hist', '1',
       '--output', 'out', '--experiment', 'run', '--threads', '1', '--workers', '0']


class TwoCalls(nn.Module):
    """One module that calls two activations as functions."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, 2), nn.Conv2d(4, 4, 3, 2)
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(F.relu(self.conv2(F.relu(self.conv1(x)))).mean((2, 3)))


def relu_network():
    """Of torch's own classes, so that its pickle loads anywhere."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))


def images(batch=4):
    return 2 * torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def save_models():
    torch.manual_seed(0)
    models = {
        'calibrated_vit': timm.create_model(
            'spiking_test_vit', timesteps=3, tau=.5, v_threshold=.7, v_reset='soft', **VIT),
        'calibrated_two_calls': convert_to_spiking(TwoCalls(), timesteps=2, tau=.5),
        'converted': relu_network(),
    }
    expected = {}
    with torch.no_grad():
        for name, model in models.items():
            for p in model.parameters():
                p.add_(.2 * torch.randn_like(p))  # so that every time step differs
            model.train()(images(16))
            if name == 'converted':
                convert_ann(model.eval(), images(16), timesteps=8)
            else:
                calibrate(model.eval(), images(16))
                torch.save(model.state_dict(), HERE / f'{name}.pth')
            if name != 'calibrated_two_calls':
                torch.save(model, HERE / f'{name}.pkl')
            expected[name] = model(images(), per_step=True)
    torch.save(expected, HERE / 'expected.pth')


def save_unfinished_run():
    """The process ends, as if it was killed, after the student's first epoch."""
    save = checkpoint.RunSaver.save_epoch

    def save_and_die(self, *args, **kwargs):
        save(self, *args, **kwargs)
        if self.folder.name == 'run':
            os._exit(0)

    checkpoint.RunSaver.save_epoch = save_and_die
    os.chdir(HERE)
    sys.path.insert(0, str(HERE.parents[1]))
    import train
    train.main(RUN)


if __name__ == '__main__':
    save_models()
    save_unfinished_run()
