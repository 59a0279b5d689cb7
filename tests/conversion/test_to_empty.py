"""`to_empty` hands out memory with any values, also with those of another model."""
import pytest
import timm
import torch

from timm_sscl import calibrate, convert_ann


IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def plain():
    return timm.create_model('spiking_test_resnet', timesteps=7)


def calibrated():
    return calibrate(plain(), IMAGES)


def converted():
    """Gains per channel."""
    return convert_ann(timm.create_model('test_resnet').eval(), IMAGES, timesteps=7)


@pytest.mark.parametrize('other', [plain, calibrated, converted])
def test_memory_with_settings_of_another_model_is_not_read(monkeypatch, other):
    model, other = timm.create_model('spiking_test_resnet', timesteps=2), other()
    settings, left = model.settings, iter([other.state_dict()['spiking_settings'].clone()])
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, 'empty_like', lambda t, **kwargs: next(left) if t.dtype == torch.uint8
                        else empty_like(t, **kwargs))
    model.to_empty(device='cpu')
    assert next(left, None) is None  # the settings of the other model were what the memory held
    assert model.settings == settings
