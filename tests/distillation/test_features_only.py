"""SSCLLoss between encoders that return feature maps (features_only=True)."""
import pytest
import timm
import torch

from timm_sscl import SSCLLoss


def _encoder(name, seed, **kwargs):
    torch.manual_seed(seed)
    return timm.create_model(name, features_only=True, **kwargs)


def _as_tapped(maps, tap):
    """Maps (T * B, C, H, W) as the tapped module returns them: a transformer's tokens come after its class token."""
    return maps if tap.channel_axis == 1 else torch.cat([maps[:, :, 0, :1], maps.flatten(2)], 2).mT


@pytest.mark.parametrize('name, kwargs, stages', [
    ('test_resnet', dict(), ['layer1', 'layer2', 'layer3', 'layer4']),
    ('test_convnext', dict(), ['stages_0', 'stages_1', 'stages_2', 'stages_3']),
    ('test_vit', dict(img_size=32), ['model.blocks.3', 'model.blocks.4', 'model.blocks.5']),
])
def test_the_outputs_are_compared(name, kwargs, stages):
    student = _encoder(f'spiking_{name}', 0, timesteps=2, v_threshold=.1, **kwargs)
    teacher = _encoder(name, 1, **kwargs).eval()
    x = torch.randn(6, 3, 32, 32)
    sscl = SSCLLoss(student, teacher, input_size=(3, 32, 32))
    assert [tap.name for tap in sscl.taps] == stages
    student(x)
    sscl(x).backward()
    trained = [p for n, p in student.named_parameters() if p.grad is not None and p.grad.abs().max() > 0]
    assert len(trained) > 3 and all(p.grad is not None for p in sscl.parameters())
    with torch.no_grad(), sscl.record_in_eval():
        student.eval()
        outputs = [f.flatten(0, 1) for f in student(x, per_step=True)][-4:]
        expected = sscl.eval().from_features(*(
            [_as_tapped(f, tap) for f, tap in zip(maps, sscl.taps)] for maps in (outputs, teacher(x)[-4:])))
        student(x)
        torch.testing.assert_close(sscl(x), expected)
