"""convert_ann(pool_first=True): neurons that fire after the max pooling behind them."""
import copy
import pickle

import pytest
import timm
import torch
import torch.nn as nn

from timm_sscl import convert_ann, convert_to_spiking, fold_gains
from timm_sscl.export import deploy, int8_missing


class _Net(nn.Module):
    def __init__(self, branch=False):
        super().__init__()
        self.conv, self.act1, self.pool = nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        self.conv2, self.act2, self.head = nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Linear(8, 4)
        self.branch = branch

    def forward(self, x):
        x = self.act1(self.conv(x))
        out = self.head(self.act2(self.conv2(self.pool(x))).mean((2, 3)))
        return out + x.mean((1, 2, 3))[:, None] if self.branch else out


def _net(branch=False):
    torch.manual_seed(0)
    return _Net(branch).double().eval()


def _images(n=8):
    return torch.randn(n, 3, 9, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@torch.no_grad()
def test_converges_to_the_ann_where_the_maximum_of_spikes_does_not():
    ann, x = _net(), _images()
    expected = ann(x)
    errors = {}
    for first in (False, True):
        model = convert_ann(copy.deepcopy(ann), x, pool_first=first)
        errors[first] = [((model.set_timesteps(t)(x) - expected).norm() / expected.norm()).item() for t in (16, 256)]
    # rounding falls as 1 / T, up to the transient of the second layer; the overestimate of pooled spikes stays
    assert errors[True][1] < errors[True][0] / 4 and errors[True][1] < .01
    assert errors[False][1] > .05


@torch.no_grad()
def test_thresholds_are_those_of_the_pooled_activations():
    ann, x = _net(), _images()
    pooled = ann.pool(ann.act1(ann.conv(x)))
    ltb, largest = (convert_ann(copy.deepcopy(ann), x, rule=rule, pool_first=True) for rule in ('ltb', 'percentile'))
    assert torch.allclose(ltb.act1.scale.flatten(), 2 * pooled.mean((0, 2, 3)), rtol=1e-12, atol=0)
    assert torch.allclose(largest.act1.scale.flatten(), pooled.amax((0, 2, 3)), rtol=1e-12, atol=0)


@torch.no_grad()
def test_spikes_are_those_of_a_neuron_behind_the_pooling():
    """The same as a network whose ReLU stands behind its pooling."""
    ann, x = _net(), _images()
    model = convert_ann(copy.deepcopy(ann), x, 6, pool_first=True)
    swapped = copy.deepcopy(ann)
    swapped.act1, swapped.pool = ann.pool, nn.ReLU()
    other = convert_ann(swapped, x, 6)
    assert torch.equal(model(x), other(x)) and torch.equal(model.act1.scale, other.pool.scale)
    whole = model(x)
    assert torch.allclose(fold_gains(model, x[:1])(x), whole, rtol=1e-9, atol=0)


@torch.no_grad()
@pytest.mark.skipif(int8_missing() is not None, reason=f'no int8 kernels: {int8_missing()}')
def test_deployed_neurons_pool_too():
    ann = _net().float()
    for layer in (ann.conv, ann.conv2, ann.head):  # whole multiples of a level, which int8 does not round
        level = layer.weight.abs().amax(tuple(range(1, layer.weight.ndim)), keepdim=True) / 127
        layer.weight.copy_((layer.weight / level).round() * level)
    x = _images().float()
    model = convert_ann(ann, x, 6, per_channel=False, pool_first=True)
    deployed = deploy(model, x[:1])
    assert set(deployed.deploy_report.levels) == {'act1'} and set(deployed.deploy_report.int8) == {'conv2'}
    torch.testing.assert_close(deployed(x, per_step=True), model(x, per_step=True), rtol=1e-4, atol=1e-4)  # float32


@torch.no_grad()
def test_potential_is_that_of_the_pooled_current():
    model, seen = convert_ann(_net(), _images(), 6, pool_first=True), []
    model.act1.register_forward_hook(lambda m, args, out: seen.append((m.potential(args[0]), out)))
    model(_images())
    (potential, out), = seen
    assert torch.equal((potential >= 1).flatten(0, 1), out > 0) and 0 < (out > 0).double().mean() < 1


@torch.no_grad()
def test_negative_gain_does_not_commute_with_the_pooling():
    model, x = convert_ann(_net(), _images(), 6, pool_first=True), _images()
    model.act1.set_gain(-model.act1.gain, model.act1.scale)
    expected = model(x)
    torch.testing.assert_close(fold_gains(model, x[:1])(x), expected)
    assert model.act1.gain is not None and expected.std() > 0


@torch.no_grad()
def test_is_spikingjellys_network():
    """The whole recipe: thresholds, and outputs at T, with the neuron behind ReLU and pooling."""
    ann2snn = pytest.importorskip('spikingjelly.activation_based.ann2snn')
    recipes = pytest.importorskip('spikingjelly.activation_based.ann2snn.recipes.local_threshold_balancing')
    functional = pytest.importorskip('spikingjelly.activation_based.functional')
    ann, x = _net(), _images(128)
    recipe = recipes.LocalThresholdBalancingRecipe(dataloader=list(x.split(64)))
    theirs = ann2snn.Converter(recipe=recipe, device='cpu').convert(copy.deepcopy(ann)).double()
    model = convert_ann(copy.deepcopy(ann), x, 5, rule='ltb', pool_first=True)
    functional.reset_net(theirs)
    mean = torch.stack([theirs(x[:16]) for _ in range(5)]).mean(0)
    assert torch.allclose(model(x[:16]), mean, rtol=1e-9, atol=1e-9)  # round-off, in another order


def test_checkpoints_copies_and_pickles_keep_it(tmp_path):
    x = torch.randn(2, 3, 32, 32)
    torch.manual_seed(0)
    ann = timm.create_model('resnet18', num_classes=5, zero_init_last=False).eval()
    model = convert_ann(ann, x, 3, pool_first=True)
    assert model.settings.pool_first == ('act1:maxpool',)
    assert 'fire after their max pooling: act1:maxpool' in str(model.spiking_report())
    expected = model(x)
    torch.save(model.state_dict(), tmp_path / 'model.pth')
    loaded = timm.create_model('spiking_resnet18', num_classes=5, checkpoint_path=str(tmp_path / 'model.pth')).eval()
    for clone in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(clone(x), expected)
    before = convert_ann(loaded, x, 3, rule='ltb')  # keeps where the neurons stand
    assert before.settings.pool_first == ('act1:maxpool',)
    plain = convert_to_spiking(timm.create_model('resnet18', num_classes=5).eval(), timesteps=3)
    loaded.load_state_dict(plain.state_dict())  # a state without it takes it back
    assert 'max pooling' not in str(loaded.spiking_report())
    assert loaded.settings.pool_first is None and torch.equal(loaded(x), plain(x))


def test_only_where_nothing_else_takes_the_spikes():
    model = convert_ann(_net(branch=True), _images(), 3, pool_first=True)
    assert model.settings.pool_first is None and type(model.pool) is nn.MaxPool2d
    again = convert_ann(_net(), _images(), 3)
    assert again.settings.pool_first is None and type(again.pool) is nn.MaxPool2d


def test_failure_leaves_the_ann():
    net = _net()
    net.conv2.bias.data[0] = float('inf')
    classes = [type(module) for module in net.modules()]
    with pytest.raises(ValueError, match='act2 are not finite'):
        convert_ann(net, _images(), pool_first=True)
    assert [type(module) for module in net.modules()] == classes
