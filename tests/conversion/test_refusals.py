"""What convert_to_spiking refuses, by name, and that a refusal changes nothing."""
import pytest
import torch
import torch.nn as nn

from spiking_families import B, K, Net, images_of, spiking_of
from timm_sscl import LIF, convert_to_spiking


@pytest.mark.parametrize('name,value', [
    ('timesteps', 0), ('timesteps', -1), ('timesteps', 2.5), ('timesteps', True),
    ('tau', -.1), ('tau', 1.5), ('tau', float('nan')),
    ('v_threshold', 0.), ('v_threshold', -1.), ('v_threshold', float('nan')),
    ('v_reset', 'hard'), ('v_reset', .5), ('v_reset', 2.),
])
def test_bad_settings_name_the_argument_and_change_nothing(name, value):
    model = Net()
    with pytest.raises(ValueError, match=name):
        convert_to_spiking(model, **{name: value})
    assert type(model) is Net and type(model.act) is nn.ReLU


def test_nothing_to_swap_raises_and_changes_nothing():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(.5))
    with pytest.raises(ValueError, match='Sequential'):
        convert_to_spiking(model, timesteps=4)
    assert [type(m) for m in model] == [nn.Linear, nn.Dropout] and type(model) is nn.Sequential
    assert model.train()(torch.ones(3, 4)).shape == (3, 4)


def test_converting_twice_raises():
    model = spiking_of('test_resnet')
    with pytest.raises(ValueError, match='set_timesteps'):
        convert_to_spiking(model)
    assert model(images_of()).shape == (B, K)


def test_compiled_model_raises():
    with pytest.raises(ValueError, match='compile'):
        convert_to_spiking(torch.compile(Net()))
    model = Net()
    model.compile()
    with pytest.raises(ValueError, match='compile'):
        convert_to_spiking(model)
    inside = nn.Sequential(nn.Conv2d(3, 3, 1), torch.compile(Net()))
    with pytest.raises(ValueError, match="'1'"):
        convert_to_spiking(inside)
    assert type(model.act) is nn.ReLU


def test_refusal_of_noise_changes_nothing():
    """AlphaDropout cannot share its mask: it is refused before the activation ahead of it is swapped."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Dropout(.5), nn.AlphaDropout(.5))
    with pytest.raises(NotImplementedError, match='AlphaDropout'):
        convert_to_spiking(model)
    assert [type(m) for m in model] == [nn.Linear, nn.ReLU, nn.Dropout, nn.AlphaDropout]


def test_token_mixing_over_the_batch_is_refused():
    class Mixing(Net):
        mix_token = True

    with pytest.raises(NotImplementedError, match='without mix_token'):
        convert_to_spiking(Mixing())


def test_probe_of_an_input_that_cannot_be_guessed():
    class Odd(Net):
        def forward(self, x):
            assert x.shape[-1] == 77
            return super().forward(x)

    with pytest.raises(ValueError, match='example_inputs.*input_size'):
        convert_to_spiking(Odd())
    assert isinstance(convert_to_spiking(Odd(), input_size=(3, 77, 77)).act, LIF)
    assert isinstance(convert_to_spiking(Odd(), example_inputs=torch.zeros(1, 3, 77, 77)).act, LIF)
