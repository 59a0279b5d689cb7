"""MPBN: a batch norm on the potential, by hand, its threshold in evaluation, its state, and where it is refused."""
import copy
import pickle

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

from timm_sscl import calibrate, convert_to_spiking

T, B, C, K = 3, 4, 5, 4


class _Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.act, self.fc1, self.act2, self.fc2 = (
            nn.Conv2d(3, C, 3), nn.ReLU(), nn.Linear(C, 6), nn.ReLU(), nn.Linear(6, K))

    def forward(self, x):
        return self.fc2(self.act2(self.fc1(self.act(self.conv(x)).mean((2, 3)))))


def _net(**options):
    torch.manual_seed(0)
    model = convert_to_spiking(
        _Net(), **{'timesteps': T, 'norm': 'mpbn', 'surrogate': 'triangle', 'tau': .5, **options}).double()
    with torch.no_grad():
        for i, p in enumerate(model.act.parameters()):
            p.copy_(1 + .3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return model


def _randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _triangle(u, v_threshold):
    return (1 - (u - v_threshold).abs()).clamp(min=0)


class _Fire(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, v_threshold):
        ctx.save_for_backward(_triangle(u, v_threshold))
        return (u >= v_threshold).to(u.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0], None


@pytest.mark.parametrize('v_reset', [0., None])
def test_recursion_gradients_and_statistics(v_reset):
    model = _net(**(dict(v_reset='soft') if v_reset is None else {})).train()
    neuron = model.act
    norm = neuron.membrane_norm
    x, weight = (1 + _randn(T, B, C, 4, 3)).requires_grad_(), _randn(T, B, C, 4, 3, seed=1)
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    v, out = 0., []
    for x_t in x:
        u = .5 * v + x_t
        s = _Fire.apply(F.batch_norm(u, mean, var, norm.weight, norm.bias, True, .1, 1e-5), .5)
        out.append(s)
        v = u * (1 - s) if v_reset == 0. else u - .5 * s  # of the potential as it is
    expected = torch.stack(out)
    with model.time_folded():
        spikes = neuron(x.flatten(0, 1)).view_as(x)
    assert torch.equal(spikes, expected) and .1 < spikes.mean() < .9
    inputs = [x, norm.weight, norm.bias]
    grads = torch.autograd.grad((spikes * weight).sum(), inputs)
    for a, b in zip(grads, torch.autograd.grad((expected * weight).sum(), inputs)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert torch.equal(norm.running_mean, mean) and torch.equal(norm.running_var, var)  # moved T times
    assert norm.num_batches_tracked == T


@pytest.mark.parametrize('gamma, fires', [(2., lambda u: u >= 1.5), (-2., lambda u: u <= .5)])
def test_threshold_that_the_norm_amounts_to(gamma, fires):
    """theta' = mean + (theta - bias) * std / weight; a negative weight turns the comparison round."""
    model = _net(tau=0.).eval()
    norm = model.act.membrane_norm
    norm.eps = 1e-30
    with torch.no_grad():
        for tensor, value in ((norm.running_mean, 1.), (norm.running_var, 4.), (norm.weight, gamma), (norm.bias, 0.)):
            tensor.fill_(value)
        u = torch.linspace(-1, 3, 17, dtype=torch.float64).view(-1, 1, 1, 1).expand(-1, C, 1, 1)  # with .5 and 1.5
        model.set_timesteps(1)
        norm.eps = 1e-30
        with model.time_folded():
            assert torch.equal(model.act(u), fires(u).double())


def test_channels_of_maps_and_vectors():
    model = _net()
    assert [(m.num_features, m.axis) for m in (model.act.membrane_norm, model.act2.membrane_norm)] == [(C, -3), (6, -1)]
    tokens = timm.create_model('spiking_test_vit', norm='mpbn', num_classes=K)
    norm = next(iter(tokens.neurons().values())).membrane_norm
    assert (norm.num_features, norm.axis) == (tokens.blocks[0].mlp.fc1.out_features, -1)
    assert tokens(torch.randn(2, 3, 160, 160)).shape == (2, K)


class _OneSize(nn.Module):
    """A net that no guessed input fits: images of 11 x 9, or a pair of tensors."""

    def __init__(self):
        super().__init__()
        self.conv, self.act, self.fc = nn.Conv2d(3, C, 3), nn.ReLU(), nn.Linear(C * 9 * 7, K)

    def forward(self, x, factor=None):
        return self.fc(self.act(self.conv(x if factor is None else x * factor)).flatten(1))


@pytest.mark.parametrize('given', [
    dict(input_size=(3, 11, 9)), dict(example_inputs=(torch.randn(1, 3, 11, 9), torch.ones(1, 1, 1, 1)))], ids=list)
def test_the_input_that_was_given_shows_the_channels(given):
    x = torch.randn(2, 3, 11, 9)
    model = convert_to_spiking(_OneSize(), norm='mpbn', **given)
    assert (model.act.membrane_norm.num_features, model.act.membrane_norm.axis) == (C, -3)
    plain = convert_to_spiking(_OneSize(), **given)  # takes the norm from a checkpoint, and its copies do
    for other in plain, copy.deepcopy(plain), pickle.loads(pickle.dumps(plain)):
        other._explicit = frozenset()
        other.load_state_dict(model.state_dict())
        with torch.no_grad():
            assert torch.equal(other.eval()(x), model.eval()(x)) and other.settings.norm == 'mpbn'


def test_an_input_that_is_not_known_is_asked_for():
    with pytest.raises(ValueError, match=r'say what it takes by .*input_size=\(C, H, W\)'):
        convert_to_spiking(_OneSize(), norm='mpbn')


def _images():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def test_state(tmp_path):
    ann = timm.create_model('test_resnet', num_classes=K)
    model = timm.create_model('spiking_test_resnet', num_classes=K, norm='mpbn', timesteps=2)
    model.load_state_dict(ann.state_dict(), strict=True)
    calibrate(model, _images())
    own = {name for name, _ in model.named_parameters()} - {name for name, _ in ann.named_parameters()}
    assert own == {f'{name}.membrane_norm.{key}' for name in model.neurons() for key in ('weight', 'bias')}
    assert own <= model.no_weight_decay()
    model.train()(_images()).square().sum().backward()
    parameters = dict(model.named_parameters())
    assert sum(bool(parameters[name].grad.any()) for name in own) > len(own) / 2
    model.eval()
    with torch.no_grad():
        expected = model(_images(), per_step=True)
        loaded = timm.create_model('spiking_test_resnet', num_classes=K).eval()
        loaded.load_state_dict(model.state_dict())
        torch.save(model.state_dict(), tmp_path / 'm.pth')
        overlay = dict(file=str(tmp_path / 'm.pth'), num_classes=K)
        pretrained = timm.create_model(
            'spiking_test_resnet', num_classes=K, pretrained=True, pretrained_cfg_overlay=overlay).eval()
        for other in loaded, pretrained, copy.deepcopy(model), pickle.loads(pickle.dumps(model)):
            assert torch.equal(other(_images(), per_step=True), expected)
        model.set_timesteps(1)
        torch.testing.assert_close(model(_images(), per_step=True), expected[:1], rtol=1e-5, atol=1e-5)
        plain = timm.create_model('spiking_test_resnet', num_classes=K).eval()
        loaded._explicit = frozenset()
        loaded.load_state_dict(plain.state_dict())
        assert torch.equal(loaded(_images()), plain(_images())) and type(loaded.act1) is type(plain.act1)
    assert len(model.spiking_report().norms) == len(model.neurons()) and 'MPBN' in str(model.spiking_report())


def test_neuron_that_serves_several_widths_is_refused():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2, self.act = nn.Linear(4, 6), nn.Linear(6, 8), nn.ReLU()

        def forward(self, x):
            return self.act(self.fc2(self.act(self.fc1(x))))

    model = Shared()
    with pytest.raises(ValueError, match="norm='mpbn' has parameters per channel, but act runs on .* 6 and 8 channels"):
        convert_to_spiking(model, norm='mpbn')
    assert type(model.act) is nn.ReLU


def test_neurons_without_one_potential_are_refused():
    for neuron in 'mlf', 'psn':
        with pytest.raises(ValueError, match=f"norm='mpbn': normalises the potential of a LIF; neuron='{neuron}'"):
            timm.create_model('spiking_test_resnet', norm='mpbn', neuron=neuron)
    assert timm.create_model('spiking_test_resnet', norm='mpbn', neuron='if', num_classes=K)(_images()).shape == (4, K)
