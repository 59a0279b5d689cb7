"""Whole timm models with other neurons, norms and residuals learn under SSCL, on pictures of digits."""
import pytest
import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from timm_sscl import SSCLTask, calibrate
from timm_sscl.neurons import lif_backend

CASES = {
    'vit_tiny_patch16_224': (dict(neuron='ternary'), dict(img_size=32)),
    'resnet50': (dict(residual='ms', norm='tebn'), {}),
    'convnext_atto': (dict(neuron='plif'), {}),
}


def _digits(n=8):
    data = load_digits()
    images = torch.from_numpy(data.images[:n]).float().unsqueeze(1).expand(-1, 3, -1, -1) / 8 - 1
    return F.interpolate(images, size=(32, 32), mode='bilinear'), torch.from_numpy(data.target[:n])


@pytest.mark.slow
@pytest.mark.parametrize('name', CASES)
@lif_backend('eager')  # a compilation takes longer than these steps
def test_ten_steps(name):
    spiking, common = CASES[name]
    torch.manual_seed(0)
    teacher = timm.create_model(name, num_classes=10, **common)
    student = timm.create_model(f'spiking_{name}', num_classes=10, timesteps=2, **spiking, **common)
    x, y = _digits()
    calibrate(student, x)
    task = SSCLTask(student, teacher, {'sscl': 0.1}, input_size=(3, 32, 32), verbose=False).train()
    optimizer = torch.optim.AdamW(task.get_trainable_module().parameters(), 5e-4)
    losses = []
    for _ in range(10):
        result = task(x, y)
        optimizer.zero_grad()
        result['loss'].backward()
        optimizer.step()
        losses.append([result[key].item() for key in ('loss', 'task_loss', 'sscl_loss')])
    first, last = losses[0], losses[-1]
    assert last[0] < .8 * first[0] and last[1] < .8 * first[1] and last[2] < first[2], losses
