"""What a report measures, on a validation set made by hand."""
from argparse import Namespace

import pytest
import timm
import torch

from timm_sscl import calibrate, estimate_energy
from timm_sscl.training.runs.rebuild import Rebuilt
from timm_sscl.training.runs.run_measure import measure_run


@pytest.mark.parametrize('labels,examples', [([5, 7, 11, 5], 1), ([5, 7, 8, 14], 2)])
def test_images_of_few_of_many_classes(labels, examples):
    """Spikes are shown of every other of 20 classes; of images of no such class, of the first."""
    torch.manual_seed(0)
    student = timm.create_model('spiking_test_resnet', num_classes=20, timesteps=2).eval()
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor(labels)
    calibrate(student, images)
    measured = measure_run(Rebuilt(
        Namespace(dataset='digits'), student, None, 'none', lambda x: x, [*zip(images.split(2), labels.split(2))],
        [f'class {i}' for i in range(20)], (.5,) * 3, (.5,) * 3, True))
    assert measured.images == 4 and [p.timesteps for p in measured.sweep] == [1, 2, 4]
    assert len(measured.examples) == examples and measured.spikes is not None
    assert measured.top1 == 25. * (student(images).argmax(1) == labels).sum().item()
    assert measured.energy.spiking == pytest.approx(estimate_energy(student, images).spiking, rel=1e-5)  # float32 means
